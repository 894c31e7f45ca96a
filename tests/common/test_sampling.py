"""The loop against known answers of diffusers' schedulers; guidance against its formula; noise against its seed."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from fourfold.nodes.common.errors import NonFiniteLatentError
from fourfold.nodes.common.sampling import cpu_generators, cpu_noise, flow_timesteps, guidance_mix, guided, sample
from fourfold.nodes.common.tiling import plan_tiles, tiled

SHAPE = (2, 3, 4, 6)
CLEAN = cpu_noise(100, SHAPE) * 0.5
OOM = torch.cuda.OutOfMemoryError


def flow(steps=6, start_sigma=1.0, shift=3.0):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    flow_timesteps(scheduler, steps, start_sigma)
    return scheduler


# ---- noise


def test_noise_of_a_batch_equals_single_noises_of_the_following_seeds():
    noise = cpu_noise(7, SHAPE)
    assert noise.dtype == torch.float32 and noise.device.type == "cpu"
    assert torch.equal(noise, torch.cat([cpu_noise(7, (1, 3, 4, 6)), cpu_noise(8, (1, 3, 4, 6))]))
    assert torch.equal(noise, cpu_noise(7, SHAPE))
    assert not torch.equal(noise, cpu_noise(9, SHAPE))


def test_the_largest_seed_wraps_and_others_are_refused():
    assert torch.equal(cpu_noise(2**64 - 1, SHAPE)[1], cpu_noise(0, SHAPE)[0])
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed"):
            cpu_noise(seed, SHAPE)


# ---- guidance


def test_guidance_formula():
    cond, uncond = cpu_noise(1, SHAPE), cpu_noise(2, SHAPE)
    torch.testing.assert_close(guidance_mix(cond, uncond, 8.0), uncond + 8.0 * (cond - uncond))
    assert torch.equal(guidance_mix(cond, uncond, 1.0), cond)
    half = guidance_mix(cond.bfloat16(), uncond.bfloat16(), 8.0)
    assert half.dtype == torch.bfloat16
    wide = uncond.bfloat16().float() + 8.0 * (cond.bfloat16().float() - uncond.bfloat16().float())
    torch.testing.assert_close(half, wide.bfloat16())


@dataclass
class Condition:
    tokens: torch.Tensor  # (B, L, C)
    extra: dict


def condition(seed, batch=2, length=4):
    return Condition(cpu_noise(seed, (batch, length, 3)), {"pooled": cpu_noise(seed + 50, (batch, 3)), "size": 512})


class Network:
    """A prediction that depends on the condition row by row, and counts its calls."""

    def __init__(self, limit=10**9):
        self.rows, self.limit = [], limit

    def __call__(self, x, t, condition, boxes):
        self.rows.append(len(x))
        if len(x) > self.limit:
            raise OOM("too much")
        assert len(condition.tokens) == len(condition.extra["pooled"]) == len(x)
        assert boxes is None or len(x) % len(boxes) == 0
        shift = condition.tokens.sum(dim=1) * condition.extra["pooled"]
        return x * 0.5 + torch.tanh(shift)[:, :, None, None]


@pytest.mark.parametrize("batch", [1, 2])
def test_guided_makes_one_batched_call(batch):
    network, positive, negative = Network(), condition(1, batch), condition(2, batch)
    x, t = cpu_noise(3, SHAPE), torch.tensor(1.0)
    out = guided(network, positive, negative, 4.0)(x, t)
    assert network.rows == [4]
    plain = [guided(network, c)(x, t) for c in (positive, negative)]
    assert network.rows == [4, 2, 2]
    torch.testing.assert_close(out, guidance_mix(*plain, 4.0))


def test_guided_without_guidance_makes_one_plain_call():
    x, t = cpu_noise(3, SHAPE), torch.tensor(1.0)
    for negative, scale in ((condition(2), 1.0), (None, 8.0)):
        network = Network()
        guided(network, condition(1), negative, scale)(x, t)
        assert network.rows == [2]


def test_guided_with_prompts_of_different_lengths_makes_two_calls():
    network, x, t = Network(), cpu_noise(3, SHAPE), torch.tensor(1.0)
    out = guided(network, condition(1, length=4), condition(2, length=9), 4.0)(x, t)
    assert network.rows == [2, 2]
    parts = [guided(network, condition(seed, length=n))(x, t) for seed, n in ((1, 4), (2, 9))]
    torch.testing.assert_close(out, guidance_mix(*parts, 4.0))


def test_guided_splits_in_two_calls_when_memory_is_short_and_remembers_it():
    network, x, t = Network(limit=2), cpu_noise(3, SHAPE), torch.tensor(1.0)
    denoise = guided(network, condition(1), condition(2), 4.0)
    out = denoise(x, t)
    assert network.rows == [4, 2, 2]
    assert torch.equal(denoise(x, t), out)
    assert network.rows == [4, 2, 2, 2, 2]
    torch.testing.assert_close(out, guided(Network(), condition(1), condition(2), 4.0)(x, t))


def test_guided_composes_with_tiled_and_out_of_memory():
    """Spatial conditions are cropped to the boxes; rows stay in the same order with and without guidance."""
    x, t = cpu_noise(3, (2, 3, 10, 22)), torch.tensor(1.0)
    lr = cpu_noise(4, (2, 3, 10, 22))
    seen = []

    def predict(x, t, condition, boxes):
        seen.append((len(x), len(boxes)))
        if len(x) > 4:
            raise OOM("too much")
        local = torch.cat([box.crop(lr) for box in boxes])
        return Network()(x, t, condition, boxes) + local * condition.tokens[:, 0, :, None, None]

    plan = plan_tiles(10, 22, 10, 4)
    out = tiled(guided(predict, condition(1), condition(2), 3.0), plan, tile_batch=4)(x, t)
    assert seen[0] == (12, 6) and max(rows for rows, _ in seen[-2:]) <= 4

    def untiled(c):
        return Network()(x, t, c, None) + lr * c.tokens[:, 0, :, None, None]

    torch.testing.assert_close(out, guidance_mix(untiled(condition(1)), untiled(condition(2)), 3.0))


def test_conditions_that_do_not_fit_the_rows_are_named():
    with pytest.raises(ValueError, match="3 samples does not fit 2"):
        guided(Network(), condition(1, batch=3))(cpu_noise(3, SHAPE), torch.tensor(1.0))


# ---- flow_timesteps


def test_a_start_from_noise_is_the_published_schedule():
    ours, theirs = FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    timesteps = flow_timesteps(ours, 40)
    theirs.set_timesteps(40)
    assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(timesteps, theirs.timesteps)


@pytest.mark.parametrize("start_sigma", [0.999, 0.5, 0.05])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_start_below_one_begins_exactly_there_and_ends_as_published(shift, start_sigma):
    scheduler, published = flow(8, start_sigma, shift), flow(8, 1.0, shift)
    assert len(scheduler.timesteps) == 8
    torch.testing.assert_close(scheduler.sigmas[0].item(), start_sigma, rtol=1e-6, atol=0)
    torch.testing.assert_close(scheduler.timesteps, scheduler.sigmas[:-1] * 1000)
    assert scheduler.sigmas[-1] == 0 and (scheduler.sigmas.diff() < 0).all()
    torch.testing.assert_close(scheduler.sigmas[-2], published.sigmas[-2], rtol=1e-5, atol=0)


def test_dynamic_shifting_starts_exactly_too():
    for kind in ("exponential", "linear"):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
        flow_timesteps(scheduler, 5, 0.4, mu=0.8)
        torch.testing.assert_close(scheduler.sigmas[0].item(), 0.4, rtol=1e-6, atol=0)
        with pytest.raises(ValueError, match="mu"):
            flow_timesteps(scheduler, 5, 0.4)


def test_impossible_starts_are_refused():
    for steps, start in ((0, 1.0), (5, 0.0), (5, 1.1), (5, 0.001)):
        with pytest.raises(ValueError, match=r"steps|start_sigma"):
            flow(steps, start)
    with pytest.raises(ValueError, match="shift_terminal"):
        flow_timesteps(FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), 5, 0.5)


# ---- sample


@pytest.mark.parametrize("start_sigma", [1.0, 0.5])
def test_flow_matching_with_the_true_velocity_reaches_the_clean_latent(start_sigma):
    noise = cpu_noise(5, SHAPE)
    scheduler, seen = flow(6, start_sigma), []

    def on_step(i, n, x, x0):
        seen.append((i, n))
        torch.testing.assert_close(x0, CLEAN, rtol=0, atol=1e-5)
        sigma = scheduler.sigmas[i + 1]
        torch.testing.assert_close(x, (1 - sigma) * CLEAN + sigma * noise, rtol=0, atol=1e-5)

    start = (1 - start_sigma) * CLEAN + start_sigma * noise
    out = sample(lambda x, t: noise - CLEAN, start, scheduler, on_step=on_step)
    torch.testing.assert_close(out, CLEAN, rtol=0, atol=1e-5)
    assert seen == [(i, 6) for i in range(6)]


def true_noise(scheduler):
    """The noise that x at the scheduler's noise level holds when the clean latent is CLEAN."""

    def model(x, t):  # x comes through scale_model_input: x = sqrt(a) z + sqrt(1-a) eps for all of these schedulers
        a = scheduler.alphas_cumprod[t.long()]
        return (x - a.sqrt() * CLEAN) / (1 - a).sqrt()

    return model


