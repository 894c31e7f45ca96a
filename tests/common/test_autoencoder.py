"""Stable Diffusion's autoencoder, small and random, against diffusers' own."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from fourfold.nodes.common import autoencoder
from fourfold.nodes.common.autoencoder import KLAutoencoder, to_model, to_vae
from fourfold.nodes.common.errors import CorruptCheckpointError, MismatchedKeysError, WrongFileError
from safetensors.torch import load_file, save_file

FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=16, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False)
    folder = tmp_path_factory.mktemp("sd3")
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def picture(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def test_encodes_to_the_mean_and_decodes_like_diffusers(folder):
    ours = KLAutoencoder.from_pretrained(folder)
    theirs = AutoencoderKL.from_pretrained(folder / "vae")
    pixels = picture(2, 3, 16, 24)
    latent = ours.encode(pixels)
    with torch.no_grad():
        torch.testing.assert_close(latent, theirs.encode(2 * pixels - 1).latent_dist.mean)
        decoded = theirs.decode(latent).sample
    assert latent.shape == (2, 16, 4, 6)
    torch.testing.assert_close(ours.decode(latent), ((decoded + 1) / 2).clamp(0, 1))
    assert torch.equal(latent, ours.encode(pixels)), "the mean, not a draw"


def test_says_what_restoring_needs_to_know(folder):
    ours = KLAutoencoder.from_pretrained(folder / "vae")
    assert (ours.downscale, ours.latent_channels, ours.shift, ours.scale) == (4, 16, 0.0609, 1.5305)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


def test_without_a_shift_it_is_zero(copy):
    config = json.loads((copy / "vae/config.json").read_text())
    (copy / "vae/config.json").write_text(json.dumps(config | {"shift_factor": None}))
    assert KLAutoencoder.from_pretrained(copy).shift == 0.0


def test_half_precision_takes_and_gives_float32(folder):
    ours = KLAutoencoder.from_pretrained(folder, torch.bfloat16)
    latent = ours.encode(picture(1, 3, 8, 8))
    assert latent.dtype == ours.decode(latent).dtype == torch.float32
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}


def test_large_pictures_go_tile_by_tile(folder, monkeypatch):
    whole = KLAutoencoder.from_pretrained(folder)
    monkeypatch.setattr(autoencoder, "TILED_FROM", 64)
    tiled = KLAutoencoder.from_pretrained(folder)
    pixels, sizes = picture(1, 3, 64, 144), []
    note = tiled.vae.encoder.conv_in.register_forward_pre_hook
    note(lambda _, arguments: sizes.append(tuple(arguments[0].shape[-2:])))
    latent = tiled.encode(pixels)
    assert latent.shape == (1, 16, 16, 36) and len(sizes) > 1 and max(max(size) for size in sizes) == 64
    error = (latent - whole.encode(pixels)).norm() / whole.encode(pixels).norm()
    assert error < 0.3, "tiles differ by what norms and attention see beyond their borders"
    assert tiled.decode(latent).shape == pixels.shape
    del sizes[:]
    assert torch.equal(tiled.encode(pixels[..., :64]), whole.encode(pixels[..., :64])) and len(sizes) == 1


def test_scaling_of_latents_and_back():
    latent = picture(1, 16, 2, 2)
    torch.testing.assert_close(to_model(latent, 0.0609, 1.5305), (latent - 0.0609) * 1.5305)
    torch.testing.assert_close(to_vae(to_model(latent, 0.0609, 1.5305), 0.0609, 1.5305), latent)


def test_what_is_no_autoencoder_is_named(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no VAE in .*nowhere.*stable-diffusion-3\.5-medium"):
        KLAutoencoder.from_pretrained(tmp_path / "nowhere")
    state = load_file(copy / FILE)
    less = {name: value for name, value in state.items() if name != "decoder.conv_out.bias"}
    save_file(less | {"surplus": torch.zeros(1)}, copy / FILE, metadata={"format": "pt"})
    with pytest.raises(MismatchedKeysError, match=r"missing: .*decoder\.conv_out\.bias.*unexpected: .*surplus"):
        KLAutoencoder.from_pretrained(copy)
    save_file({"transformer_blocks.0.ff.control_conv.bias": torch.zeros(1)}, copy / FILE)
    with pytest.raises(WrongFileError, match=r"is a DiT4SR transformer.*autoencoder with 16 latent channels"):
        KLAutoencoder.from_pretrained(copy)
    (copy / FILE).write_bytes((copy / FILE).read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match="truncated"):
        KLAutoencoder.from_pretrained(copy)
