"""Objectives of InstantIR's trainings."""

import pytest
import torch
from fourfold.nodes.common.schedulers import NoiseSchedule
from fourfold.nodes.instantir.losses import (
    diffusion_loss,
    distilled_timesteps,
    drop_conditions,
    guided_step,
    pseudo_huber,
)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=draws(seed))


def test_conditions_are_dropped_disjointly_in_the_asked_shares():
    image, text = drop_conditions(40_000, draws(), image=0.05, text=0.1, both=0.15)
    shares = [(image & ~text), (text & ~image), (image & text)]
    assert [share.float().mean().item() for share in shares] == pytest.approx([0.05, 0.1, 0.15], abs=0.006)
    image, text = drop_conditions(40_000, draws(1))
    assert (image | text).float().mean().item() == pytest.approx(0.15, abs=0.006), "the paper's 15%"


def test_shares_that_cannot_be_are_refused():
    for shares in ((-0.1, 0, 0), (0.5, 0.4, 0.2)):
        with pytest.raises(ValueError, match="none may be negative, their sum at most 1"):
            drop_conditions(2, draws(), *shares)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("weight", ["none", "x0"])
def test_diffusion_loss_by_hand(prediction, weight):
    x0, noise, output = (normal(3, 2, 4, 4, seed=seed) for seed in range(3))
    alpha, sigma = NoiseSchedule().alpha_sigma(torch.tensor([20, 500, 999]))
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    x = a * x0 + s * noise
    clean = {"epsilon": (x - s * output) / a, "v": a * x - s * output, "sample": output}[prediction]
    told = {"epsilon": noise, "v": a * noise - s * x0, "sample": x0}[prediction]
    error = output - told if weight == "none" else clean - x0
    loss = diffusion_loss(output, x0, noise, alpha, sigma, prediction, weight, l1=0.5)
    torch.testing.assert_close(loss, error.square().mean() + 0.5 * error.abs().mean(), rtol=1e-4, atol=1e-5)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="expected equal shapes"):
        diffusion_loss(normal(1, 2, 4, 4), normal(1, 2, 4, 2), normal(1, 2, 4, 2), *[torch.ones(1)] * 2)


def test_timesteps_of_the_distillation():
    s, t = distilled_timesteps(4000, draws())
    assert set(s.tolist()) == set(range(19, 1000, 20)) and torch.equal(t, (s - 20).clamp(min=0))
    assert t.min() == 0


def test_guided_step_is_ddims():
    """With guidance on clean latent and noise alike it is diffusers' DDIM step from the guided noise."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(50)
    schedule, x = NoiseSchedule(), normal(2, 4, 8, 8)
    s = torch.full((2,), 819)
    at_s, at_t = schedule.alpha_sigma(s), schedule.alpha_sigma(s - 20)
    eps, eps_null = normal(2, 4, 8, 8, seed=1), normal(2, 4, 8, 8, seed=2)
    clean = [(x - at_s[1][0] * e) / at_s[0][0] for e in (eps, eps_null)]
    stepped = guided_step(x, *clean, torch.tensor([0.0, 7.0]), at_s, at_t)
    for row, w in enumerate((0.0, 7.0)):
        expected = scheduler.step(eps[row] + w * (eps[row] - eps_null[row]), 819, x[row]).prev_sample
        torch.testing.assert_close(stepped[row], expected, rtol=1e-4, atol=1e-4)


def test_pseudo_huber_is_square_near_zero_and_absolute_far_away():
    zero = torch.zeros(1)
    assert pseudo_huber(zero, zero) == 0
    assert pseudo_huber(zero + 1e-5, zero).item() == pytest.approx(1e-10 / 2e-3, rel=1e-2)
    assert pseudo_huber(zero + 3, zero).item() == pytest.approx(3 - 0.001, rel=1e-5)
