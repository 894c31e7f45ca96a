"""Degradation removal and texture generation on latents: the paper's steps, local prompts, no seams."""

from itertools import pairwise

import pytest
import torch
from fourfold.nodes.common.errors import NonFiniteLatentError
from fourfold.nodes.common.flux import resolution_shift
from fourfold.nodes.common.sampling import cpu_noise
from fourfold.nodes.common.text import TextEmbedding
from fourfold.nodes.common.tiling import tiled
from fourfold.nodes.dreamsr.patches import PatchText, plan_patches
from fourfold.nodes.dreamsr.sampling import generate_texture, remove_degradation, sample, texture_times, velocity


@pytest.fixture
def calls(network):
    """A small network that notes every forward: its arguments and whether the LoRA was on."""
    model, seen = network(), []
    model.register_forward_pre_hook(
        lambda _, arguments, options: seen.append((*arguments, options["lora"])), with_kwargs=True)
    return model, seen


@pytest.fixture
def case(texts, latents):
    """`case(batch, height, width, tile, overlap)`: LR latent, noise, global prompts, a local prompt for each patch."""

    def make(batch=2, height=8, width=8, tile=8, overlap=2):
        _, z_lq = latents(batch, height, width)
        plan = plan_patches(height, width, tile, overlap)
        local = PatchText.of([texts(batch, 9, 20 + i) for i in range(len(plan))], plan)
        return z_lq, cpu_noise(3, z_lq.shape), texts(batch, 5, 1), local

    return make


def with_prompt(local, number, text):
    """The prompts with that of one patch replaced."""
    index = tuple((len(local.texts),) * len(row) if i == number else row for i, row in enumerate(local.index))
    return PatchText(local.plan, (*local.texts, text), index)


# 1 + 16 steps -----------------------------------------------------------------------------------------------------

def test_removal_and_sixteen_euler_steps_by_hand(network, case, relative_error):
    """z_dr = z_lq - t_dr v;  z_t = (1 - 0.8) z_dr + 0.8 noise;  16 even steps from 0.8 to 0 (section 3.2)."""
    model, (z_lq, noise, prompt, local) = network(t_dr=0.9), case()
    patch = TextEmbedding(*(torch.cat([getattr(t, n) for t in local.texts]) for n in ("prompt_embeds", "pooled")))
    z_dr = z_lq - 0.9 * model(z_lq, z_lq, 0.9, prompt, patch, 2.0, lora=True)
    x = 0.2 * z_dr + 0.8 * noise
    times = [0.8 * (1 - i / 16) for i in range(17)]
    for now, then in pairwise(times):
        x = x + (then - now) * model(x, z_dr, now, prompt, patch, 2.0)
    torch.testing.assert_close(remove_degradation(model, z_lq, prompt, local, guidance=2.0), z_dr)
    assert relative_error(sample(model, z_lq, noise, prompt, local, guidance=2.0), x) < 1e-3


def test_evaluations_are_one_with_the_lora_and_sixteen_without_conditioned_on_its_result(calls, case):
    model, seen = calls
    z_lq, noise, prompt, local = case()
    z_dr = remove_degradation(model, z_lq, prompt, local)
    del seen[:]
    sample(model, z_lq, noise, prompt, local)
    assert [call[-1] for call in seen] == [True] + 16 * [False]
    assert torch.equal(seen[0][0], z_lq) and torch.equal(seen[0][1], z_lq) and float(seen[0][2]) == 1.0
    torch.testing.assert_close(seen[1][0], 0.2 * z_dr + 0.8 * noise)
    assert all(torch.equal(call[1], z_dr) for call in seen[1:])
    assert [float(call[2]) for call in seen[1:]] == pytest.approx([0.8 - 0.05 * i for i in range(16)], abs=1e-6)
    assert all(call[5] == 3.5 for call in seen), "one evaluation a step, told the guidance of 3.5"


