"""The sizes that pictures are drawn at."""

from dataclasses import replace

import pytest
import torch
from fourfold.nodes.common.images import crop, finish
from fourfold.nodes.common.sizing import working_size
from fourfold.nodes.instantir.config import PRESETS
from fourfold.nodes.instantir.preparation import prepare

FULL = PRESETS["full"].sampling


@pytest.mark.parametrize(("size", "expected"), [
    ((1024, 1024), (1024, 1024)), ((512, 512), (768, 768)), ((300, 400), (768, 1024)),
    ((500, 1000), (512, 1024)),  # 768 x 1536 capped to 512 x 1024
    ((600, 700), (768, 896)), ((480, 510), (768, 768)),  # 816 floored
    ((1, 1), (768, 768)), ((3, 1000), (64, 1024)),  # not to zero
    ((768, 1024), (768, 1024)), ((900, 1000), (896, 960))])
def test_published_sizes(size, expected):
    """The short side raised to 768, then the long side capped at 1024, then both floored to 64."""
    assert working_size(*size, 768, 1024, 64) == expected
    assert working_size(*size[::-1], 768, 1024, 64) == expected[::-1]


def test_a_picture_that_one_window_holds_is_drawn_at_the_published_size():
    lr = torch.rand(2, 4, 75, 100)
    prepared = prepare(lr, FULL, scale=4)
    assert prepared.size == (300, 400) and prepared.pixels.shape == (2, 3, 768, 1024) and prepared.alpha is not None
    bilinear = torch.nn.functional.interpolate(lr[:, :3], (768, 1024), mode="bilinear", antialias=True)
    torch.testing.assert_close(prepared.pixels, bilinear.clamp(0, 1))
    assert crop(prepared.pixels, prepared).shape[-2:] == (300, 400)
    assert finish(prepared.pixels, prepared).shape == (2, 4, 300, 400)


def test_a_larger_picture_keeps_its_size_and_is_padded():
    prepared = prepare(torch.rand(1, 1, 250, 301), FULL, scale=4)
    assert prepared.size == prepared.work == (1000, 1204) and prepared.pixels.shape == (1, 3, 1024, 1216)
    assert torch.equal(prepared.pixels[..., 1000:, :], prepared.pixels[..., 975:999, :].flip(-2)), "mirrored"
    assert finish(prepared.pixels, prepared).shape == (1, 1, 1000, 1204)
    narrow = prepare(torch.rand(1, 3, 100, 300), FULL, scale=4)
    assert narrow.work == (768, 2304), "a short side that SDXL can draw"


def test_without_windows_large_pictures_are_capped():
    prepared = prepare(torch.rand(1, 3, 300, 400), replace(FULL, tile=0), scale=4)
    assert prepared.size == (1200, 1600) and prepared.pixels.shape == (1, 3, 768, 1024)


def test_an_exact_size():
    prepared = prepare(torch.rand(1, 3, 30, 40), FULL, size=(333, 555))
    assert prepared.size == (333, 555) and prepared.pixels.shape == (1, 3, 576, 1024)


def test_tiny_pictures_are_enlarged_as_in_its_training():
    tiny = PRESETS["tiny"].sampling
    lr = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(prepare(lr, tiny, scale=4).pixels, prepare(lr, tiny, scale=4).lr)
    assert prepare(lr, tiny, scale=2).pixels.shape == (1, 3, 128, 128)
    assert prepare(lr, tiny, scale=5).pixels.shape == (1, 3, 160, 160)
