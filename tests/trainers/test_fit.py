"""The fit loop: numbers against hand computations, resuming, averaging, errors."""

import json
import math
from dataclasses import replace

import pytest
import torch
from fourfold.nodes.common.errors import MismatchedKeysError
from fourfold.trainers.ema import EMA, ema_decay_at
from fourfold.trainers.fit import FitConfig, NonFiniteLossError, learning_rate_at, parse
from fourfold.trainers.resume import checkpoints, read_checkpoint
from torch import nn


@pytest.fixture
def config(tiny, tmp_path):
    return tiny.TinyTraining(output_dir=str(tmp_path / "run"), max_steps=12, save_every=4, keep_last=0)


def weights(result):
    return torch.load(result.folder / "weights.pt", weights_only=True)


# schedule, command line -------------------------------------------------------------------------------------------

def test_schedule_warms_up_linearly_then_stays():
    config = FitConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate_at(s, config) for s in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_cosine_falls_to_zero_at_the_last_step():
    config = FitConfig(learning_rate=2.0, warmup_steps=10, schedule="cosine", max_steps=110)
    values = [learning_rate_at(s, config) for s in (10, 35, 60, 85, 110, 500)]
    expected = [2.0, 1 + math.cos(math.pi / 4), 1.0, 1 - math.cos(math.pi / 4), 0.0, 0.0]
    assert values == pytest.approx(expected, abs=1e-12)


def test_parse_takes_types_defaults_and_dashes(tiny):
    config = parse(FitConfig, ["--max-steps", "7", "--schedule", "cosine", "--no_tensorboard"])
    assert (config.max_steps, config.schedule, config.tensorboard) == (7, "cosine", False)
    config = parse(tiny.TinyTraining, ["--noise", "0.5"])
    assert config.noise == 0.5
    assert config.learning_rate == 1e-2 and config.resume is None


@pytest.mark.parametrize(("argv", "text"), [
    (["--max_steps", "0"], "--max_steps is 0, but must be at least 1"),
    (["--ema_decay", "1.0"], "--ema_decay is 1.0, but must be at least 0 and below 1"),
    (["--schedule", "linear"], "invalid choice"), (["--no_such_option", "1"], "no_such_option")])
def test_parse_says_what_is_wrong(argv, text, capsys):
    with pytest.raises(SystemExit):
        parse(FitConfig, argv)
    assert text in capsys.readouterr().err


