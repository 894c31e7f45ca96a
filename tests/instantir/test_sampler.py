"""The loop: the published program's records, each option, schedulers, windows, batches."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from fourfold.nodes.common.errors import NonFiniteLatentError
from fourfold.nodes.common.sampling import cpu_generators
from fourfold.nodes.common.schedulers import SCHEDULERS
from fourfold.nodes.common.text import TextEmbedding
from fourfold.nodes.instantir.adaptive import AdaptiveRestoration
from fourfold.nodes.instantir.sampler import sample

LOOP = 1e-3  # relative error
ASKED = {
    "loop_default": {}, "loop_adares": {"adaptive": "release"}, "loop_preview_start": {"preview_start": 0.5},
    "loop_creative": {"creative_start": 0.6}, "loop_nocfg": {}}


@pytest.fixture
def count(monkeypatch):
    """`count(model)`: a list that gets a letter and the number of rows for each evaluation: U UNet, P Previewer,
    A Aggregator."""

    def watch(model):
        calls = []
        unet, aggregator = model.unet.evaluate, model.aggregator.forward
        monkeypatch.setattr(model.unet, "evaluate", lambda x, *args: (
            calls.append(("P" if model.switch.on else "U", len(x))), unet(x, *args))[1])
        monkeypatch.setattr(model.aggregator, "forward", lambda x, *args: (
            calls.append(("A", len(x))), aggregator(x, *args))[1])
        return calls

    return watch


def letters(calls):
    return "".join(letter for letter, _ in calls)


@pytest.mark.parametrize("run", ASKED)
def test_equals_the_published_program(recorded, record, relative_error, run):
    io = record(run)
    positive, negative = (TextEmbedding(io[f"{which}prompt_embeds"], io[f"{which}pooled"])
                          for which in ("", "negative_"))
    drawn = sample(recorded, io["lq_latent"], io["noise"], io["features"], positive, negative, io["negative_features"],
                   steps=int(io["steps"]), guidance=io["guidance"].item(), **ASKED[run])
    assert relative_error(drawn.latent, io["output"]) < LOOP


# what is evaluated when -------------------------------------------------------------------------------------------

def test_a_step_is_preview_aggregator_unet(network, inputs, count):
    model = network()
    calls = count(model)
    drawn = sample(model, **inputs(), steps=3)
    assert letters(calls) == "PAU" * 3 and {rows for _, rows in calls} == {2}, "both halves in one call"
    assert drawn.previews.shape == (3, 1, 4, 8, 8) and drawn.preview_steps == [0, 1, 2]


def test_guidance_1_evaluates_once_and_reads_no_negatives(network, inputs, count):
    model, run = network(), inputs()
    calls = count(model)
    drawn = sample(model, **run, steps=2, guidance=1.0)
    assert calls == [(letter, 1) for letter in "PAUPAU"]
    run["negative"] = run["null_image"] = None
    assert torch.equal(drawn.latent, sample(model, **run, steps=2, guidance=5.0).latent)


@pytest.mark.parametrize(("options", "expected", "steps"), [
    ({"preview_start": 0.5}, "AU AU AU PAU PAU", [3, 4]),
    ({"preview_start": 1.0}, "AU AU AU AU AU", []),
    ({"creative_start": 0.6}, "PAU PAU PAU U U", [0, 1, 2]),
    ({"creative_start": 0.0}, "U U U U U", []),
    ({"preview_start": 0.3, "creative_start": 0.6}, "AU AU PAU U U", [2]),
    ({"conditioning_scale": 0.0}, "U U U U U", []),
    ({"conditioning_scale": 0.05}, "PAU PAU PAU PAU PAU", [0, 1, 2, 3, 4]),
    ({"conditioning_scale": 0.05, "adaptive": "paper"}, "U U U U U", []),
    ({"conditioning_scale": 0.1, "adaptive": "release"}, "U U U U U", [])])
def test_when_the_aggregator_and_the_previewer_rest(network, inputs, count, options, expected, steps):
    model = network()
    calls = count(model)
    drawn = sample(model, **inputs(), steps=5, **options)
    assert letters(calls) == expected.replace(" ", "") and drawn.preview_steps == steps
    assert len(drawn.deltas) == len(drawn.ratios) == 5
    assert drawn.ratios[:, 0].isfinite().nonzero()[:, 0].tolist() == steps


def test_before_preview_start_the_lq_latent_is_the_reference(network, inputs, monkeypatch):
    model, run, seen = network(), inputs(), []
    forward = model.aggregator.forward
    monkeypatch.setattr(model.aggregator, "forward", lambda lq, ref, *args: (
        seen.append((lq, ref)), forward(lq, ref, *args))[1])
    drawn = sample(model, **run, steps=4, preview_start=0.5)
    assert [torch.equal(lq, ref) for lq, ref in seen] == [True, True, False, False]
    assert torch.equal(seen[2][1][1:], drawn.previews[0]), "the positive half comes second"


def test_the_users_reference_replaces_the_previews(network, inputs, monkeypatch, count):
    model, run, seen = network(), inputs(), []
    given = torch.randn(1, 4, 8, 8)
    calls = count(model)
    residuals = model.residuals
    monkeypatch.setattr(model, "residuals", lambda lq, ref, *args: (seen.append(ref), residuals(lq, ref, *args))[1])
    for adaptive in ("off", "paper"):
        drawn = sample(model, **run, steps=2, reference=given, adaptive=adaptive)
        assert all(torch.equal(half, given[0]) for ref in seen for half in ref)
        assert letters(calls) == "AUAU" and drawn.previews.shape == (0, 1, 4, 8, 8)
        calls.clear()
    without = network(previewer=False)
    assert sample(without, **run, steps=2, reference=given).latent.isfinite().all(), "needs no Previewer"
    with pytest.raises(ValueError, match="no Previewer"):
        sample(without, **run, steps=2)


def test_conditioning_and_image_scale(network, inputs):
    model, run = network(), inputs()
    off, bare = sample(model, **run, steps=2, conditioning_scale=0.0).latent, network()
    bare.aggregator = None
    assert torch.equal(off, sample(bare, **run, steps=2).latent)
    halves = [sample(model, **run, steps=2, preview_start=1.0, conditioning_scale=scale).latent for scale in (0.5, 1.0)]
    assert not torch.equal(halves[0], halves[1]) and not torch.equal(halves[0], off)
    blind = [sample(model, **(run | {"image": image}), steps=2, image_scale=0.0, creative_start=0.0).latent
             for image in (run["image"], run["image"] + 1)]
    assert torch.equal(*blind), "the tokens are not read"


def test_what_the_previewer_reads(network, inputs):
    """None is the UNet's own prompts; another text changes the previews at once, and it is read without guidance's two
    sides."""
    model, run = network(), inputs()
    other = inputs(seed=7)["positive"]
    first = [sample(model, **run, steps=1, previewer_text=text).previews[0] for text in (None, other, run["positive"])]
    assert not torch.allclose(first[0], first[1]) and torch.allclose(first[0], first[2], atol=1e-5)
    assert not torch.equal(*(sample(model, **run, steps=1, previewer_text=text).latent for text in (None, other)))


# adaptive restoration ---------------------------------------------------------------------------------------------

def test_delta_by_hand(network, inputs):
    """delta_0 = 1; after a step |p - x0|^2 / |p - p_before|^2 with p_before = 0 first; it acts at the next one."""
    model, run, clean = network(), inputs(), []
    for mode in ("off", "release", "paper"):
        clean.clear()
        drawn = sample(model, **run, steps=3, adaptive=mode, on_step=lambda i, n, x, x0: clean.append(x0))
        before = torch.zeros_like(clean[0])
        for i, (preview, x0) in enumerate(zip(drawn.previews, clean, strict=True)):
            ratio = (preview - x0).square().sum() / (preview - before).square().sum()
            torch.testing.assert_close(drawn.ratios[i, 0], ratio)
            before = preview
        assert drawn.deltas[0].item() == 1
        torch.testing.assert_close(drawn.deltas[1:], drawn.ratios[:-1].clamp(0, 1))


def test_paper_mode_draws_the_reference_to_the_lq_latent(network, inputs, monkeypatch):
    model, run, seen = network(), inputs(), []
    residuals = model.residuals
    monkeypatch.setattr(model, "residuals", lambda lq, ref, *args: (seen.append(ref), residuals(lq, ref, *args))[1])
    drawn = sample(model, **run, steps=3, adaptive="paper")
    for i, ref in enumerate(seen):
        preview, delta = drawn.previews[i, 0], drawn.deltas[i, 0]
        torch.testing.assert_close(ref[1], preview + delta * (run["lq_latent"][0] - preview))
    assert torch.allclose(seen[0], run["lq_latent"].expand(2, -1, -1, -1), atol=1e-5), "delta is 1 at first"


@pytest.mark.parametrize("ratio", [0.05, 0.5, 3.0])
def test_release_mode_scales_the_residuals_of_a_sample(network, inputs, monkeypatch, ratio):
    """Samples are on their own: with a ratio of at most 0.1 one rests for good, the other works on."""
    model, run, scales = network(), inputs(batch=2), []
    monkeypatch.setattr(AdaptiveRestoration, "update", measuring(torch.tensor([ratio, 0.8])))
    evaluate = model.unet.evaluate
    monkeypatch.setattr(model.unet, "evaluate", lambda x, t, step, residuals=None: (
        scales.append(residuals and residuals[1].abs().sum(dim=(1, 2, 3)) > 0), evaluate(x, t, step, residuals))[1])
    drawn = sample(model, **run, steps=3, adaptive="release", conditioning_scale=0.9)
    torch.testing.assert_close(drawn.deltas[0], torch.tensor([0.9, 0.9]))
    torch.testing.assert_close(drawn.deltas[1], torch.tensor([min(ratio, 0.9), 0.8]))
    working = [s for s in scales if s is not None]
    assert working[0].all() and working[1].tolist() == [ratio > 0.1, True] * 2
    rested = drawn.ratios[1:, 0].isnan().all().item()
    assert rested == (ratio <= 0.1)
    if rested:
        torch.testing.assert_close(drawn.deltas[2, 0], torch.tensor(ratio))  # its delta is not updated
        assert torch.equal(drawn.previews[1][0], drawn.previews[0][0]), "its last preview is repeated"


def measuring(ratio):
    """AdaptiveRestoration.update that measures always the same."""
    update = AdaptiveRestoration.update

    def given(self, preview, x0, previewed):
        before = self.delta
        update(self, preview, x0, previewed)
        self.delta = torch.where(previewed, ratio, before)
        return torch.where(previewed, ratio, torch.nan)

    return given


# schedulers -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_shows_the_networks_the_same_kind_of_latent(network, inputs, monkeypatch, scheduler):
    """Whatever the scheduler's own scaling, they first see alpha z + sigma noise at the timestep that goes with it."""
    model, run, seen = network(), inputs(), []
    evaluate = model.unet.evaluate
    monkeypatch.setattr(model.unet, "evaluate", lambda x, t, *args: (seen.append((x, t)), evaluate(x, t, *args))[1])
    drawn = sample(model, **run, steps=4, scheduler=scheduler, generator=cpu_generators(0, 1))
    x, (alpha, sigma) = seen[0][0], model.alpha_sigma(seen[0][1])
    expected = alpha * run["lq_latent"] + sigma * run["noise"]
    error = 0.02 if "karras" in scheduler else 1e-4  # its timesteps are rounded
    torch.testing.assert_close(x, expected.expand(2, -1, -1, -1), rtol=error, atol=error)
    assert len(seen) == 8 and drawn.latent.isfinite().all() and drawn.ratios.isfinite().all()
    for (x, t), (previewed, at) in zip(seen[1::2], seen[::2], strict=True):
        assert torch.equal(x, previewed) and torch.equal(t, at), "the Previewer and the UNet see the same"


