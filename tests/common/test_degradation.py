"""The two-stage degradation: sizes, seeds, ranges, and every stage measured on its own."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fourfold.nodes.common import degradation
from fourfold.nodes.common.blur_kernels import filter2d
from fourfold.nodes.common.degradation import (
    DEGRADATIONS,
    LIGHT,
    REAL_ESRGAN,
    SEESR,
    apply_recipe,
    degrade,
    draw_recipe,
)
from fourfold.nodes.common.jpeg import jpeg

NOTHING = replace(
    LIGHT.first, blur_prob=0.0, resize_probs=(0.0, 0.0, 1.0), noise_prob=0.0, jpeg_prob=0.0, grey_noise_prob=0.0
)
IDLE = replace(LIGHT, first=NOTHING, second=NOTHING, resize_modes=("area",), antialias=False)


def photograph(height, width, seed=0):
    """Smooth colour with texture and an edge, (1, 3, H, W) in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, max(1, height // 16), max(1, width // 16), generator=generator)
    picture = F.interpolate(coarse, (height, width), mode="bilinear") * 0.6 + 0.2
    picture[..., width // 3 :] *= 0.8
    return (picture + 0.05 * torch.randn(picture.shape, generator=generator)).clamp(0, 1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- sizes, range, seeds


@pytest.mark.parametrize("name", DEGRADATIONS)
@pytest.mark.parametrize(
    ("size", "scale"),
    [((64, 64), 4), ((67, 50), 4), ((4, 4), 4), ((5, 33), 4), ((33, 47), 2), ((48, 31), 3), ((40, 24), 1), ((9, 8), 8)],
)
def test_any_size_gives_the_size_divided_and_rounded_down(name, size, scale):
    picture = photograph(*size)
    for seed in range(3):
        lr = degrade(picture, DEGRADATIONS[name], seed, scale)
        assert lr.shape == (1, 3, size[0] // scale, size[1] // scale)
        assert lr.dtype == torch.float32 and lr.isfinite().all()
        assert lr.min() >= 0 and lr.max() <= 1
        assert torch.equal(lr, (lr * 255).round() / 255)


def test_a_size_that_does_not_divide_is_squeezed_not_cut():
    """35 px at x4 become 8 px of 35/8 px each: the last column sees the picture's last columns."""
    picture = torch.zeros(1, 3, 32, 35)
    picture[..., -3:] = 1
    lr = degrade(picture, IDLE, 0)
    assert lr.shape[-1] == 8
    assert lr[0, 0, 0, -1].item() == pytest.approx(0.6, abs=0.01)  # area mode: 3 of the 5 columns it touches
    assert lr[..., :-1].max() == 0


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_same_seed_same_bytes_and_other_seeds_differ(name):
    picture = photograph(64, 48)
    first, again, other = (degrade(picture, DEGRADATIONS[name], seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_a_batch_equals_its_pictures_one_by_one(name):
    batch = torch.cat([photograph(60, 52, seed) for seed in range(4)])
    counted = degrade(batch, DEGRADATIONS[name], 40)
    listed = degrade(batch, DEGRADATIONS[name], [43, 42, 41, 40])
    for row in range(4):
        single = batch[row : row + 1]
        assert torch.equal(counted[row : row + 1], degrade(single, DEGRADATIONS[name], 40 + row))
        assert torch.equal(listed[row : row + 1], degrade(single, DEGRADATIONS[name], [43 - row]))


def test_the_global_random_state_is_neither_read_nor_moved():
    picture = photograph(48, 48)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = degrade(picture, SEESR, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(degrade(picture, SEESR, 3), first)


def test_input_is_left_alone_and_carries_no_gradient():
    picture = photograph(48, 48).requires_grad_()
    copy = picture.detach().clone()
    assert not degrade(picture, REAL_ESRGAN, 0).requires_grad
    assert torch.equal(picture.detach(), copy)


def test_other_float_types_and_autocast_change_nothing():
    picture = (photograph(48, 48) * 255).round() / 255
    expected = degrade(picture, REAL_ESRGAN, 5)
    assert torch.equal(degrade(picture.double(), REAL_ESRGAN, 5), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(degrade(picture, REAL_ESRGAN, 5), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", DEGRADATIONS)
def test_the_device_does_not_change_the_picture(name):
    batch = torch.cat([photograph(96, 80, seed) for seed in range(8)])
    on_gpu = degrade(batch.cuda(), DEGRADATIONS[name], 0)
    assert on_gpu.is_cuda
    assert (on_gpu.cpu() - degrade(batch, DEGRADATIONS[name], 0)).abs().mean() < 0.5 / 255


def test_seeds_of_every_kind_of_integer():
    pair = torch.cat([photograph(32, 32), photograph(32, 32)])
    expected = degrade(pair, LIGHT, [5, 6])
    assert torch.equal(degrade(pair, LIGHT, np.int64(5)), expected)
    assert torch.equal(degrade(pair, LIGHT, torch.tensor([5, 6])), expected)
    largest = 2**64 - 1  # ComfyUI's largest seed; the next row starts over at 0
    assert torch.equal(degrade(pair, LIGHT, largest)[1:], degrade(pair[1:], LIGHT, 0))


def test_what_a_resize_overshoots_is_forgiven():
    picture = photograph(32, 32)
    picture[..., 0, 0] = 1 + 5e-5
    assert degrade(picture, LIGHT, 0).max() <= 1


def test_an_empty_batch_stays_empty():
    assert degrade(torch.zeros(0, 3, 32, 32), SEESR, 0).shape == (0, 3, 8, 8)


def test_presets_are_ordered_by_their_damage():
    picture = photograph(96, 96)
    clean = F.interpolate(picture, (24, 24), mode="area")
    damage = {
        name: torch.stack([(degrade(picture, settings, seed) - clean).abs().mean() for seed in range(24)]).mean()
        for name, settings in DEGRADATIONS.items()
    }
    assert damage["light"] < damage["seesr"] < damage["real_esrgan"]


# ---- every step on its own


def test_without_any_step_only_the_shrinking_is_left():
    picture = photograph(64, 48)
    expected = (F.interpolate(picture, (16, 12), mode="area") * 255).round() / 255
    assert torch.equal(degrade(picture, IDLE, 0), expected)


def test_antialias_is_what_light_shrinks_with():
    picture = photograph(64, 48)
    quiet = replace(LIGHT, first=NOTHING, second=NOTHING)
    expected = F.interpolate(picture, (16, 12), mode="bicubic", antialias=True).clamp(0, 1)
    assert (degrade(picture, quiet, 0) - expected).abs().max() <= 0.51 / 255
    aliased = degrade(picture, replace(quiet, antialias=False), 0)
    assert (aliased - expected).abs().max() > 5 / 255


def test_blur_is_the_recipes_kernel():
    settings = replace(IDLE, first=replace(NOTHING, blur_prob=1.0))
    picture = photograph(64, 64)
    kernel = draw_recipe(settings, generator(11)).first.kernel
    expected = filter2d(picture, kernel).clamp(0, 1)
    assert (degrade(picture, settings, 11, scale=1) - expected).abs().max() <= 0.51 / 255


def test_jpeg_is_the_recipes_quality():
    settings = replace(IDLE, second=replace(NOTHING, jpeg_prob=1.0, jpeg_quality=(20.0, 60.0)))
    picture = photograph(64, 64)
    quality = draw_recipe(settings, generator(4)).second.quality
    assert 20 <= quality <= 60
    assert torch.equal(degrade(picture, settings, 4, scale=1), jpeg(picture, quality))


@pytest.mark.parametrize("sigma", [5.0, 20.0])
@pytest.mark.parametrize("grey", [False, True])
def test_gaussian_noise_has_the_sigma_asked_for(sigma, grey):
    stage = replace(
        NOTHING, noise_prob=1.0, gaussian_prob=1.0, gaussian_sigma=(sigma, sigma), grey_noise_prob=float(grey)
    )
    lr = degrade(torch.full((1, 3, 160, 160), 0.5), replace(IDLE, first=stage), 0, scale=1)
    assert lr.std(dim=(-1, -2)).mul(255).flatten().tolist() == pytest.approx([sigma] * 3, rel=0.012)
    assert lr.mean().item() == pytest.approx(0.5, abs=0.004)
    correlation = torch.corrcoef(lr[0].flatten(1))[0, 1].item()
    assert correlation > 0.999 if grey else abs(correlation) < 0.03


@pytest.mark.parametrize("grey", [False, True])
def test_poisson_noise_grows_with_brightness(grey):
    """256 grey levels in use: variance scale^2 * x / 256, plus what the rounding to 8 bits adds."""
    scale = 1.5
    stage = replace(
        NOTHING, noise_prob=1.0, gaussian_prob=0.0, poisson_scale=(scale, scale), grey_noise_prob=float(grey)
    )
    ramp = (torch.arange(256) / 255).expand(1, 3, 1500, 256).contiguous()
    lr = degrade(ramp, replace(IDLE, first=stage), 0, scale=1)
    middle = slice(40, 170)  # where nothing is clipped
    variance = (lr - ramp).var(dim=-2)[0, 0, middle]
    expected = scale**2 * ramp[0, 0, 0, middle] / 256 + 1 / 12 / 255**2
    assert (variance / expected).mean().item() == pytest.approx(1, abs=0.02)
    assert (variance / expected - 1).abs().max() < 0.25
    assert (lr - ramp).mean(dim=-2)[0, 0, middle].abs().mean() < 0.005
    correlation = torch.corrcoef((lr - ramp)[0, :, :, middle].flatten(1))[0, 1].item()
    assert correlation > 0.999 if grey else abs(correlation) < 0.03


def test_poisson_noise_is_scaled_by_the_grey_levels_in_use():
    """A picture of 16 levels is counted in sixteenths, one of 17 in thirty-seconds."""
    stage = replace(NOTHING, noise_prob=1.0, gaussian_prob=0.0, poisson_scale=(0.25, 0.25))
    for levels, peak in ((16, 16), (17, 32)):
        columns = ((torch.arange(192) % levels) * 8 / 255 + 0.3).mul(255).round() / 255
        picture = columns.expand(1, 3, 1000, 192).contiguous()
        lr = degrade(picture, replace(IDLE, first=stage), 1, scale=1)
        variance = (lr - picture).var(dim=-2)[0].mean(0)
        ratio = variance / (0.25**2 * columns / peak + 1 / 12 / 255**2)
        assert ratio.mean().item() == pytest.approx(1, abs=0.03), levels


def test_poisson_table_is_the_distribution():
    counts, peaks = degradation._poisson_counts(torch.device("cpu"))
    counts = counts.view(9, 256, -1).double()
    assert peaks.tolist() == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    rate = peaks.double()[:, None] * torch.arange(256) / 255
    assert (counts.mean(-1) - rate).abs().max() < 0.01
    bright = rate > 1
    assert (counts.var(-1)[bright] / rate[bright] - 1).abs().max() < 0.01
    assert ((counts == 0).double().mean(-1) - torch.exp(-rate)).abs().max() < 1e-3
    assert (counts[:, 0] == 0).all()


def test_sizes_on_the_way_follow_the_resize_factors(monkeypatch):
    """The first factor is relative to the clean picture, the second to the final size."""
    seen = []
    monkeypatch.setattr(degradation, "jpeg", lambda x, quality: seen.append((*x.shape[-2:], quality)) or x)
    recipe = draw_recipe(REAL_ESRGAN, generator(0))
    for before in (True, False):
        seen.clear()
        fixed = replace(
            recipe,
            first=replace(recipe.first, resize=0.37, quality=41.0),
            second=replace(recipe.second, resize=1.17, quality=42.0),
            sinc_before_jpeg=before,
        )
        lr = apply_recipe(photograph(100, 60), fixed, generator(0))
        assert lr.shape[-2:] == (25, 15)
        assert seen == [(37, 22, 41.0), (25, 15, 42.0) if before else (29, 17, 42.0)]


@pytest.mark.parametrize("before", [True, False])
def test_the_end_comes_in_both_orders(before):
    picture = photograph(64, 64)
    quiet = replace(IDLE, second=replace(NOTHING, jpeg_prob=1.0), final_sinc_prob=1.0)
    recipe = replace(draw_recipe(quiet, generator(3)), sinc_before_jpeg=before)
    quality, kernel = recipe.second.quality, recipe.final_kernel
    small = F.interpolate(picture, (16, 16), mode="area")
    sinc_first, jpeg_first = jpeg(filter2d(small, kernel), quality), filter2d(jpeg(small, quality), kernel).clamp(0, 1)
    expected = sinc_first if before else jpeg_first
    assert (sinc_first - jpeg_first).abs().max() > 2 / 255
    assert (apply_recipe(picture, recipe, generator(0)) - expected).abs().max() <= 0.51 / 255


# ---- errors


@pytest.mark.parametrize(
    ("hr", "seed", "scale", "message"),
    [
        (torch.zeros(3, 32, 32), 0, 4, r"\(B, 3, H, W\); got \(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), 0, 4, "Convert grey or RGBA pictures to RGB"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 0, 4, "uint8"),
        (torch.full((1, 3, 32, 32), 128.0), 0, 4, "0..1; found 128..128. Divide 8-bit pixels by 255"),
        (torch.full((1, 3, 32, 32), -0.1), 0, 4, "0..1; found -0.1"),
        (torch.full((1, 3, 32, 32), math.nan), 0, 4, "0..1; found nan"),
        (torch.zeros(1, 3, 3, 64), 0, 4, "3x64 px is too small.*at least 4 px"),
        (torch.zeros(1, 3, 7, 64), 0, 8, "at least 8 px"),
        (torch.zeros(2, 3, 32, 32), [1, 2, 3], 4, "3 seeds for 2 pictures"),
        (torch.zeros(1, 3, 32, 32), 0, 0, "whole number, 1 or more; got 0"),
        (torch.zeros(1, 3, 32, 32), 0, 1.5, "whole number, 1 or more; got 1.5"),
    ],
)
def test_wrong_input_is_refused(hr, seed, scale, message):
    with pytest.raises(ValueError, match=message):
        degrade(hr, SEESR, seed, scale)
