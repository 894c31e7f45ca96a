"""Schedulers by name against diffusers' own numbers, and the noise levels that go with their steps."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from fourfold.nodes.common.schedulers import SCHEDULERS, NoiseSchedule, make_scheduler, noise_levels


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_predicts_noise_on_the_same_schedule(name):
    scheduler = make_scheduler(name, 7)
    assert len(scheduler.timesteps) == 7 and scheduler.config.prediction_type == "epsilon"
    alpha, sigma = noise_levels(scheduler)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(7))
    assert (alpha.diff() > 0).all() and 0 < sigma[-1] < sigma[0] < 1
    expected = NoiseSchedule().alpha_sigma(scheduler.timesteps)
    torch.testing.assert_close(alpha, expected[0], rtol=0.02 if "karras" in name else 1e-4, atol=1e-4)


def test_ddim_steps_as_published():
    """Leading spacing with an offset of 1; no clipping, and the last step does not end on a noiseless level."""
    scheduler = make_scheduler("ddim", 5)
    assert scheduler.timesteps.tolist() == [801, 601, 401, 201, 1]
    assert not scheduler.config.clip_sample and scheduler.final_alpha_cumprod < 1
    assert not make_scheduler("ddpm", 5).config.clip_sample


def test_trailing_steps_go_from_pure_noise_to_the_clean_latent():
    scheduler = make_scheduler("ddim trailing", 4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert scheduler.final_alpha_cumprod == 1 and not scheduler.config.clip_sample
    z, noise = torch.randn(2, 1, 4, 4, 4)
    one = make_scheduler("ddim trailing", 1)
    x = one.add_noise(z, noise, one.timesteps)
    torch.testing.assert_close(one.step(noise, one.timesteps[0], x).prev_sample, z, rtol=1e-3, atol=1e-3)


def test_a_perfect_prediction_is_walked_back_to_the_picture():
    """With the true noise as the prediction every scheduler of them that adds none ends near the clean latent."""
    z, noise = torch.randn(2, 1, 4, 4, 4)
    for name in ("ddim", "euler", "dpm++ 2m", "dpm++ 2m karras"):
        scheduler = make_scheduler(name, 10)
        levels = zip(*noise_levels(scheduler), strict=True)
        x = scheduler.add_noise(z, noise, scheduler.timesteps[:1])
        for t, (alpha, sigma) in zip(scheduler.timesteps, levels, strict=True):
            seen = scheduler.scale_model_input(x, t)
            torch.testing.assert_close(seen, alpha * z + sigma * noise, rtol=1e-3, atol=1e-3)
            x = scheduler.step(noise, t, x).prev_sample
        assert (x - z).abs().max() < 0.15, name


def test_the_noise_schedule_is_diffusers():
    schedule = NoiseSchedule(0.001, 0.02, 500)
    theirs = DDIMScheduler(500, 0.001, 0.02, beta_schedule="scaled_linear").alphas_cumprod
    alpha, sigma = schedule.alpha_sigma(torch.arange(500))
    torch.testing.assert_close(alpha**2, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sigma**2, 1 - theirs, rtol=1e-4, atol=1e-6)
    assert len(schedule) == 500 and alpha.dtype == torch.float32
    below, above = schedule.alpha_sigma(torch.tensor([-3.0, 700.0]))[0]
    assert (below, above) == (alpha[0], alpha[-1]), "timesteps beyond the schedule are its ends"


def test_between_timesteps_as_euler_interpolates():
    scheduler = EulerDiscreteScheduler(1000, 0.00085, 0.012, "scaled_linear", timestep_spacing="linspace")
    scheduler.set_timesteps(7)
    assert (scheduler.timesteps % 1 != 0).any()
    alpha, _ = NoiseSchedule().alpha_sigma(scheduler.timesteps)
    torch.testing.assert_close(alpha, noise_levels(scheduler)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "steps", "words"), [
    ("heun", 5, "choose one of ddim"), ("ddim", 0, "steps is 0"), ("euler", 1001, "steps is 1001")])
def test_errors(name, steps, words):
    with pytest.raises(ValueError, match=words):
        make_scheduler(name, steps)


def test_other_predictions_are_refused():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="velocities of a flow"):
        noise_levels(scheduler)
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="expects v_prediction"):
        noise_levels(scheduler)
