"""Trainings that are stopped, killed and continued."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from fourfold.trainers import resume
from fourfold.trainers.resume import checkpoints, drop_old, find_checkpoint, read_checkpoint, write_checkpoint


@pytest.fixture
def config(tiny, tmp_path):
    return tiny.TinyTraining(output_dir=str(tmp_path / "run"), max_steps=30, save_every=4, keep_last=0)


@pytest.fixture(scope="module")
def unbroken(tiny, curve, tmp_path_factory):
    """Losses and final state of 30 steps in one go."""
    folder = tmp_path_factory.mktemp("unbroken")
    tiny.train(tiny.TinyTraining(output_dir=str(folder), max_steps=30, save_every=4, keep_last=0))
    return curve(folder), read_checkpoint(checkpoints(folder)[-1])


def same(a, b):
    """Bit equality of nested states, without what the clock says."""
    if isinstance(a, dict):
        keys = set(a) - {"seconds"}
        return keys == set(b) - {"seconds"} and all(same(a[k], b[k]) for k in keys)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def start(tiny, output_dir, *arguments):
    command = [sys.executable, tiny.__file__, "--output_dir", str(output_dir), "--max_steps", "30", "--save_every", "4",
               "--keep_last", "0", "--pause", "0.05", *arguments]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "the training did not get there in time"
        time.sleep(0.02)


def test_resumed_training_equals_an_unbroken_one(tiny, config, curve, unbroken):
    for stop in (8, 9, 22):  # at a checkpoint; between log lines; again
        tiny.train(replace(config, max_steps=stop, resume="latest"))
    tiny.train(replace(config, resume="latest"))
    losses, state = unbroken
    ours = curve(config.output_dir)
    assert all(ours[step] == numbers for step, numbers in losses.items())
    assert same(read_checkpoint(checkpoints(config.output_dir)[-1]), state)


def test_killed_training_continues_with_the_same_losses(tiny, config, curve, unbroken, tmp_path):
    process = start(tiny, tmp_path / "run", "--num_workers", "1")
    wait_for(lambda: len(checkpoints(tmp_path / "run")) >= 2, process)
    time.sleep(0.12)  # into the steps after the checkpoint
    process.kill()
    process.wait()
    done = int(checkpoints(tmp_path / "run")[-1].name.removeprefix("step-"))
    assert 8 <= done < 30
    tiny.train(replace(config, resume="latest"))
    losses, state = unbroken
    assert curve(config.output_dir) == losses
    assert same(read_checkpoint(checkpoints(config.output_dir)[-1]), state)


def test_terminated_training_writes_a_checkpoint_first(tiny, config, curve, unbroken, tmp_path):
    process = start(tiny, tmp_path / "run", "--save_every", "0", "--num_workers", "1")
    wait_for(lambda: (tmp_path / "run" / "log.jsonl").exists() and curve(tmp_path / "run"), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 128 + signal.SIGTERM
    process.stderr.close()
    (folder,) = checkpoints(tmp_path / "run")
    assert (folder / "export" / "weights.pt").is_file()
    tiny.train(replace(config, resume="latest"))
    assert curve(config.output_dir) == unbroken[0]


def test_interrupt_within_the_process_is_answered_between_steps(tiny, config):
    def interrupted(model, batch, generator, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return tiny.loss_fn(model, batch, generator, step, config)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        tiny.train(config, loss_fn=interrupted)
    assert stopped.value.code == 128 + signal.SIGINT
    assert checkpoints(config.output_dir)[-1].name == "step-00000006"
    assert signal.getsignal(signal.SIGINT) == before


def test_two_processes_equal_one_with_twice_the_batch(tiny, config, curve, tmp_path):
    quiet = ["--noise", "0", "--dropout", "0", "--max_steps", "6", "--gradient_accumulation", "2"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               tiny.__file__, "--cpu", "True", "--output_dir", str(tmp_path / "two"), "--batch_size", "2", *quiet]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one = replace(config, noise=0.0, dropout=0.0, max_steps=6, gradient_accumulation=2, batch_size=4)
    tiny.train(one)
    a, b = (read_checkpoint(checkpoints(folder)[-1]) for folder in (tmp_path / "two", config.output_dir))
    assert a["order"]["processes"] == 2
    for kind in ("trained", "ema"):
        for name, value in b[kind].items():
            torch.testing.assert_close(a[kind][name], value, atol=1e-6, rtol=0)
    for step, numbers in curve(config.output_dir).items():
        assert curve(tmp_path / "two")[step]["loss"] == pytest.approx(numbers["loss"], rel=1e-5)


@pytest.mark.parametrize("moment", ["export", "before the rename", "between the renames"])
def test_a_kill_at_any_moment_of_writing_leaves_the_older_checkpoints(tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    write_checkpoint(tmp_path, 1, {"x": torch.ones(2)})
    write_checkpoint(tmp_path, 2, {"x": torch.full((2,), 2.0)})
    renames = []

    def rename(source, target, real=os.rename):
        renames.append(target)
        if moment == "before the rename" or (moment == "between the renames" and len(renames) == 2):
            raise Killed
        real(source, target)

    def export(folder):
        (folder / "half").write_text("half")
        if moment == "export":
            raise Killed

    monkeypatch.setattr(resume.os, "rename", rename)
    with pytest.raises(Killed):
        write_checkpoint(tmp_path, 2, {"x": torch.full((2,), 3.0)}, export)
    monkeypatch.undo()
    left = checkpoints(tmp_path)
    assert [f.name for f in left] == ["step-00000001", "step-00000002"][:1 if moment == "between the renames" else 2]
    assert read_checkpoint(left[0])["x"].tolist() == [1, 1]
    write_checkpoint(tmp_path, 3, {"x": torch.full((2,), 3.0)})  # clears up, and puts the renamed one back
    assert [f.name for f in sorted((tmp_path / "checkpoints").iterdir())] == [f"step-0000000{i}" for i in (1, 2, 3)]
    assert read_checkpoint(checkpoints(tmp_path)[1])["x"].tolist() == [2, 2]


def test_latest_skips_incomplete_folders(tmp_path):
    write_checkpoint(tmp_path, 10, {"x": 1})
    (tmp_path / "checkpoints" / "step-00000020").mkdir()
    assert find_checkpoint(tmp_path, "latest").name == "step-00000010"
    with pytest.raises(FileNotFoundError, match=r"step-00000020 is not a complete checkpoint.*step-00000010"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoints" / "step-00000020"))
    assert find_checkpoint(tmp_path / "new", "latest") is None


def test_the_newest_are_kept(tmp_path):
    for step in (5, 100000000, 20, 3):
        write_checkpoint(tmp_path, step, {"x": step})
    drop_old(tmp_path, 2)
    assert [read_checkpoint(f)["x"] for f in checkpoints(tmp_path)] == [20, 100000000]
    drop_old(tmp_path, 0)
    assert len(checkpoints(tmp_path)) == 2


def test_a_log_line_cut_short_by_a_kill_is_dropped(tiny, config, curve, caplog):
    tiny.train(replace(config, max_steps=8))
    with open(f"{config.output_dir}/log.jsonl", "a") as log:
        log.write('{"step": 9, "loss": 99}\n{"step": 1')
    tiny.train(replace(config, max_steps=12, resume="latest"))
    assert curve(config.output_dir)[9]["loss"] != 99 and "unfinished line" in caplog.text
