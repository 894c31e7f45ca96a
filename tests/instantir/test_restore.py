"""`restore` on pictures and `load_system`, with small random networks at both sizes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from fourfold.nodes.common.codec import CodecConfig, LinearCodec
from fourfold.nodes.common.errors import NonFiniteLatentError, WrongFileError
from fourfold.nodes.common.images import resize
from fourfold.nodes.common.tiny_text import TinyTextConfig, TinyTextEncoder
from fourfold.nodes.common.vision import Preprocessing, VisionEncoder
from fourfold.nodes.instantir import restore as module
from fourfold.nodes.instantir.config import PRESETS, Sampling
from fourfold.nodes.instantir.prompts import NEGATIVE, POSITIVE
from fourfold.nodes.instantir.restore import System, load_system, restore
from safetensors.torch import load_file, save_file

UNET = dict(cross_attention_dim=12, projection_class_embeddings_input_dim=12 + 6 * 4)


@pytest.fixture
def system(network):
    """A whole system at the small size: latents a quarter of the picture, drawn in windows of 8 latents."""
    model = network(unet=UNET, prediction="v", downscale=4, latent_shift=0.05, latent_scale=1.5)
    torch.manual_seed(1)
    codec, text = LinearCodec(CodecConfig(latent_channels=4)), TinyTextEncoder(TinyTextConfig(12, 1, 2, 16, 32))
    sizes = dict(hidden_size=6, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=16)
    dino, asked = VisionEncoder.new(sizes, Preprocessing(resize=16, crop=16)), []

    def captioner(images):
        asked.append(images.shape)
        return [f"caption {i}" for i in range(len(images))]

    sampling = Sampling(steps=2, guidance=2.0, tile=8, overlap=2, tile_batch=4, min_short_side=32, max_long_side=32,
                        multiple=8, interpolation="bicubic")
    made = System(model, codec.eval(), text.eval().requires_grad_(False), dino.eval().requires_grad_(False), captioner,
                  sampling, prompt="", negative_prompt="")
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
    assert restore(picture(1, 3, 5, 7), system, size=(11, 50), steps=1).shape[-2:] == (11, 50)


def test_alpha_is_kept(system):
    lr = picture(1, 4, 6, 6)
    sr = restore(lr, system, steps=1, prompt="x")
    torch.testing.assert_close(sr[:, 3:], resize(lr[:, 3:], (24, 24)))
    torch.testing.assert_close(sr[:, :3], restore(lr[:, :3], system, steps=1, prompt="x"))


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_batch_of_two_pictures_equals_two_singles_with_following_seeds(system, scheduler):
    lr, prompts, options = picture(2, 3, 6, 11), ["a cat", "a longer prompt"], dict(scheduler=scheduler, steps=3)
    both = restore(lr, system, seed=11, prompt=prompts, **options)
    for row in range(2):
        single = restore(lr[row:row + 1], system, seed=11 + row, prompt=prompts[row], **options)
        torch.testing.assert_close(both[row:row + 1], single, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both, restore(lr, system, seed=12, prompt=prompts, **options), atol=1e-3)


def test_the_steps_noise_is_not_the_starting_noise(system, monkeypatch):
    """The generators that drew the start go on; fresh ones would add the very same noise again."""
    seen, run = [], module.sample
    monkeypatch.setattr(module, "sample", lambda model, z, noise, *args, generator, **options: (
        seen.append((noise, torch.randn(noise.shape[1:], generator=generator[0]))),
        run(model, z, noise, *args, generator=generator, **options))[1])
    restore(picture(1, 3, 6, 6), system, steps=1)
    noise, following = seen[0]
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), following.flatten()]))[0, 1]) < 0.5


def test_guidance_1_needs_no_negatives(system, monkeypatch):
    monkeypatch.setattr(system.vision, "null_features", lambda *_: pytest.fail("not needed"))
    encoded, encode = [], system.text.encode
    monkeypatch.setattr(system.text, "encode", lambda prompts: (encoded.append(prompts), encode(prompts))[1])
    restore(picture(1, 3, 6, 6), system, guidance=1.0, prompt="a cat", text_guided=True)
    assert encoded == [["a cat"]]


def test_the_previewer_reads_the_prompt_only_when_asked(system, monkeypatch):
    given, run = [], module.sample
    monkeypatch.setattr(module, "sample", lambda *args, previewer_text, **options: (
        given.append(previewer_text), run(*args, previewer_text=previewer_text, **options))[1])
    for text_guided in (False, True):
        restore(picture(1, 3, 6, 6), system, prompt="a cat", text_guided=text_guided, steps=1)
    torch.testing.assert_close(given[0].prompt_embeds, system.text.encode([""]).prompt_embeds)
    assert given[1] is None


def test_captions_unless_prompts_are_given(system):
    lr = picture(2, 3, 6, 6)
    captioned = restore(lr, system)
    assert system.asked == [(2, 3, 24, 24)]
    torch.testing.assert_close(restore(lr, system, prompt=["caption 0", "caption 1"]), captioned)
    assert not torch.allclose(restore(lr, system, prompt="something else"), captioned, atol=1e-4)
    with pytest.raises(ValueError, match="3 prompts for 2 pictures"):
        restore(lr, system, prompt=["a", "b", "c"])


def test_the_published_prompts_and_when_they_are_used(system):
    used = []
    full = replace(system, prompt=POSITIVE, negative_prompt=NEGATIVE, captioner=None)
    for which, options in ((full, {}), (full, {"prompt": "a fox", "negative": "a cat"}),
                           (replace(full, captioner=lambda images: ["A dog. It is blurred."]), {})):
        restore(picture(1, 3, 4, 4), which, steps=1, on_settings=used.append, **options)
    assert [(s["prompt"], s["negative"]) for s in used] == [
        ([POSITIVE], NEGATIVE), (["a fox"], "a cat"), ([f"A dog. {POSITIVE}"], NEGATIVE)]
    assert used[0]["steps"] == 1 and used[0]["scheduler"] == "ddim"


def test_colours_are_left_alone_unless_asked(system):
    lr = picture(1, 3, 8, 8) * 0.2 + torch.tensor([0.6, 0.3, 0.1])[:, None, None]
    plain, fixed = (restore(lr, system, color_fix=method) for method in (None, "adain"))
    assert torch.equal(plain, restore(lr, system, color_fix="none")) and not torch.equal(plain, fixed)
    torch.testing.assert_close(fixed.mean((2, 3)), lr.mean((2, 3)), atol=0.02, rtol=0)


def test_large_pictures_are_drawn_in_windows(system):
    lr, windows, sizes = picture(1, 3, 12, 20), [], []
    whole = restore(lr, system, steps=1, tile=0, on_window=lambda i, n: windows.append((i, n)))
    assert windows == [(1, 2), (2, 2)] and whole.shape == (1, 3, 48, 80)
    del windows[:]
    tiled = restore(lr, system, steps=1, on_window=lambda i, n: windows.append((i, n)),
                    on_sampled=lambda drawn: sizes.append(drawn.latent.shape))
    assert tiled.shape == whole.shape and sizes == [(1, 4, 12, 20)] and windows[-1][0] == windows[-1][1] > 2
    wide = restore(picture(1, 3, 6, 8), system, steps=1, tile=32, overlap=4, on_window=lambda i, n: windows.append(n))
    assert wide.shape == (1, 3, 24, 32) and windows[-1] == 2


def test_what_was_drawn_can_be_seen(system):
    seen = []
    restore(picture(2, 3, 6, 6), system, steps=3, adaptive="release", preview_start=0.3, on_sampled=seen.append)
    assert seen[0].previews.shape == (2, 2, 4, 8, 8) and seen[0].preview_steps == [1, 2]
    assert seen[0].deltas.shape == seen[0].ratios.shape == (3, 2)


def test_a_picture_as_reference(system):
    lr, other = picture(1, 3, 6, 6), picture(1, 3, 50, 70, seed=4)
    plain = restore(lr, system)
    guided, again = (restore(lr, system, reference=other) for _ in range(2))
    assert torch.equal(guided, again) and not torch.allclose(guided, plain, atol=1e-4)
    assert not torch.allclose(guided, restore(lr, system, reference=1 - other), atol=1e-4)


def test_how_the_vision_encoder_sees_long_pictures(system):
    lr = picture(1, 3, 6, 30)
    ends = lr.clone()
    ends[..., :6] = 0.5
    crops, squeezed = ([system.vision.encode(x, fit) for x in (lr, ends)] for fit in ("crop", "squeeze"))
    assert torch.equal(*crops) and not torch.equal(*squeezed)
    assert not torch.equal(restore(lr, system, steps=1), restore(lr, system, steps=1, fit="squeeze"))


def test_a_run_can_be_stopped_and_nan_is_named(system):
    def stop(i, n, x, x0):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore(picture(1, 3, 6, 6), system, on_step=stop)
    system.network.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(NonFiniteLatentError, match=r"after step 1 of 2.*the network's prediction"):
        restore(picture(1, 3, 6, 6), system)


@pytest.mark.parametrize(("options", "words"), [
    ({"start_sigma": 0.5}, "no option start_sigma"), ({"color_fix": "reinhard"}, "colour fix is 'reinhard'"),
    ({"scheduler": "heun"}, "no scheduler 'heun'"), ({"adaptive": "always"}, "'always'"),
    ({"fit": "stretch"}, "fit is"),
    ({"steps": 0}, "steps is 0"), ({"preview_start": 2.0}, "preview_start is 2")])
def test_impossible_settings_are_refused(system, options, words):
    with pytest.raises(ValueError, match=words):
        restore(picture(1, 3, 4, 4), system, **options)


def test_what_is_no_picture_is_refused(system):
    nothing = torch.full((1, 3, 4, 4), float("nan"))
    for wrong in (picture(3, 8, 8), picture(1, 5, 8, 8), nothing, 255 * picture(1, 3, 4, 4)):
        with pytest.raises(ValueError):
            restore(wrong, system)


# load_system ------------------------------------------------------------------------------------------------------

def test_tiny_training_export_is_a_system(system, tmp_path):
    system.network.save_pretrained(tmp_path / "instantir_tiny.safetensors")
    system.text.save(tmp_path / "text.safetensors")
    system.vision.save(tmp_path / "vision.safetensors")
    with pytest.raises(FileNotFoundError, match=r"codec\.safetensors"):
        load_system(tmp_path, device="cpu")
    system.autoencoder.save(tmp_path / "codec.safetensors")
    loaded = load_system(tmp_path, device="cpu")
    assert loaded.sampling == PRESETS["tiny"].sampling and loaded.captioner is not None
    loaded.sampling, loaded.captioner = system.sampling, system.captioner
    loaded.negative_prompt = system.negative_prompt
    assert torch.equal(restore(picture(1, 3, 5, 5), loaded), restore(picture(1, 3, 5, 5), system))


@pytest.fixture
def full(small_sdxl, network, tmp_path):
    """Folders as a user lays them out: InstantIR's three files, DINOv2 beside them, SDXL; all small."""
    model = network(unet=json.loads((small_sdxl.folder / "unet" / "config.json").read_text()),
                    resampler=dict(output_dim=small_sdxl.width, dim=64, dim_head=64, heads=1))
    places = {"adapter": "adapter.pt", "aggregator": "aggregator.pt", "previewer": "previewer_lora_weights.bin"}
    for part, name in places.items():
        model.save_part(tmp_path / "part.safetensors", part)
        torch.save(load_file(tmp_path / "part.safetensors"), tmp_path / name)
    (tmp_path / "part.safetensors").unlink()
    sizes = dict(hidden_size=6, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=16)
    VisionEncoder.new(sizes, Preprocessing()).network.save_pretrained(tmp_path / "dinov2-large")
    crop = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    (tmp_path / "dinov2-large" / "preprocessor_config.json").write_text(json.dumps(crop))
    return tmp_path


