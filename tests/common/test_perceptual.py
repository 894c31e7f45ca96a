"""LPIPS as a training loss: what is missing is named, nothing is silently zero."""

import sys
from types import SimpleNamespace

import pytest
import torch
from fourfold.nodes.common.perceptual import BACKBONES, PerceptualDistance, load_perceptual
from torch import nn


class Recorded(nn.Module):
    """Stands in for lpips.LPIPS: takes what it takes and gives one number a picture."""

    def __init__(self, net, verbose):
        super().__init__()
        self.net, self.verbose = net, verbose
        self.lin, self.dropout = nn.Conv2d(3, 1, 1), nn.Dropout()

    def forward(self, in0, in1, normalize):
        assert normalize and in0.dtype == in1.dtype == torch.float32
        return self.dropout(self.lin(in0 - in1)).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


def test_none_is_none_and_other_names_are_refused():
    assert load_perceptual("none") is None
    with pytest.raises(ValueError, match="perceptual loss is 'lpips'; expected one of none, vgg, alex, squeeze"):
        load_perceptual("lpips")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(RuntimeError, match=r"needs the packages lpips and torchvision.*--perceptual none"):
        load_perceptual("vgg")


@pytest.mark.parametrize("name", BACKBONES)
def test_missing_weights_of_the_backbone_are_named_before_lpips_would_download_them(hub, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=None))
    with pytest.raises(FileNotFoundError, match=rf"checkpoints/{BACKBONES[name]} does not exist.*--perceptual none"):
        load_perceptual(name)


def test_the_distance_is_a_mean_with_gradients_for_the_picture_alone(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Recorded))
    (hub / BACKBONES["vgg"]).touch()
    distance = load_perceptual("vgg")
    network = distance.network
    assert isinstance(distance, PerceptualDistance) and (network.net, network.verbose) == ("vgg", False)
    distance.train()
    assert not network.dropout.training
    restored, clean = torch.rand(2, 3, 8, 8, requires_grad=True), torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distance(restored, clean)
    assert loss.shape == () and distance(clean, clean) < loss
    loss.backward()
    assert restored.grad.abs().sum() > 0 and all(p.grad is None for p in distance.parameters())
