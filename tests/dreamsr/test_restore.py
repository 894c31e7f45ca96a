"""`restore` on pictures and `load_system`, with small random networks."""

from dataclasses import replace

import pytest
import torch
from fourfold.nodes.common.codec import CodecConfig, LinearCodec
from fourfold.nodes.common.errors import WrongFileError
from fourfold.nodes.common.images import resize
from fourfold.nodes.common.text import TextEmbedding
from fourfold.nodes.common.tiling import Box
from fourfold.nodes.common.tiny_text import TinyTextConfig, TinyTextEncoder
from fourfold.nodes.dreamsr.config import PRESETS, Preset, Sampling
from fourfold.nodes.dreamsr.model import DreamSR
from fourfold.nodes.dreamsr.patches import plan_patches
from fourfold.nodes.dreamsr.prompts import PatchPrompts, format_prompts
from fourfold.nodes.dreamsr.restore import System, load_system, restore

SETTINGS = Sampling(steps=2, tile=16, overlap=4, tile_batch=4, multiple=8, min_short_side=16, color_fix="adain")


@pytest.fixture
def system(network, small):
    """A whole system at the small size: latents a quarter of the picture, prompts of up to 32 bytes."""
    torch.manual_seed(1)
    codec, text = LinearCodec(CodecConfig(latent_channels=4)), TinyTextEncoder(TinyTextConfig(12, 1, 2, 16, 32))
    asked = []

    def captioner(images):
        asked.append(tuple(images.shape))
        return [f"caption {i}" for i in range(len(images))]

    model = network(pooled_projection_dim=12, latent_shift=0.05, latent_scale=1.5, t_dr=0.5)
    made = System.of(Preset(model.config, SETTINGS, clean_captions=False, negative_prompt="bad"), model, codec.eval(),
                     text.eval().requires_grad_(False), captioner)
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


@pytest.mark.parametrize(("scale", "expected"), [(1, (5, 7)), (2.5, (12, 18))])
def test_any_scale_or_an_exact_size(system, scale, expected):
    assert restore(picture(1, 3, 5, 7), system, scale=scale, steps=1).shape[-2:] == expected
    assert restore(picture(1, 3, 5, 7), system, size=(11, 30), steps=1).shape[-2:] == (11, 30)


def test_alpha_is_kept(system):
    lr = picture(1, 4, 6, 6)
    sr = restore(lr, system, steps=1)
    torch.testing.assert_close(sr[:, 3:], resize(lr[:, 3:], (24, 24)))
    torch.testing.assert_close(sr[:, :3], restore(lr[:, :3], system, steps=1))


def test_batch_of_two_pictures_equals_two_singles_with_following_seeds(system):
    lr = picture(2, 3, 16, 28)
    prompts = [PatchPrompts("a cat", ("fur", "grass")), PatchPrompts("a longer prompt", ("sky", "sea"))]
    both = restore(lr, system, seed=11, patch_prompts=prompts)
    for row in range(2):
        single = restore(lr[row : row + 1], system, seed=11 + row, patch_prompts=prompts[row : row + 1])
        torch.testing.assert_close(both[row : row + 1], single, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both, restore(lr, system, seed=12, patch_prompts=prompts), atol=1e-3)


# prompts ----------------------------------------------------------------------------------------------------------

def test_the_picture_and_every_patch_are_captioned_unless_prompts_are_given(system):
    lr = picture(1, 3, 16, 28)
    captioned = restore(lr, system)
    assert system.asked == [(1, 3, 64, 112), (2, 3, 64, 64)]
    prompts = [PatchPrompts("caption 0", ("caption 0", "caption 1"))]
    assert torch.equal(restore(lr, system, patch_prompts=prompts), captioned)
    plan = [Box(0, 0, 16, 16), Box(0, 12, 16, 16)]
    assert torch.equal(restore(lr, system, patch_prompts=format_prompts(prompts, plan)), captioned)
    assert len(system.asked) == 2
    for other in (PatchPrompts("caption 1", ("caption 0", "caption 1")), PatchPrompts("caption 0", ("caption 1",) * 2)):
        assert not torch.allclose(restore(lr, system, patch_prompts=[other]), captioned, atol=1e-4)
    assert torch.equal(restore(lr, system, prompt="caption 0"), captioned), "a prompt replaces the global one alone"


def test_prompts_of_wrong_counts_are_refused(system):
    lr = picture(2, 3, 16, 28)
    with pytest.raises(ValueError, match="3 prompts for 2 pictures"):
        restore(lr, system, prompt=["a", "b", "c"])
    with pytest.raises(ValueError, match="patch prompts of 1 pictures for 2 pictures"):
        restore(lr, system, patch_prompts=[PatchPrompts("a", ("b", "c"))])
    with pytest.raises(ValueError, match="1 prompts for 2 patches"):
        restore(lr, system, patch_prompts=[PatchPrompts("a", ("b",))] * 2)
    with pytest.raises(ValueError, match=r"4 missing: \[picture 1, patch 2\]"):
        restore(lr, system, patch_prompts="[global]\na\n[patch 1]\nb")


