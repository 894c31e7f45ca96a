"""Sizes that pictures are drawn at."""

import pytest
import torch
from fourfold.nodes.common.images import crop, prepare_lr
from fourfold.nodes.common.sizing import prepare_sized, working_size


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 100), (768, 768)), ((600, 700), (768, 896)), ((300, 900), (320, 1024)), ((2000, 1000), (1024, 512)),
     ((800, 1000), (768, 960)), ((10, 1000), (64, 1024)), ((1024, 768), (1024, 768))])
def test_the_published_sizes(size, expected):
    assert working_size(*size, 768, 1024, 64) == expected


def picture(height=20, width=30, channels=3):
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def test_small_targets_are_drawn_whole_and_come_back():
    prepared = prepare_sized(picture(channels=4), 4, multiple=8, min_short_side=96, max_long_side=128)
    assert prepared.pixels.shape == (1, 3, 80, 128) and prepared.size == (80, 120)  # the cap wins over the short side
    assert prepared.alpha.shape == (1, 1, 80, 120) and crop(prepared.pixels, prepared).shape == (1, 3, 80, 120)


def test_larger_targets_are_padded_or_drawn_small():
    options = dict(multiple=16, min_short_side=32, max_long_side=64)
    padded = prepare_sized(picture(), 4, **options)
    assert torch.equal(padded.pixels, prepare_lr(picture(), 4, None, 16, 32).pixels) and padded.work == (80, 120)
    small = prepare_sized(picture(), 4, **options, larger="shrink")
    assert small.pixels.shape == (1, 3, 32, 64) and crop(small.pixels, small).shape == (1, 3, 80, 120)


def test_without_a_bound_it_is_prepare_lr():
    ours, theirs = prepare_sized(picture(), 3.3, min_short_side=100), prepare_lr(picture(), 3.3, min_short_side=100)
    assert torch.equal(ours.pixels, theirs.pixels) and ours.work == theirs.work and torch.equal(ours.lr, theirs.lr)


def test_bilinear_changes_what_is_drawn_and_not_the_colours_reference():
    bicubic, bilinear = (prepare_sized(picture(), 4, interpolation=name) for name in ("bicubic", "bilinear"))
    assert bicubic.pixels.shape == bilinear.pixels.shape and torch.equal(bicubic.lr, bilinear.lr)
    assert (bicubic.pixels - bilinear.pixels).abs().mean() > 1e-3
    expected = torch.nn.functional.interpolate(picture(), scale_factor=4, mode="bilinear")
    assert torch.allclose(bilinear.pixels[..., :80, :120], expected, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"larger": "crop"}, {"interpolation": "nearest"}])
def test_other_choices_are_refused(wrong):
    with pytest.raises(ValueError, match="choose one of"):
        prepare_sized(picture(), **wrong)