def test_the_published_files_on_sdxl_are_a_system(full, small_sdxl):
    loaded = load_system(full, base=small_sdxl.folder, device="cpu")
    assert loaded.prompt == POSITIVE and loaded.negative_prompt == NEGATIVE and loaded.captioner is None
    assert loaded.sampling == PRESETS["full"].sampling
    loaded.sampling = replace(loaded.sampling, steps=2, min_short_side=64, max_long_side=64, multiple=32)
    sr = restore(picture(1, 3, 12, 16), loaded)
    assert sr.shape == (1, 3, 48, 64) and sr.isfinite().all()


def test_parts_that_a_trainer_wrote_take_the_published_ones_place(full, small_sdxl):
    save_file(torch.load(full / "adapter.pt"), full / "adapter.safetensors")
    (full / "adapter.pt").unlink()
    shutil.move(full / "dinov2-large", full / "elsewhere")
    loaded = load_system(full, base=small_sdxl.folder, device="cpu", vision=full / "elsewhere",
                         captioner=lambda images: ["a cat"] * len(images))
    assert loaded.network.aggregator is not None and loaded.captioner is not None


def test_missing_parts_are_named(full, small_sdxl, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"needs SDXL 1\.0 beside it"):
        load_system(full, device="cpu")
    shutil.move(full / "dinov2-large", tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=r"no folder .*dinov2-large.*facebook/dinov2-large"):
        load_system(full, base=small_sdxl.folder, device="cpu")
    shutil.move(tmp_path / "away", full / "dinov2-large")
    with pytest.raises(WrongFileError, match="SDXL base model"):
        load_system(full, base=full / "dinov2-large", device="cpu")
    (full / "aggregator.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"aggregator\.pt does not exist.*InstantX/InstantIR"):
        load_system(full, base=small_sdxl.folder, device="cpu")
