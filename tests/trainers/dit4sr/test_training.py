"""Whole trainings of a very small DiT4SR: learning, exporting, being killed, several processes, sample pictures."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fourfold.nodes.common.checkpoints import read_header
from fourfold.nodes.common.images import read_image, resize
from fourfold.nodes.dit4sr.model import DiT4SRTransformer
from fourfold.nodes.dit4sr.restore import load_system, restore
from fourfold.trainers import train_dit4sr
from fourfold.trainers.data import Photographs
from fourfold.trainers.order import generator_of
from fourfold.trainers.resume import checkpoints
from fourfold.trainers.train_dit4sr import build, train


def test_training_learns_and_exports_a_system(config, photographs, program, batch_of):
    config = replace(config, max_steps=40, batch_size=4, save_every=0, mixed_precision="bf16", ema_decay=0.5,
                     learning_rate=5e-3)
    before = build(config, program.NETWORK)
    result = train(config, program.NETWORK)
    assert {p.name for p in result.folder.iterdir()} == {"transformer", "text.safetensors", "codec.safetensors"}
    after = build(config, program.NETWORK)
    after.transformer.load_state_dict(DiT4SRTransformer.from_pretrained(result.folder / "transformer").state_dict())
    batch = batch_of(before, config, 8)
    losses = [study(batch, generator_of("test")).item() for study in (before, after)]
    assert losses[1] < 0.95 * losses[0]

    system = load_system(result.folder, device="cpu")
    system.sampling = replace(system.sampling, steps=2, min_short_side=32)
    sr = restore(torch.rand(1, 3, 8, 10), system)
    assert sr.shape == (1, 3, 32, 40) and sr.isfinite().all()
    header = read_header(result.folder / "transformer")
    assert header.step == 40 and {dtype for dtype, _ in header.tensors.values()} == {"F16"}
    assert header.training["photographs"] == photographs.name and header.training["learning_rate"] == 5e-3
    for file in ("transformer", "text.safetensors"):
        assert str(photographs.parent) not in json.dumps(read_header(result.folder / file).metadata)


def test_killed_training_continues_with_the_same_losses(config, photographs, curve, tmp_path, program):
    config = replace(config, max_steps=8, save_every=2)
    train(config, program.NETWORK)
    command = [sys.executable, program.__file__, "--photographs", str(photographs), "--learning_rate", "1e-3",
               "--output_dir", str(tmp_path / "killed"), "--max_steps", "100000", "--save_every", "2", "--l1", "0.3",
               "--export_dtype", "float16"]
    with open(tmp_path / "errors.txt", "w") as errors:
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=errors)
    end = time.monotonic() + 300
    while not checkpoints(tmp_path / "killed"):
        assert process.poll() is None, (tmp_path / "errors.txt").read_text()
        assert time.monotonic() < end, "the training did not get to a checkpoint in time"
        time.sleep(0.01)
    process.kill()
    process.wait()
    first = min(int(folder.name.removeprefix("step-")) for folder in checkpoints(tmp_path / "killed"))
    resumed = replace(config, output_dir=str(tmp_path / "killed"), max_steps=max(8, first + 2), resume="latest")
    train(resumed, program.NETWORK)
    continued, unbroken = curve(tmp_path / "killed"), curve(config.output_dir)
    for step in range(1, 9):  # the last digits may differ: the killed process ran on another number of threads
        assert continued[step] == pytest.approx(unbroken[step], rel=1e-5)


@pytest.mark.slow
def test_two_processes_train(config, photographs, curve, tmp_path, program):
    """Without GPUs `--multi_gpu` makes processes meet over gloo; here they also share the work of a cache."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               program.__file__, "--cpu", "True", "--photographs", str(photographs),
               "--output_dir", str(tmp_path / "two"), "--max_steps", "3", "--cache", str(tmp_path / "cache"),
               "--cached_crops", "6", "--sample_every", "3", "--samples", "1"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = curve(tmp_path / "two")
    assert sorted(losses) == [1, 2, 3] and (tmp_path / "two" / "samples" / "step-00000003-0.png").is_file()
    state = torch.load(checkpoints(tmp_path / "two")[-1] / "state.pt", weights_only=True)
    assert state["order"]["processes"] == 2


def test_sample_pictures_are_drawn_on_the_way(config, curve, program):
    config = replace(config, max_steps=2, sample_every=1, samples=2)
    train(config, program.NETWORK)
    folder = Path(config.output_dir) / "samples"
    names = [f"step-0000000{step}-{i}.png" for step in (1, 2) for i in range(2)]
    assert sorted(p.name for p in folder.iterdir()) == names
    sheets = [read_image(folder / name) for name in names]
    assert {sheet.shape for sheet in sheets} == {(1, 3, 32, 96)}
    lr, _, hr = sheets[0].chunk(3, dim=-1)
    crops = Photographs(config.photographs, 32, "seesr", min_scale=config.min_scale)
    item = crops[train_dit4sr.HELD_OUT]
    torch.testing.assert_close(hr[0], item["hr"], atol=0.5 / 255 + 1e-6, rtol=0)
    torch.testing.assert_close(lr[0], resize(item["lr"][None], (32, 32))[0], atol=0.5 / 255 + 1e-6, rtol=0)
    assert torch.equal(sheets[0].chunk(3, dim=-1)[2], sheets[2].chunk(3, dim=-1)[2]), "the same crops every time"
    lines = [json.loads(line) for line in (Path(config.output_dir) / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if 5 < line.get("sample_psnr", 0) < 60] == [1, 2]