def test_captions_say_nothing_of_damage_at_full_size(system, monkeypatch):
    encoded = []
    encode = system.text.encode
    monkeypatch.setattr(system.text, "encode", lambda prompts: encoded.extend(prompts) or encode(prompts))
    full = replace(system, captioner=lambda images: ["A dog. It is blurred."] * len(images), clean_captions=True)
    restore(picture(1, 3, 4, 4), full, steps=1)
    assert encoded == ["A dog.", "A dog."]
    del encoded[:]
    restore(picture(1, 3, 4, 4), full, steps=1, prompt="My dog. It is blurred.", cfg=2.0, negative="ugly")
    assert encoded == ["My dog. It is blurred.", "A dog.", "ugly"], "the user's own words are kept"
    del encoded[:]
    restore(picture(1, 3, 4, 4), full, steps=1, cfg=2.0)
    assert encoded[-1] == "bad", "the preset's negative prompt"


def test_what_is_used_is_told(system):
    told = []
    restore(picture(1, 3, 16, 28), system, steps=1, prompt="a dog", on_settings=told.append)
    assert told[0]["prompt"] == ["a dog"] and told[0]["patches"] == 2
    assert (told[0]["steps"], told[0]["start"], told[0]["removal"], told[0]["negative"]) == (1, 0.8, True, "bad")


# settings ---------------------------------------------------------------------------------------------------------

def test_settings_replace_those_of_the_system(system):
    steps = []
    restore(picture(1, 3, 4, 4), system, on_step=lambda i, n, x, x0: steps.append(n))
    restore(picture(1, 3, 4, 4), system, steps=3, removal=False, on_step=lambda i, n, x, x0: steps.append(n))
    assert steps == [3, 3, 3, 3, 3, 3]
    windows = []
    restore(picture(1, 3, 24, 24), system, steps=1, tile=12, overlap=0, tile_batch=4, removal=False,
            on_window=lambda done, total: windows.append((done, total)))
    assert windows == [(4, 4)]
    plain = restore(picture(1, 3, 4, 4), system)
    for change in (dict(start=0.5), dict(guidance=1.0), dict(spacing="flux"), dict(removal=False),
                   dict(color_fix="none"), dict(cfg=2.0)):
        assert not torch.equal(restore(picture(1, 3, 4, 4), system, **change), plain), change
    with pytest.raises(ValueError, match="colour fix is 'reinhard'; expected one of adain, wavelet, none"):
        restore(picture(1, 3, 4, 4), system, color_fix="reinhard")


def test_a_network_without_ra_lora_leaves_the_removal_out(system, network):
    plain = network(pooled_projection_dim=12, lora_rank=0)
    without = System.of(Preset(plain.config, SETTINGS), plain, system.autoencoder, system.text, system.captioner)
    assert not without.sampling.removal and restore(picture(1, 3, 4, 4), without, steps=1).isfinite().all()
    with pytest.raises(ValueError, match="no RA-LoRA"):
        restore(picture(1, 3, 4, 4), without, steps=1, removal=True)


class Numbers(torch.nn.Module):
    """Encodes "light 3" as 1 and "dark 3" as -1."""

    def encode(self, prompts):
        sign = torch.tensor([1.0 if prompt.startswith("light") else -1.0 for prompt in prompts])
        return TextEmbedding(sign[:, None, None].expand(-1, 1, 12), sign[:, None].expand(-1, 12))


class Disagreeing(DreamSR):
    """A network that gives its condition back, lighter or darker by 10 levels as the patch's prompt has it."""

    def forward(self, latent, condition, t, prompt, local, *_, **__):
        light = 20 / 255 * local.pooled[:, 0]  # pictures are -1..1 for the codec
        return (latent - condition - light[:, None, None, None]) / t


