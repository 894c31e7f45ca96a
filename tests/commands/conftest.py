"""What stands in for a method, and pictures to give it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fourfold.commands import methods
from fourfold.commands.options import sampling_settings
from fourfold.nodes.common.image_files import write_image


class Enlarger:
    """Stands in for a method: nearest-neighbour enlargement, two steps, and a refusal of pictures 13 px wide."""

    def __init__(self, name, options):
        if Path(options.model).name == "broken":
            raise RuntimeError("the weights in broken are damaged")
        self.name, self.settings, self.used = name, {"steps": 2} | sampling_settings(options), {}

    def __call__(self, lr, seed, scale=4, size=None, on_step=None):
        if lr.shape[-1] == 13:
            raise RuntimeError("13 px bring bad luck")
        self.used = {"prompt": ["a fence"], **self.settings}
        for step in range(2):
            if on_step is not None:
                on_step(step, 2, lr, lr)
        return F.interpolate(lr, size=size) if size else F.interpolate(lr, scale_factor=scale)


@pytest.fixture
def real_method():
    """The class that `enlarger` stands in for."""
    return methods.Method


@pytest.fixture(autouse=True)
def enlarger(real_method, monkeypatch):
    """The class that the commands take for the method."""
    monkeypatch.setattr(methods, "Method", Enlarger)
    return Enlarger


@pytest.fixture
def picture():
    """`picture(path, width, height)` writes noise there and returns the path."""

    def write(path: Path, width: int = 6, height: int = 5) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(width)))
        return path

    return write