def test_euler_and_ddim_agree(network, inputs, relative_error):
    """Both are the same first-order step of the same equation, in other variables."""
    model, run = network(), inputs()
    latents = []
    for kind, more in ((DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}), (EulerDiscreteScheduler, {})):
        scheduler = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
                         **more)
        latents.append(sample(model, **run, steps=10, scheduler=scheduler).latent)
    assert relative_error(*latents) < 1e-3


def test_a_scheduler_for_something_else_is_refused(network, inputs):
    model, run = network(), inputs()
    with pytest.raises(ValueError, match="epsilon"):
        sample(model, **run, scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="epsilon"):
        sample(model, **run, scheduler=DDIMScheduler(prediction_type="v_prediction"))
    with pytest.raises(ValueError, match="no scheduler 'heun'"):
        sample(model, **run, scheduler="heun")


# batches, windows, errors -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"adaptive": "release"}, {"adaptive": "paper"}, {"scheduler": "ddpm"}])
def test_a_batch_of_two_equals_two_singles(network, inputs, options):
    model, run = network(), inputs(batch=2)
    generators = cpu_generators(3, 2)
    both = sample(model, **run, steps=3, generator=generators, **options)
    for i in range(2):
        one = {name: value[[i]] if isinstance(value, torch.Tensor) and len(value) == 2 else value
               for name, value in run.items()}
        for name in ("positive", "negative"):
            one[name] = TextEmbedding(run[name].prompt_embeds[[i]], run[name].pooled[[i]])
        alone = sample(model, **one, steps=3, generator=cpu_generators(3 + i, 1), **options)
        torch.testing.assert_close(both.latent[[i]], alone.latent, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(both.ratios[:, i], alone.ratios[:, 0], rtol=1e-3, atol=1e-4)


def test_prompts_of_two_lengths_in_one_batch(network, inputs, count):
    """The shorter one is repeated, which attention does not notice."""
    model, run = network(), inputs()
    whole = sample(model, **run, steps=2).latent
    text = run["negative"]
    run["negative"] = TextEmbedding(text.prompt_embeds.repeat(1, 2, 1), text.pooled)
    calls = count(model)
    torch.testing.assert_close(sample(model, **run, steps=2).latent, whole, rtol=1e-4, atol=1e-4)
    assert {rows for _, rows in calls} == {2}


def test_one_window_is_no_window(network, inputs):
    model, run = network(), inputs()
    whole = sample(model, **run, steps=2, tile=0).latent
    for tile in (8, 128):
        assert torch.equal(sample(model, **run, steps=2, tile=tile, overlap=2).latent, whole)


@pytest.mark.parametrize("adaptive", ["off", "release"])
def test_windows_see_their_own_part_of_everything_spatial(network, inputs, count, adaptive):
    """Windows of a picture that repeats itself: each gives what a single one gives, whatever their number per call."""
    model, small = network(), inputs()
    run = small | {name: small[name].repeat(1, 1, 2, 3) for name in ("lq_latent", "noise")}
    one = sample(model, **small, steps=2, adaptive="off" if adaptive == "off" else adaptive)
    calls = count(model)
    many = [sample(model, **run, steps=2, tile=8, overlap=0, tile_batch=n, adaptive=adaptive) for n in (1, 4)]
    for drawn in many:
        torch.testing.assert_close(drawn.latent, one.latent.repeat(1, 1, 2, 3), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(drawn.previews, one.previews.repeat(1, 1, 1, 2, 3), rtol=1e-4, atol=1e-4)
    assert [rows for letter, rows in calls if letter == "P"] == [2] * 12 + [8, 4] * 2


def test_windows_overlap_and_time_ids_are_a_windows_own(network, inputs, monkeypatch):
    model, run, sizes, counted = network(), inputs(height=8, width=20), [], []
    condition = model.condition
    monkeypatch.setattr(model, "condition", lambda *args, **more: (sizes.append(args[2]), condition(*args, **more))[1])
    drawn = sample(model, **run, steps=1, tile=8, overlap=4, on_window=lambda i, n: counted.append((i, n)))
    assert drawn.latent.shape == (1, 4, 8, 20) and drawn.latent.isfinite().all()
    assert counted == [(i + 1, 8) for i in range(8)], "four windows, previewed and denoised"
    assert all(row.tolist() == [64, 64, 0, 0, 64, 64] for size in sizes for row in size)
    sizes.clear()
    sample(model, **run, steps=1, tile=0)
    assert sizes[0][0].tolist() == [64, 160, 0, 0, 64, 160]
    given = torch.tensor([[1.0, 2, 3, 4, 5, 6]])
    sample(model, **run, steps=1, tile=8, overlap=4, time_ids=given)
    assert sizes[-1].tolist() == [[1, 2, 3, 4, 5, 6]] * 2


def test_running_out_of_memory_halves_the_rows(network, inputs, monkeypatch):
    """Both halves of the guidance do not fit: they go one after the other, and stay so."""
    model, run = network(), inputs()
    whole, rows = sample(model, **run, steps=2).latent, []
    evaluate = model.unet.evaluate

    def small(x, *args):
        rows.append(len(x))
        if len(x) > 1:
            raise torch.OutOfMemoryError("too much")
        return evaluate(x, *args)

    monkeypatch.setattr(model.unet, "evaluate", small)
    torch.testing.assert_close(sample(model, **run, steps=2).latent, whole, rtol=1e-4, atol=1e-4)
    assert rows == [2] + [1] * 8


def test_same_noise_same_latent_and_nothing_is_changed(network, inputs):
    model, run = network(), inputs()
    copies = {name: value.clone() for name, value in run.items() if isinstance(value, torch.Tensor)}
    first = sample(model, **run, steps=2, adaptive="release")
    assert torch.equal(first.latent, sample(model, **run, steps=2, adaptive="release").latent)
    assert not torch.equal(first.latent, sample(model, **(run | {"noise": -run["noise"]}), steps=2).latent)
    assert all(torch.equal(run[name], value) for name, value in copies.items()) and not model.switch.on


def test_nan_names_the_step(network, inputs, monkeypatch):
    model, run, steps = network(), inputs(), []
    evaluate = model.unet.evaluate
    monkeypatch.setattr(model.unet, "evaluate", lambda *args: evaluate(*args) * (torch.nan if steps else 1))
    with pytest.raises(NonFiniteLatentError, match="step 2 of 4"):
        sample(model, **run, steps=4, on_step=lambda i, *_: steps.append(i))


def test_a_run_can_be_stopped(network, inputs):
    def stop(i, n, x, x0):
        raise KeyboardInterrupt

    model = network()
    with pytest.raises(KeyboardInterrupt):
        sample(model, **inputs(), steps=3, on_step=stop)
    assert not model.switch.on


@pytest.mark.parametrize(("change", "words"), [
    ({"noise": torch.zeros(1, 4, 8, 9)}, "noise is"), ({"reference": torch.zeros(1, 4, 8, 9)}, "reference is"),
    ({"preview_start": 1.5}, "preview_start is 1.5"), ({"creative_start": -1}, "creative_start is -1"),
    ({"adaptive": "on"}, "'on'"), ({"steps": 0}, "steps is 0"), ({"null_image": None}, "both negatives"),
    ({"image": torch.zeros(3, 7, 6)}, "3 pictures")])
def test_errors_say_what_was_wrong(network, inputs, change, words):
    with pytest.raises(ValueError, match=words):
        sample(network(), **(inputs() | {"steps": 2} | change))