DIFFUSION = {
    "ddim": DDIMScheduler(clip_sample=False),
    "ddpm": DDPMScheduler(clip_sample=False),
    "euler": EulerDiscreteScheduler(timestep_spacing="trailing"),
    "euler_a": EulerAncestralDiscreteScheduler(timestep_spacing="trailing"),
    "dpm": DPMSolverMultistepScheduler(),
    "lcm": LCMScheduler(clip_sample=False, original_inference_steps=50),
}


@pytest.mark.parametrize("name", DIFFUSION)
def test_diffusion_schedulers_with_the_true_noise_reach_the_clean_latent(name):
    scheduler = DIFFUSION[name]
    scheduler.set_timesteps(8)
    x0s = []
    x = cpu_noise(5, SHAPE) * scheduler.init_noise_sigma
    out = sample(
        true_noise(scheduler),
        x,
        scheduler,
        on_step=lambda i, n, x, x0: x0s.append(x0),
        generator=cpu_generators(5, 2),
    )
    assert len(x0s) == len(scheduler.timesteps)
    for x0 in x0s if name != "lcm" else x0s[-1:]:
        torch.testing.assert_close(x0, CLEAN, rtol=0, atol=2e-2)
    torch.testing.assert_close(out, CLEAN, rtol=0, atol=5e-2)