def test_without_removal_the_lr_latent_itself_is_textured(calls, case):
    model, seen = calls
    z_lq, noise, prompt, local = case()
    z = sample(model, z_lq, noise, prompt, local, steps=3, start=0.5, removal=False)
    assert len(seen) == 3 and not any(call[-1] for call in seen) and torch.equal(seen[0][1], z_lq)
    torch.testing.assert_close(seen[0][0], 0.5 * z_lq + 0.5 * noise)
    assert torch.equal(z, generate_texture(model, z_lq, noise, prompt, local, steps=3, start=0.5))


def test_equal_arguments_give_equal_latents(network, case):
    runs = [sample(network(), *case(), steps=3) for _ in range(2)]
    assert torch.equal(*runs) and runs[0].dtype == torch.float32
    z_lq, noise, prompt, local = case()
    assert not torch.equal(sample(network(), z_lq, -noise, prompt, local, steps=3), runs[0])


@pytest.mark.parametrize("start", [0.8, 1.0])
def test_flux_spacing_bends_the_steps_and_keeps_the_first(calls, case, start):
    model, seen = calls
    z_lq, noise, prompt, local = case()
    generate_texture(model, z_lq, noise, prompt, local, steps=4, start=start, spacing="flux")
    k = resolution_shift(16)
    first = start / (k - (k - 1) * start)
    bent = [k * s / (1 + (k - 1) * s) for s in (first * (1 - i / 4) for i in range(4))]
    times = [float(call[2]) for call in seen]
    assert times == pytest.approx(bent, abs=1e-6) and times[0] == pytest.approx(start)
    assert times[1] > start * 0.75, "more of the steps at high noise"


def test_times_out_of_range_are_refused():
    for arguments, text in (((0, 0.8, "uniform"), "steps is 0"), ((4, 0.0, "uniform"), "start is 0"),
                            ((4, 1.1, "uniform"), "start is 1.1"), ((4, 0.8, "even"), "spacing is 'even'")):
        with pytest.raises(ValueError, match=text):
            texture_times(*arguments, 1024)


def test_classifier_free_guidance_by_hand(network, case, texts, relative_error):
    model, (z, noise, prompt, local) = network(), case(1)
    low = texts(1, 5, 9)
    x = 0.2 * z + 0.8 * noise
    patch = local.texts[0]
    cond, uncond = model(x, z, 0.8, prompt, patch), model(x, z, 0.8, low, low)
    ours = generate_texture(model, z, noise, prompt, local, low, steps=1, cfg=3.0)
    assert relative_error(ours, x - 0.8 * (uncond + 3 * (cond - uncond))) < 1e-4
    plain = generate_texture(model, z, noise, prompt, local, steps=1)
    assert torch.equal(generate_texture(model, z, noise, prompt, local, low, steps=1, cfg=1.0), plain)


def test_several_global_prompts_are_averaged_with_their_shares(network, case, texts):
    model, (z, noise, prompt, local) = network(), case()
    other = texts(1, 5, 9)
    a, b = (generate_texture(model, z, noise, p, local, steps=1) for p in (prompt, other))
    both = generate_texture(model, z, noise, [(prompt, 0.25), (other, 0.75)], local, steps=1)
    torch.testing.assert_close(both, 0.25 * a + 0.75 * b, atol=1e-4, rtol=1e-4)


def test_progress_counts_the_removal_and_may_stop(network, case):
    seen, windows = [], []

    def on_step(i, n, x, x0):
        seen.append((i, n, torch.equal(x, x0)))
        if i == 2:
            raise KeyboardInterrupt

    z_lq, noise, prompt, local = case(2, 8, 20)
    with pytest.raises(KeyboardInterrupt):
        sample(network(), z_lq, noise, prompt, local, steps=4, tile_batch=2, on_step=on_step,
               on_window=lambda done, total: windows.append((done, total)))
    assert seen == [(0, 5, True), (1, 5, False), (2, 5, False)] and windows == [(2, 3), (3, 3)] * 3
    seen.clear()
    generate_texture(network(), z_lq, noise, prompt, local, steps=2, on_step=on_step)
    assert [step[:2] for step in seen] == [(0, 2), (1, 2)]