def test_help_explains_every_option(tiny, capsys):
    with pytest.raises(SystemExit):
        parse(tiny.TinyTraining, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "memory of the moving average that is sampled and exported, 0..1" in shown
    assert "seconds to sleep in every micro step" in shown


# averaging, accumulation ------------------------------------------------------------------------------------------

def test_ema_equals_the_hand_computation_and_is_float32():
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    ema = EMA([("p", p)], decay=0.5)
    expected = p.detach().float().clone()
    for step, value in enumerate([3.0, 0.25, -1.5, 2.0, 8.0, 1.0, 0.5, 4.0, 1.0, 2.0]):
        with torch.no_grad():
            p.fill_(value)
        ema.update(step)
        d = min(0.5, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * value
    assert ema.average["p"].dtype == torch.float32
    torch.testing.assert_close(ema.average["p"], expected)
    with pytest.raises(RuntimeError), ema.swapped():
        assert torch.equal(p, ema.average["p"].bfloat16())
        raise RuntimeError
    assert torch.equal(p, torch.full((2,), 2.0, dtype=torch.bfloat16))


def test_ema_decay_reaches_its_value():
    assert ema_decay_at(0.999, 0) == 0.1 and ema_decay_at(0.999, 10**6) == 0.999 and ema_decay_at(0.0, 50) == 0.0


def test_exported_weights_are_the_average_of_the_trained_ones(tiny, config):
    states = []

    def spy(model, batch, generator, step):
        states.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return tiny.loss_fn(model, batch, generator, step, config)

    module = tiny.network()
    result = tiny.train(replace(config, ema_decay=0.7), module, loss_fn=spy)
    states.append({n: p.detach().clone() for n, p in module.named_parameters()})
    average = states[0]
    for step, state in enumerate(states[1:]):
        d = min(0.7, (1 + step) / (10 + step))
        average = {n: d * average[n] + (1 - d) * value for n, value in state.items()}
    torch.testing.assert_close(weights(result), average)
    assert not torch.allclose(weights(result)["0.weight"], states[-1]["0.weight"])


def test_two_micro_steps_of_four_equal_a_batch_of_eight(tiny, config):
    quiet = replace(config, noise=0.0, dropout=0.0)
    whole = tiny.train(replace(quiet, batch_size=8, output_dir=config.output_dir + "8"))
    parts = tiny.train(replace(quiet, batch_size=4, gradient_accumulation=2))
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, atol=1e-6, rtol=0)


def test_bfloat16_autocast_trains_float32_weights(tiny, config):
    module, seen = tiny.network(), []

    def spy(model, batch, generator, step):
        seen.append(model[0](batch["x"]).dtype)
        return tiny.loss_fn(model, batch, generator, step, config)

    tiny.train(replace(config, mixed_precision="bf16"), module, loss_fn=spy)
    assert set(seen) == {torch.bfloat16} and module[0].weight.dtype == torch.float32


def test_frozen_weights_stay_and_trained_ones_become_float32(tiny, config):
    module = tiny.network()
    module[0].requires_grad_(False)
    module[2].bfloat16()
    frozen = module[0].weight.clone()
    tiny.train(config, module)
    assert torch.equal(module[0].weight, frozen) and module[2].weight.dtype == torch.float32
    assert set(read_checkpoint(checkpoints(config.output_dir)[-1])["trained"]) == {"2.weight", "2.bias"}


# logs, samples, checkpoints ---------------------------------------------------------------------------------------

def test_training_learns_and_writes_what_it_promises(tiny, config, curve, tmp_path):
    pictures = []

    def sample_fn(module, folder, step):
        assert not module.training and folder.is_dir()
        pictures.append(step)
        torch.randn(3)  # a sampler's draws change nothing of the training
        return {"quality": 0.5}

    config = replace(config, max_steps=200, log_every=50, sample_every=100, save_every=50, keep_last=2, dropout=0.0)
    result = tiny.train(config, sample_fn=sample_fn)
    log = curve(config.output_dir)
    assert result.step == 200 and result.loss == log[200]["loss"] < 0.3 * log[50]["loss"]
    assert pictures == [100, 200]
    assert [f.name for f in checkpoints(config.output_dir)] == ["step-00000150", "step-00000200"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["step"] == 200 and metrics["loss"] == result.loss and metrics["seconds"] > 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["noise"] == 0.1


def test_sampling_does_not_change_the_losses(tiny, config, curve):
    tiny.train(config)
    other = replace(config, output_dir=config.output_dir + "s", sample_every=2)
    tiny.train(other, sample_fn=lambda module, folder, step: {} if torch.randn(9).isfinite().all() else None)
    assert curve(config.output_dir) == curve(other.output_dir)


def test_data_processes_do_not_change_the_losses(tiny, config, curve):
    tiny.train(config)
    other = replace(config, output_dir=config.output_dir + "w", num_workers=2)
    tiny.train(other)
    assert curve(config.output_dir) == curve(other.output_dir)


def test_tensorboard_is_written(tiny, config, tmp_path):
    pytest.importorskip("tensorboard")
    tiny.train(replace(config, tensorboard=True))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_without_tensorboard_a_warning_names_the_package(tiny, config, curve, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    tiny.train(replace(config, tensorboard=True))
    assert "pip install tensorboard" in caplog.text and 12 in curve(config.output_dir)


# errors -----------------------------------------------------------------------------------------------------------

def test_non_finite_loss_names_step_and_samples_and_leaves_the_weights(tiny, config):
    module, before = tiny.network(), []

    def bad(model, batch, generator, step):
        loss, numbers = tiny.loss_fn(model, batch, generator, step, config)
        before[:] = [p.detach().clone() for p in model.parameters()]
        return (loss * float("nan") if step == 5 else loss), numbers

    with pytest.raises(NonFiniteLossError, match=r"Step 5, process 0: the loss is nan \(samples \[20, 21, 22, 23\]"):
        tiny.train(replace(config, batch_size=4), module, loss_fn=bad)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    assert [f.name for f in checkpoints(config.output_dir)] == ["step-00000004"]


def test_non_finite_gradient_is_an_error_too(tiny, config):
    def bad(model, batch, generator, step):
        return (model(batch["x"]) * 0).square().sum().sqrt(), {}  # the root's slope at 0 is infinite: 0 * inf = NaN

    with pytest.raises(NonFiniteLossError, match="Step 0, process 0: the gradient's norm is nan"):
        tiny.train(config, loss_fn=bad)


def test_what_cannot_be_trained_is_said(tiny, config):
    with pytest.raises(ValueError, match="nothing to train"):
        tiny.train(config, tiny.network().requires_grad_(False))
    with pytest.raises(ValueError, match="enable_gradient_checkpointing"):
        tiny.train(replace(config, gradient_checkpointing=True))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="fp16 needs a GPU"):
            tiny.train(replace(config, mixed_precision="fp16"))


def test_what_a_module_carries_along_is_checkpointed(tiny, config, curve):
    """A network with a memory of its own input: resumed, it goes on as if it had not been stopped."""

    class Remembering(nn.Sequential):
        def __init__(self):
            torch.manual_seed(0)
            super().__init__(nn.Linear(4, 1))
            self.memory = torch.zeros(4)

        def carried_state(self):
            return {"memory": self.memory}

        def forward(self, x):
            self.memory += x.detach().mean(dim=0)
            return super().forward(x + self.memory)

    tiny.train(config, Remembering())
    parts = replace(config, output_dir=config.output_dir + "2")
    tiny.train(replace(parts, max_steps=9), Remembering())
    tiny.train(replace(parts, resume="latest"), Remembering())
    assert curve(parts.output_dir) == curve(config.output_dir)


def test_a_second_training_in_one_folder_is_refused(tiny, config):
    tiny.train(config)
    with pytest.raises(ValueError, match="already holds a training up to step-00000012"):
        tiny.train(config)


def test_resuming_another_network_names_the_parameters(tiny, config):
    tiny.train(config)
    with pytest.raises(MismatchedKeysError, match="another network"):
        tiny.train(replace(config, resume="latest", max_steps=20), nn.Sequential(nn.Linear(4, 1)))