def test_v_and_clean_predictions_give_the_same_x0():
    for kind in ("v_prediction", "sample"):
        scheduler = DPMSolverMultistepScheduler(prediction_type=kind)
        scheduler.set_timesteps(5)
        epsilon = true_noise(scheduler)

        def model(x, t, scheduler=scheduler, kind=kind, epsilon=epsilon):
            a = scheduler.alphas_cumprod[t.long()]
            return CLEAN if kind == "sample" else a.sqrt() * epsilon(x, t) - (1 - a).sqrt() * CLEAN

        x0s = []
        sample(model, cpu_noise(5, SHAPE), scheduler, on_step=lambda i, n, x, x0, x0s=x0s: x0s.append(x0))
        torch.testing.assert_close(x0s[0], CLEAN, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["ddpm", "euler_a"])
def test_stochastic_schedulers_follow_their_generators_and_batches_equal_singles(name):
    def run(seed, x):
        scheduler = DIFFUSION[name]
        scheduler.set_timesteps(4)
        x = x * scheduler.init_noise_sigma
        return sample(lambda x, t: x * 0.3, x, scheduler, generator=cpu_generators(seed, len(x)))

    x = cpu_noise(5, SHAPE)
    both = run(5, x)
    assert torch.equal(both, run(5, x))
    assert not torch.allclose(both, run(6, x), atol=1e-2)
    torch.testing.assert_close(both, torch.cat([run(5, x[:1]), run(6, x[1:])]), rtol=1e-5, atol=1e-5)


