"""`sample` on latents and `restore` on pictures, with small random networks."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderKL
from fourfold.nodes.common.codec import CodecConfig, LinearCodec
from fourfold.nodes.common.errors import NonFiniteLatentError
from fourfold.nodes.common.images import resize
from fourfold.nodes.common.sampling import cpu_noise
from fourfold.nodes.common.text import TextEmbedding
from fourfold.nodes.common.tiny_text import TinyTextConfig, TinyTextEncoder
from fourfold.nodes.dit4sr.config import Sampling
from fourfold.nodes.dit4sr.prompts import NEGATIVE, POSITIVE
from fourfold.nodes.dit4sr.restore import System, load_system, restore, sample


@pytest.fixture
def calls(network):
    """A small network that notes the arguments of every forward."""
    model, seen = network(), []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    return model, seen


@pytest.fixture
def case(inputs):
    """`case(batch, height, width)`: LR latent, noise, positive and negative prompt."""

    def make(batch=2, height=8, width=8):
        z_lr, _, _, prompt, pooled = inputs(batch, height, width)
        negative = TextEmbedding(-prompt[:1], -pooled[:1])
        return z_lr, cpu_noise(3, z_lr.shape), TextEmbedding(prompt, pooled), negative

    return make


# sample -----------------------------------------------------------------------------------------------------------

def test_equal_arguments_give_equal_latents(network, case):
    runs = [sample(network(), *case(), steps=3, guidance=2.0) for _ in range(2)]
    assert torch.equal(*runs) and runs[0].dtype == torch.float32
    z_lr, noise, positive, negative = case()
    assert not torch.equal(sample(network(), z_lr, -noise, positive, negative, steps=3, guidance=2.0), runs[0])


def test_euler_steps_by_hand(network, case, relative_error):
    """Levels of the shift-3 schedule from diffusers' 1000 training levels; x + (sigma' - sigma) v."""
    model, (z_lr, noise, positive, negative) = network(), case()
    u = torch.linspace(1.0, 1 / 1000, 1000, dtype=torch.float64)
    first, last = (float(3 * s / (1 + 2 * s)) for s in (u[0], u[-1]))
    u = torch.linspace(first, last, 4, dtype=torch.float64)
    sigmas = [*(3 * u / (1 + 2 * u)).tolist(), 0.0]
    x = noise
    for now, then in pairwise(sigmas):
        t = torch.tensor(1000 * now)
        cond = model(x, z_lr, t, positive.prompt_embeds, positive.pooled)
        uncond = model(x, z_lr, t, *(tensor.expand(2, *tensor.shape[1:]) for tensor in vars(negative).values()))
        x = x + (then - now) * (uncond + 5.0 * (cond - uncond))
    ours = sample(model, z_lr, noise, positive, negative, steps=4, guidance=5.0)
    assert relative_error(ours, x) < 1e-3


@pytest.mark.parametrize(("guidance", "negative", "rows"), [(1.0, True, 2), (8.0, False, 2), (8.0, True, 4)])
def test_one_network_call_a_step_whatever_the_guidance(calls, case, guidance, negative, rows):
    model, seen = calls
    z_lr, noise, positive, low = case()
    sample(model, z_lr, noise, positive, low if negative else None, steps=3, guidance=guidance)
    assert [len(arguments[0]) for arguments in seen] == [rows] * 3


def test_start_sigma_below_one_starts_from_the_lr_latent(calls, case):
    model, seen = calls
    z_lr, noise, positive, _ = case()
    sample(model, z_lr, noise, positive, steps=4, guidance=1.0, start_sigma=0.4)
    latent, _, timestep, *_ = seen[0]
    torch.testing.assert_close(latent, 0.6 * z_lr + 0.4 * noise)
    assert timestep.item() == pytest.approx(400, abs=0.5) and len(seen) == 4
    del seen[:]
    sample(model, z_lr, noise, positive, steps=4, guidance=1.0)
    assert torch.equal(seen[0][0], noise) and seen[0][2].item() == 1000


def test_prompts_and_injection_scale_reach_the_network(network, case):
    z_lr, noise, positive, negative = case()
    settings = dict(steps=2, guidance=1.0)
    plain = sample(network(), z_lr, noise, positive, **settings)
    torch.testing.assert_close(sample(network(), z_lr, noise, positive, injection_scale=1.2, **settings), plain)
    for other in (sample(network(), z_lr, noise, negative, **settings),
                  sample(network(), z_lr, noise, positive, injection_scale=0.0, **settings)):
        assert not torch.allclose(other, plain, atol=1e-3)


def test_several_prompts_are_averaged_with_their_shares(network, case):
    model, (z_lr, noise, positive, negative) = network(), case()
    settings = dict(steps=1, guidance=1.0)
    a, b = (sample(model, z_lr, noise, prompt, **settings) for prompt in (positive, negative))
    both = sample(model, z_lr, noise, [(positive, 0.25), (negative, 0.75)], **settings)
    torch.testing.assert_close(both, 0.25 * a + 0.75 * b, atol=1e-4, rtol=1e-4)


def test_one_window_that_covers_all_is_bit_equal_to_untiled(network, case):
    z_lr, noise, positive, negative = case(2, 8, 12)
    runs = [sample(network(), z_lr, noise, positive, negative, steps=2, guidance=2.0, tile=tile, overlap=4)
            for tile in (12, 64)]
    assert torch.equal(*runs)


def test_windows_see_their_part_of_the_lr_latent(calls, case):
    model, seen = calls
    z_lr, noise, positive, _ = case(2, 8, 20)
    progress = []
    sample(model, z_lr, noise, positive, steps=1, guidance=1.0, tile=8, overlap=2, tile_batch=2,
           on_window=lambda done, total: progress.append((done, total)))
    assert progress == [(2, 3), (3, 3)]
    windows = torch.cat([arguments[1] for arguments in seen])
    assert torch.equal(windows, torch.cat([z_lr[..., left:left + 8] for left in (0, 6, 12)]))
    prompts = torch.cat([arguments[3] for arguments in seen])
    assert torch.equal(prompts, positive.prompt_embeds.repeat(3, 1, 1))


def test_windows_in_one_call_equal_windows_one_by_one(network, case):
    z_lr, noise, positive, negative = case(2, 12, 20)
    settings = dict(steps=2, guidance=2.0, tile=8, overlap=4)
    runs = [sample(network(), z_lr, noise, positive, negative, tile_batch=size, **settings) for size in (1, 5)]
    torch.testing.assert_close(*runs, atol=1e-4, rtol=1e-4)


def test_batch_of_two_equals_two_singles(network, case):
    z_lr, noise, positive, negative = case(2, 8, 12)
    settings = dict(steps=3, guidance=2.0, tile=8, overlap=2)
    both = sample(network(), z_lr, noise, positive, negative, **settings)
    for row in range(2):
        one = slice(row, row + 1)
        prompt = TextEmbedding(positive.prompt_embeds[one], positive.pooled[one])
        single = sample(network(), z_lr[one], noise[one], prompt, negative, **settings)
        torch.testing.assert_close(both[one], single, atol=1e-4, rtol=1e-4)


def test_on_step_reports_every_step_and_may_stop(network, case):
    seen = []

    def on_step(i, n, x, x0):
        seen.append((i, n))
        assert x.shape == x0.shape == (2, 4, 8, 8)
        if i == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(network(), *case(), steps=5, guidance=1.0, on_step=on_step)
    assert seen == [(0, 5), (1, 5)]


def test_weights_that_are_not_numbers_give_an_error_that_names_the_step(network, case):
    model = network()
    model.proj_out.bias[0] = float("nan")
    with pytest.raises(NonFiniteLatentError, match=r"after step 1 of 3.*the network's prediction"):
        sample(model, *case(), steps=3, guidance=1.0)


@pytest.mark.parametrize(("settings", "text"), [
    ({"steps": 0}, "steps is 0"), ({"start_sigma": 0.0}, "start_sigma is 0"), ({"start_sigma": 1.5}, "at most 1"),
    ({"tile": 7}, "tile is 7 latents; it must be a multiple"), ({"tile": 4, "overlap": 4}, "overlap is 4"),
    ({"tile_batch": 0}, "tile_batch is 0")])
def test_impossible_settings_are_refused(network, case, settings, text):
    with pytest.raises(ValueError, match=text):
        sample(network(), *case(), **settings)


def test_noise_of_another_shape_is_refused(network, case):
    z_lr, noise, positive, _ = case()
    with pytest.raises(ValueError, match=r"noise is \(2, 4, 8, 6\), the LR latent \(2, 4, 8, 8\)"):
        sample(network(), z_lr, noise[..., :6], positive)


# restore ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def system(network):
    """A whole system at the small size: latents a quarter of the picture, prompts of up to 32 bytes."""
    torch.manual_seed(1)
    codec, text = LinearCodec(CodecConfig(latent_channels=4)), TinyTextEncoder(TinyTextConfig(12, 1, 2, 16, 32))
    asked = []

    def captioner(images):
        asked.append(images.shape)
        return [f"caption {i}" for i in range(len(images))]

    made = System(network(pooled_projection_dim=12, latent_shift=0.05, latent_scale=1.5), codec.eval(),
                  text.eval().requires_grad_(False), captioner,
                  Sampling(steps=2, guidance=2.0, start_sigma=0.7, tile=16, overlap=4, multiple=8, min_short_side=16),
                  added_prompt="", negative_prompt="", device=torch.device("cpu"))
    made.asked = asked
    return made


def picture(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3, 5, 7), (2, 1, 6, 3), (1, 4, 9, 4), (1, 2, 1, 11), (3, 3, 8, 8)])
def test_any_picture_comes_back_at_exactly_the_target_size(system, shape):
    batch, channels, height, width = shape
    sr = restore(picture(*shape), system, scale=4, steps=1)
    assert sr.shape == (batch, channels, 4 * height, 4 * width) and sr.dtype == torch.float32
    assert sr.isfinite().all() and sr.min() >= 0 and sr.max() <= 1
    assert torch.equal(sr, restore(picture(*shape), system, scale=4, steps=1)), "same seed, same bytes"


@pytest.mark.parametrize(("scale", "expected"), [(1, (5, 7)), (2.5, (12, 18)), (3, (15, 21))])
def test_any_scale_or_an_exact_size(system, scale, expected):
    assert restore(picture(1, 3, 5, 7), system, scale=scale, steps=1).shape[-2:] == expected
    assert restore(picture(1, 3, 5, 7), system, size=(11, 30), steps=1).shape[-2:] == (11, 30)


def test_alpha_is_kept(system):
    lr = picture(1, 4, 6, 6)
    sr = restore(lr, system, steps=1)
    torch.testing.assert_close(sr[:, 3:], resize(lr[:, 3:], (24, 24)))
    torch.testing.assert_close(sr[:, :3], restore(lr[:, :3], system, steps=1))


def test_batch_of_two_pictures_equals_two_singles_with_following_seeds(system):
    lr, prompts = picture(2, 3, 6, 9), ["a cat", "a longer prompt"]
    both = restore(lr, system, seed=11, prompt=prompts)
    for row in range(2):
        single = restore(lr[row:row + 1], system, seed=11 + row, prompt=prompts[row])
        torch.testing.assert_close(both[row:row + 1], single, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both, restore(lr, system, seed=12, prompt=prompts), atol=1e-3)


def test_captions_are_made_of_the_enlarged_picture_unless_given(system):
    lr = picture(2, 3, 6, 6)
    captioned = restore(lr, system, color_fix="none")
    assert system.asked == [(2, 3, 24, 24)]
    torch.testing.assert_close(restore(lr, system, prompt=["caption 0", "caption 1"], color_fix="none"), captioned)
    told = restore(lr, system, prompt="something else", color_fix="none")
    assert system.asked == [(2, 3, 24, 24)] and not torch.allclose(told, captioned, atol=1e-4)
    with pytest.raises(ValueError, match="3 prompts for 2 pictures"):
        restore(lr, system, prompt=["a", "b", "c"])


def test_prompts_are_completed_with_the_published_words(system, monkeypatch):
    encoded = []
    encode = system.text.encode
    monkeypatch.setattr(system.text, "encode", lambda prompts: encoded.append(prompts) or encode(["x"] * len(prompts)))
    full = replace(system, added_prompt=POSITIVE, negative_prompt=NEGATIVE)
    restore(picture(1, 3, 4, 4), full, prompt="A dog. It is blurred.", steps=1)
    assert encoded == [[f"A dog. It is blurred. {POSITIVE}"], [NEGATIVE]], "the user's own words are kept"
    del encoded[:]
    captioned = replace(full, captioner=lambda images: ["A dog. It is blurred."] * len(images))
    restore(picture(1, 3, 4, 4), captioned, steps=1)
    assert encoded == [[f"A dog. {POSITIVE}"], [NEGATIVE]], "a caption's are not"
    del encoded[:]
    restore(picture(1, 3, 4, 4), full, prompt="A dog", negative="ugly", steps=1)
    restore(picture(1, 3, 4, 4), full, prompt="A dog", guidance=1.0, steps=1)
    assert encoded == [[f"A dog. {POSITIVE}"], ["ugly"], [f"A dog. {POSITIVE}"]], "guidance 1 needs no negative prompt"


def test_colours_are_those_of_the_low_resolution_picture(system):
    lr = picture(1, 3, 8, 8) * 0.2 + torch.tensor([0.6, 0.3, 0.1])[:, None, None]
    for method, tolerance in (("adain", 0.02), ("wavelet", 0.1)):
        sr = restore(lr, system, color_fix=method)
        torch.testing.assert_close(sr.mean((2, 3)), lr.mean((2, 3)), atol=tolerance, rtol=0)
    assert torch.equal(restore(lr, system), restore(lr, system, color_fix="adain")), "the system's own method"
    with pytest.raises(ValueError, match="colour fix is 'reinhard'; expected one of adain, wavelet, none"):
        restore(lr, system, color_fix="reinhard")


def test_settings_replace_those_of_the_system(system):
    steps = []
    restore(picture(1, 3, 4, 4), system, on_step=lambda i, n, x, x0: steps.append(n))
    restore(picture(1, 3, 4, 4), system, steps=3, start_sigma=1.0, on_step=lambda i, n, x, x0: steps.append(n))
    assert steps == [2, 2, 3, 3, 3]
    windows = []
    restore(picture(1, 3, 24, 24), system, steps=1, tile=12, overlap=0, tile_batch=4,
            on_window=lambda done, total: windows.append((done, total)))
    assert windows == [(4, 4)]


def test_what_is_no_picture_is_refused(system):
    nothing = torch.full((1, 3, 4, 4), float("nan"))
    for wrong in (picture(3, 8, 8), picture(1, 5, 8, 8), nothing, 255 * picture(1, 3, 4, 4)):
        with pytest.raises(ValueError):
            restore(wrong, system)


# load_system ------------------------------------------------------------------------------------------------------

def test_tiny_training_export_is_a_system(system, tmp_path):
    system.transformer.save_pretrained(tmp_path / "transformer")
    system.text.save(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match=r"codec\.safetensors"):
        load_system(tmp_path, device="cpu")
    system.autoencoder.save(tmp_path / "codec.safetensors")
    loaded = load_system(tmp_path, device="cpu")
    loaded.sampling, loaded.captioner = system.sampling, system.captioner
    loaded.negative_prompt = system.negative_prompt
    assert torch.equal(restore(picture(1, 3, 5, 5), loaded), restore(picture(1, 3, 5, 5), system))


def test_networks_that_take_turns_on_the_device_give_the_same_picture(system):
    placed = restore(picture(1, 3, 5, 5), system)
    system.offload = True
    parts = system.transformer, system.text, system.autoencoder
    weights = [[p.data_ptr() for p in part.parameters()] for part in parts]
    assert torch.equal(restore(picture(1, 3, 5, 5), system), placed)
    assert [[p.data_ptr() for p in part.parameters()] for part in parts] == weights, "they are back at their places"


def test_missing_parts_are_named(network, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"DiT4SR transformer is missing.*dit4sr_q.*acceptee/DiT4SR"):
        load_system(tmp_path / "dit4sr_q", device="cpu")
    network().save_pretrained(tmp_path / "dit4sr_q" / "transformer")
    with pytest.raises(FileNotFoundError, match=r"no VAE in .*dit4sr_q.*stable-diffusion-3\.5-medium"):
        load_system(tmp_path / "dit4sr_q", device="cpu")
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae.save_pretrained(tmp_path / "sd3" / "vae")
    with pytest.raises(FileNotFoundError, match=r"text encoder of Stable Diffusion 3 is missing.*sd3.text_encoder"):
        load_system(tmp_path / "dit4sr_q", base=tmp_path / "sd3", device="cpu")