@pytest.mark.parametrize("kind", ["flat", "smooth"])
def test_a_large_flat_or_smooth_picture_has_no_seams(small, kind):
    """2048 px in windows of 64 latents of which neighbours disagree by 40 levels: at their borders neighbouring pixels
    differ by less than one level more than in the low-resolution picture."""
    codec = LinearCodec(CodecConfig(patch=8, latent_channels=4))  # the mean colour of 8 x 8 px
    for part in codec.parameters():
        part.zero_()
    for color in range(3):
        codec.encoder.weight[color, 64 * color : 64 * (color + 1)] = 1 / 64
        codec.decoder.weight[64 * color : 64 * (color + 1), color, 1, 1] = 1
    model = Disagreeing(small(pooled_projection_dim=12, latent_shift=0.0, latent_scale=1.0)).requires_grad_(False)
    settings = replace(SETTINGS, tile=64, overlap=16, multiple=16, color_fix="none")
    made = System.of(Preset(model.config, settings), model, codec, Numbers(),
                     lambda x: [("light", "dark")[i % 2] for i in range(len(x))])
    level = torch.tensor([0.6, 0.5, 0.3])[None, :, None, None].expand(1, 3, 512, 512)
    ramp = torch.linspace(0, 0.3, 512)
    lr = level if kind == "flat" else level - 0.1 + 0.5 * (ramp[:, None] + ramp)
    change = 255 * (restore(lr, made, steps=4) - codec.decode(codec.encode(resize(lr, (2048, 2048)))))
    plan = plan_patches(256, 256, 64, 16)
    middles = torch.stack([change[0, 0, 8 * box.top + 256, 8 * box.left + 256] for box in plan])
    assert middles.abs().min() > 19 and len(middles.sign().unique()) == 2, "every window rules its middle"
    for axis, starts in ((-1, {8 * box.left for box in plan}), (-2, {8 * box.top for box in plan})):
        steps = change.diff(dim=axis).abs().amax(dim=(0, 1, -3 - axis))
        borders = (starts | {start + 512 for start in starts}) - {0, 2048}
        assert len(borders) == 8 and max(float(steps[border - 1]) for border in borders) < 1


# load_system ------------------------------------------------------------------------------------------------------

def test_tiny_training_export_is_a_system(system, tmp_path):
    system.network.save_pretrained(tmp_path)
    system.text.save(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match=r"codec\.safetensors"):
        load_system(tmp_path, device="cpu")
    system.autoencoder.save(tmp_path / "codec.safetensors")
    loaded = load_system(tmp_path, device="cpu", captioner=system.captioner)
    assert loaded.sampling == PRESETS["tiny"].sampling and loaded.negative_prompt == "flat, blurred"
    loaded.sampling = system.sampling
    ours, theirs = (restore(picture(1, 3, 5, 5), s) for s in (loaded, system))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)  # weights lie at other addresses, sums round otherwise


@pytest.mark.parametrize("layout", ["folder", "files"])
def test_adapters_on_flux_in_either_layout_are_a_system(small_flux, tmp_path, layout):
    torch.manual_seed(0)
    model = DreamSR.from_base(small_flux.folder, lora_rank=2)
    model.save_pretrained(tmp_path / "adapters.safetensors", parts=("control", "ra_lora"))
    base = getattr(small_flux, layout)
    loaded = load_system(tmp_path / "adapters.safetensors", base, device="cpu")
    assert loaded.sampling == PRESETS["full"].sampling and loaded.clean_captions
    loaded.sampling = replace(loaded.sampling, min_short_side=16)
    sr = restore(picture(1, 3, 9, 12), loaded, size=(24, 36), steps=1)
    assert sr.shape == (1, 3, 24, 36) and sr.isfinite().all()


def test_networks_take_turns_on_the_device_where_asked(system, tmp_path):
    system.network.save_pretrained(tmp_path)
    system.text.save(tmp_path / "text.safetensors")
    system.autoencoder.save(tmp_path / "codec.safetensors")
    offloaded, placed = (load_system(tmp_path, device="cpu", offload=offload) for offload in (True, None))
    assert (offloaded.offload, placed.offload) == (True, False)
    weights = [p.data_ptr() for p in offloaded.network.parameters()]
    pictures = [restore(picture(1, 3, 5, 5), s, steps=1) for s in (offloaded, placed)]
    torch.testing.assert_close(*pictures, atol=1e-3, rtol=0)
    assert weights == [p.data_ptr() for p in offloaded.network.parameters()]


def test_missing_and_wrong_parts_are_named(small_flux, network, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"DreamSR network is missing: .*adapters\.safetensors"):
        load_system(tmp_path / "adapters.safetensors", device="cpu")
    with pytest.raises(WrongFileError, match=r"flux1-dev\.safetensors is a FLUX\.1-dev transformer"):
        load_system(small_flux.files / "flux1-dev.safetensors", device="cpu")
    network().save_pretrained(tmp_path / "adapters.safetensors", parts=("control",))
    with pytest.raises(FileNotFoundError, match=r"adapters\.safetensors needs FLUX\.1-dev beside it"):
        load_system(tmp_path / "adapters.safetensors", device="cpu")
    with pytest.raises(FileNotFoundError, match=r"FLUX's autoencoder, ae\.safetensors, is missing"):
        load_system(tmp_path / "adapters.safetensors", tmp_path, device="cpu")
