"""A training of a linear layer that takes milliseconds a step: run as a program (to be killed) or loaded by tests.

    python tiny_training.py --pause 0.05 --output_dir ... --max_steps ...
"""

from dataclasses import dataclass
from functools import partial

import torch
from fourfold.trainers.fit import FitConfig, fit, option, parse
from fourfold.trainers.order import generator_of
from torch import nn


@dataclass(frozen=True)
class TinyTraining(FitConfig):
    """Training of a linear layer."""

    learning_rate: float = option(1e-2, "as in FitConfig")
    log_every: int = option(3, "as in FitConfig")
    num_workers: int = option(0, "as in FitConfig")
    tensorboard: bool = option(False, "as in FitConfig")
    noise: float = option(0.1, "standard deviation of the noise on the input, drawn from the step's generator")
    dropout: float = option(0.2, "drawn from torch's global generator")
    pause: float = option(0.0, "seconds to sleep in every micro step")


class Sums:
    """Endless: item i holds four numbers drawn from i, and their sum."""

    def __getitem__(self, index):
        x = torch.randn(4, generator=generator_of("sums", index))
        return {"x": x, "y": x.sum()[None], "index": index}


def network(dropout=0.2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 1))


def loss_fn(model, batch, generator, step, config):
    if config.pause:
        import time

        time.sleep(config.pause)
    x = batch["x"] + config.noise * torch.randn(batch["x"].shape, generator=generator)
    loss = (model(x).float() - batch["y"]).square().mean()
    return loss, {"root": loss.item() ** 0.5}


def save_fn(state, folder, step):
    torch.save({name: value.clone() for name, value in state.items()}, folder / "weights.pt")


def train(config, module=None, **overrides):
    arguments = {"loss_fn": partial(loss_fn, config=config), "save_fn": save_fn, "dataset": Sums(), **overrides}
    return fit(config, module or network(config.dropout), **arguments)


if __name__ == "__main__":
    train(parse(TinyTraining))
