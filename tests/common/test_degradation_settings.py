"""The presets' published numbers, the recipes drawn from them, and settings that make no sense."""

import math
from dataclasses import replace

import pytest
import torch
from fourfold.nodes.common import degradation
from fourfold.nodes.common.degradation import LIGHT, REAL_ESRGAN, SEESR, draw_recipe


def recipes(settings, count=600):
    return [draw_recipe(settings, torch.Generator().manual_seed(seed)) for seed in range(count)]


# ---- the published numbers


def test_real_esrgan_has_the_published_numbers():
    first, second = REAL_ESRGAN.first, REAL_ESRGAN.second
    for stage in (first, second):
        assert stage.kernel_probs == (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
        assert stage.kernel_size == (7, 21) and stage.sinc_prob == 0.1
        assert stage.generalized_beta == (0.5, 4) and stage.plateau_beta == (1, 2)
        assert (stage.sinc_cutoff_small, stage.sinc_cutoff_large) == (math.pi / 3, math.pi / 5)
        assert stage.sinc_small_size == 13
        assert (stage.noise_prob, stage.gaussian_prob, stage.grey_noise_prob) == (1, 0.5, 0.4)
        assert (stage.jpeg_prob, stage.jpeg_quality) == (1, (30, 95))
    assert (first.blur_prob, first.blur_sigma) == (1, (0.2, 3))
    assert (first.resize_probs, first.resize_range) == ((0.2, 0.7, 0.1), (0.15, 1.5))
    assert (first.gaussian_sigma, first.poisson_scale) == ((1, 30), (0.05, 3))
    assert (second.blur_prob, second.blur_sigma) == (0.8, (0.2, 1.5))
    assert (second.resize_probs, second.resize_range) == ((0.3, 0.4, 0.3), (0.3, 1.2))
    assert (second.gaussian_sigma, second.poisson_scale) == ((1, 25), (0.05, 2.5))
    assert (REAL_ESRGAN.final_sinc_prob, REAL_ESRGAN.final_sinc_cutoff) == (0.8, math.pi / 3)
    assert REAL_ESRGAN.sinc_before_jpeg_prob == 0.5 and not REAL_ESRGAN.antialias
    assert REAL_ESRGAN.resize_modes == ("area", "bilinear", "bicubic")


def test_seesr_differs_from_real_esrgan_in_the_published_numbers_only():
    first = dict(resize_range=(0.3, 1.5), gaussian_sigma=(1, 15), poisson_scale=(0.05, 2), jpeg_quality=(60, 95))
    second = dict(
        blur_prob=0.5,
        resize_range=(0.6, 1.2),
        gaussian_sigma=(1, 12),
        poisson_scale=(0.05, 1),
        jpeg_quality=(60, 100),
    )
    assert SEESR.first == replace(REAL_ESRGAN.first, **first)
    assert SEESR.second == replace(REAL_ESRGAN.second, **second)
    assert replace(REAL_ESRGAN, first=SEESR.first, second=SEESR.second) == SEESR


# ---- the recipe


def test_recipes_are_drawn_with_the_stated_probabilities_and_ranges():
    drawn = recipes(REAL_ESRGAN)
    share = lambda hits: sum(hits) / len(drawn)  # noqa: E731
    for stages, settings in (
        ([r.first for r in drawn], REAL_ESRGAN.first),
        ([r.second for r in drawn], REAL_ESRGAN.second),
    ):
        assert share(s.kernel is not None for s in stages) == pytest.approx(settings.blur_prob, abs=0.06)
        up, down, keep = settings.resize_probs
        assert share(s.resize > 1 for s in stages) == pytest.approx(up, abs=0.06)
        assert share(s.resize < 1 for s in stages) == pytest.approx(down, abs=0.06)
        assert share(s.resize == 1 for s in stages) == pytest.approx(keep, abs=0.06)
        assert share(s.noise == "gaussian" for s in stages) == pytest.approx(0.5, abs=0.06)
        assert share(s.grey_noise for s in stages) == pytest.approx(0.4, abs=0.06)
        for mode in REAL_ESRGAN.resize_modes:
            assert share(s.mode == mode for s in stages) == pytest.approx(1 / 3, abs=0.06)
        for values, (low, high) in (
            ([s.resize for s in stages], settings.resize_range),
            ([s.strength for s in stages if s.noise == "gaussian"], settings.gaussian_sigma),
            ([s.strength for s in stages if s.noise == "poisson"], settings.poisson_scale),
            ([s.quality for s in stages], settings.jpeg_quality),
        ):
            reach = 0.05 * (high - low)
            assert low <= min(values) < low + reach and high - reach < max(values) <= high
    assert share(r.final_kernel is not None for r in drawn) == pytest.approx(0.8, abs=0.06)
    assert share(r.sinc_before_jpeg for r in drawn) == pytest.approx(0.5, abs=0.06)


def test_kernels_of_a_recipe_are_the_stated_mixture():
    kernels = [r.first.kernel for r in recipes(REAL_ESRGAN)]
    assert all(k.sum().item() == pytest.approx(1, abs=1e-4) for k in kernels)
    assert max(k.shape[-1] for k in kernels) == 21 and all(k.shape[-1] % 2 == 1 for k in kernels)
    sinc = [k for k in kernels if k.min() < 0]
    assert len(sinc) / len(kernels) == pytest.approx(0.1, abs=0.04)
    symmetric = [k for k in kernels if k.min() >= 0 and torch.allclose(k, k.flip(0), atol=1e-6)]
    # iso kinds are 0.45 + 0.12 + 0.12 of the bells; an aniso kernel that is trimmed to 1 px looks symmetric too
    assert len(symmetric) / (len(kernels) - len(sinc)) == pytest.approx(0.70, abs=0.07)
    final = [r.final_kernel for r in recipes(REAL_ESRGAN) if r.final_kernel is not None]
    assert {k.shape[-1] for k in final} == set(range(7, 22, 2))


@pytest.mark.parametrize("index", range(6))
def test_every_kernel_kind_can_be_asked_for(index, monkeypatch):
    seen = []
    real = degradation.bell_kernel
    monkeypatch.setattr(degradation, "bell_kernel", lambda kind, *rest: seen.append((kind, *rest)) or real(kind, *rest))
    probabilities = tuple(float(i == index) for i in range(6))
    stage = replace(REAL_ESRGAN.first, kernel_probs=probabilities, sinc_prob=0.0)
    recipes(replace(REAL_ESRGAN, first=stage, second=LIGHT.second), count=150)
    kinds = {entry[0] for entry in seen}
    assert kinds == {degradation.KERNEL_KINDS[index]}
    betas = [entry[-1] for entry in seen]
    low, high = (1, 2) if "plateau" in degradation.KERNEL_KINDS[index] else (0.5, 4)
    assert low <= min(betas) and max(betas) <= high
    assert sum(beta <= 1 for beta in betas) / len(betas) == pytest.approx(0.5, abs=0.12)
    assert all(0.2 <= entry[2] <= 3 and 0.2 <= entry[3] <= 3 for entry in seen)


# ---- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(blur_prob=1.5), "blur_prob is a probability.*1.5"),
        (dict(kernel_probs=(0.5, 0.5)), "kernel_probs must be 6"),
        (dict(resize_probs=(0.5, 0.4, 0.3)), "resize_probs must be 3 probabilities that sum to 1"),
        (dict(resize_range=(1.1, 1.5)), "resize_range must reach from at most 1"),
        (dict(blur_sigma=(3.0, 0.2)), "blur_sigma must be"),
        (dict(blur_sigma=(0.0, 0.2)), "blur_sigma must be"),
        (dict(jpeg_quality=(30, 101)), r"jpeg_quality must be \(low, high\) within 1..100"),
        (dict(kernel_size=(6, 20)), "two odd numbers"),
        (dict(sinc_cutoff_large=4.0), r"sinc_cutoff_large must be in \(0, pi\]"),
    ],
)
def test_impossible_stage_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(REAL_ESRGAN.first, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(final_sinc_prob=-0.1), "final_sinc_prob is a probability"),
        (dict(resize_modes=("nearest",)), "resize_modes must be some of area"),
        (dict(resize_modes=()), "resize_modes must be some of area"),
        (dict(final_sinc_cutoff=0.0), "final_sinc_cutoff must be"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(REAL_ESRGAN, **change)