def test_weights_that_are_not_numbers_give_an_error_that_names_the_step(network, case):
    model, (z_lq, noise, prompt, local) = network(), case()
    model.base.proj_out.bias[0] = float("nan")
    with pytest.raises(NonFiniteLatentError, match="after the degradation removal"):
        sample(model, z_lq, noise, prompt, local)
    with pytest.raises(NonFiniteLatentError, match=r"after step 1 of 3.*the network's prediction"):
        sample(model, z_lq, noise, prompt, local, steps=3, removal=False)


def test_shapes_and_prompts_that_do_not_fit_are_refused(network, case, texts):
    model, (z_lq, noise, prompt, local) = network(), case(2, 8, 14)
    with pytest.raises(ValueError, match=r"noise is \(2, 4, 8, 8\), the LR latent \(2, 4, 8, 14\)"):
        sample(model, z_lq, noise[..., :8], prompt, local)
    with pytest.raises(ValueError, match="plan covers a latent of 8x14, but the latent is"):
        sample(model, z_lq[..., :8], noise[..., :8], prompt, local)
    with pytest.raises(ValueError, match="3 global prompts for 2 pictures"):
        sample(model, z_lq, noise, texts(3), local)


# patches ----------------------------------------------------------------------------------------------------------

def test_every_patch_sees_its_part_of_the_latents_and_its_own_prompt(calls, case):
    model, seen = calls
    z_lq, _, prompt, local = case(2, 8, 20)
    remove_degradation(model, z_lq, prompt, local, tile_batch=2)
    assert [len(call[0]) for call in seen] == [4, 2]
    crops = torch.cat([z_lq[..., left : left + 8] for left in (0, 6, 12)])
    assert torch.equal(torch.cat([call[0] for call in seen]), crops)
    assert torch.equal(torch.cat([call[1] for call in seen]), crops)
    prompts = torch.cat([call[3].prompt_embeds for call in seen])
    assert torch.equal(prompts, prompt.prompt_embeds.repeat(3, 1, 1))
    locals_ = torch.cat([call[4].pooled for call in seen])
    assert torch.equal(locals_, torch.cat([text.pooled for text in local.texts]))


def test_positions_are_those_of_one_patch_wherever_it_lies(network, texts):
    """Equal patches with equal prompts have equal velocities: nothing tells a patch where it is."""
    plan = plan_patches(8, 32, 8, 0)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 1, 4)
    denoise = velocity(network(), z, texts(1), PatchText.of([texts(1, 9, 4)], plan))
    v = tiled(denoise, plan, 4)(z, torch.tensor(0.5))
    torch.testing.assert_close(v, v[..., :8].repeat(1, 1, 1, 4), atol=1e-5, rtol=1e-5)


def test_patches_in_one_call_equal_patches_one_by_one(network, case):
    runs = [sample(network(), *case(2, 14, 20), steps=2, tile_batch=size) for size in (1, 6)]
    torch.testing.assert_close(*runs, atol=1e-3, rtol=1e-3)


def test_batch_of_two_equals_two_singles(network, case):
    z_lq, noise, prompt, local = case(2, 8, 14)
    both = sample(network(), z_lq, noise, prompt, local, steps=3)
    for row in range(2):
        one = slice(row, row + 1)
        own = PatchText(local.plan, local.texts, tuple(places[one] for places in local.index))
        text = TextEmbedding(prompt.prompt_embeds[one], prompt.pooled[one])
        single = sample(network(), z_lq[one], noise[one], text, own, steps=3)
        torch.testing.assert_close(both[one], single, atol=1e-3, rtol=1e-3)


def test_prompts_of_different_lengths_run_side_by_side(network, case, texts):
    z_lq, noise, prompt, _ = case(2, 8, 20)
    plan = plan_patches(8, 20, 8, 2)
    local = PatchText.of([texts(2, n, n) for n in (5, 9, 5)], plan)
    runs = [sample(network(), z_lq, noise, prompt, local, steps=2, tile_batch=size) for size in (1, 3)]
    torch.testing.assert_close(*runs, atol=1e-3, rtol=1e-3)