def test_the_model_gets_a_scalar_time_and_half_precision_predictions_do_not_degrade_the_latent():
    velocity = cpu_noise(6, SHAPE).bfloat16()

    def model(x, t):
        assert t.shape == () and t.device == x.device and x.dtype == torch.float32
        return velocity

    out = sample(model, cpu_noise(5, SHAPE), flow(3))
    assert torch.equal(out, sample(lambda x, t: velocity.float(), cpu_noise(5, SHAPE), flow(3)))


def test_timesteps_that_occur_twice_are_all_run():
    noise, scheduler = cpu_noise(5, SHAPE), FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[1.0, 1.0, 0.5])
    out = sample(lambda x, t: noise - CLEAN, noise, scheduler)
    torch.testing.assert_close(out, CLEAN, rtol=0, atol=1e-5)


def test_a_part_of_the_timesteps_continues_where_another_part_stopped():
    def model(x, t):
        return torch.tanh(x) * (t / 1000)

    x = cpu_noise(5, SHAPE)
    full = sample(model, x, flow(6))
    scheduler = flow(6)
    first = sample(model, x, scheduler, scheduler.timesteps[:2])
    scheduler = flow(6)
    assert torch.equal(sample(model, first, scheduler, scheduler.timesteps[2:]), full)
    with pytest.raises(ValueError, match="consecutive"):
        sample(model, x, flow(6), torch.tensor([900.0, 1.0]))


def test_unprepared_schedulers_are_refused():
    with pytest.raises(ValueError, match="no schedule"):
        sample(lambda x, t: x, cpu_noise(5, SHAPE), FlowMatchEulerDiscreteScheduler())
    scheduler = flow(3)
    sample(lambda x, t: x, cpu_noise(5, SHAPE), scheduler)
    with pytest.raises(ValueError, match="stepped before"):
        sample(lambda x, t: x, cpu_noise(5, SHAPE), scheduler)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_prediction_that_is_not_finite_names_the_step(value):
    scheduler = flow(4)

    def model(x, t):
        out = x.clone()
        if t == scheduler.timesteps[2]:
            out[1, 0, 0, 0] = value
        return out

    steps = []
    with pytest.raises(NonFiniteLatentError, match=r"step 3 of 4 .*network's prediction"):
        sample(model, cpu_noise(5, SHAPE), scheduler, on_step=lambda i, *rest: steps.append(i))
    assert steps == [0, 1]


def test_a_start_that_is_not_finite_is_told_apart():
    with pytest.raises(NonFiniteLatentError, match=r"step 1 of 4 .*started from"):
        sample(lambda x, t: x, torch.full(SHAPE, float("nan")), flow(4))


def test_on_step_may_stop_the_loop():
    calls = []

    def stop(i, n, x, x0):
        if i == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sample(lambda x, t: calls.append(1) or x, cpu_noise(5, SHAPE), flow(5), on_step=stop)
    assert len(calls) == 2


def test_no_gradients_are_kept():
    weight = torch.ones((), requires_grad=True)
    assert not sample(lambda x, t: x * weight, cpu_noise(5, SHAPE), flow(2)).requires_grad