# prompts act locally ----------------------------------------------------------------------------------------------

@pytest.fixture
def large(case):
    """A picture of 4 x 5 patches."""
    return case(1, 26, 32)


@pytest.mark.parametrize("number", [0, 7, 19])
def test_a_patchs_prompt_acts_in_its_patch_and_nowhere_else(network, large, texts, number):
    """In one evaluation. What neighbours share blends both of their predictions."""
    model, (z_lq, noise, prompt, local) = network(), large
    other = with_prompt(local, number, texts(1, 9, 99))
    box = local.plan[number]
    assert len(local.plan) == 20
    for run in (lambda text: remove_degradation(model, z_lq, prompt, text),
                lambda text: generate_texture(model, z_lq, noise, prompt, text, steps=1)):
        change = (run(other) - run(local)).abs()
        inside = box.crop(change).clone()
        box.crop(change)[:] = 0
        assert change.max() <= 1e-6, "outside of the patch"
        assert inside[..., 2:6, 2:6].mean() > 0.05, "its middle"
        assert (inside > 1e-6).float().mean() > 0.5


def test_over_several_steps_a_prompt_spreads_by_one_patch_a_step(network, large, texts):
    """MultiDiffusion couples neighbours through what they share; patches beyond that reach keep their pixels."""
    model, (z_lq, noise, prompt, local) = network(), large
    runs = [generate_texture(model, z_lq, noise, prompt, text, steps=2) for text in
            (local, with_prompt(local, 0, texts(1, 9, 99)))]
    change = (runs[1] - runs[0]).abs()
    assert change[..., :8, :8].mean() > 0.05
    assert change[..., 14:, :].max() <= 1e-6 and change[..., 14:].max() <= 1e-6, "beyond the neighbours' patches"


def test_the_global_prompt_acts_everywhere(network, large, texts):
    model, (z_lq, noise, prompt, local) = network(), large
    for run in (lambda text: remove_degradation(model, z_lq, text, local),
                lambda text: generate_texture(model, z_lq, noise, text, local, steps=1)):
        change = (run(texts(1, 5, 98)) - run(prompt)).abs()
        assert (change > 1e-6).float().mean() > 0.99
        assert min(float(box.crop(change).mean()) for box in local.plan) > 0.05


# blending ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("height", "width", "tile", "overlap"), [(26, 32, 8, 2), (64, 160, 64, 16), (70, 66, 64, 16)])
def test_the_weights_of_the_patches_add_up_to_one_at_every_pixel(height, width, tile, overlap):
    plan = plan_patches(height, width, tile, overlap)
    x = torch.zeros(1, 1, height, width)

    def only(chosen):
        return tiled(lambda x, t, boxes: torch.stack([torch.full_like(x[0], float(box == chosen)) for box in boxes]),
                     plan, 4)(x, torch.tensor(1.0))

    total = sum(only(box).double() for box in plan)
    assert float((total - 1).abs().max()) < 1e-6
    for value in (1.0, 1 / 3, 1234.5678):
        same = tiled(lambda x, t, boxes, value=value: torch.full_like(x, value), plan, 4)(x, torch.tensor(1.0))
        assert torch.equal(same, torch.full_like(x, value)), "equal predictions come back to the last bit"


def test_patches_that_disagree_leave_no_step_at_their_borders():
    """64 latents with 16 in common: predictions that differ by 1 change by less than a thousandth at a border."""
    plan = plan_patches(64, 256, 64, 16)
    x = torch.zeros(1, 1, 64, 256)

    def disagree(x, t, boxes):
        return torch.stack([torch.full_like(x[0], float(plan.index(box) % 2)) for box in boxes])

    v = tiled(disagree, plan, 4)(x, torch.tensor(1.0))[0, 0]
    assert v.min() < 1e-3 and v.max() > 1 - 1e-3, "each patch alone rules its middle"
    steps = v.diff(dim=-1).abs().amax(0)  # steps[i] is between columns i and i + 1
    for box in plan:
        for border in (box.left, box.left + box.width):
            if 0 < border < 256:
                assert steps[border - 1] < 1e-3
