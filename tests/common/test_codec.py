"""The linear codec: what it keeps of photographs, and that it is linear."""

from pathlib import Path

import pytest
import torch
from fourfold.nodes.common.checkpoints import read_header
from fourfold.nodes.common.codec import CodecConfig, LinearCodec
from fourfold.nodes.common.images import read_image
from fourfold.nodes.common.tiny import load_codec
from torch.nn.functional import interpolate

CLEAN = Path(__file__).parents[2] / "photographs" / "clean"


@pytest.fixture(scope="module")
def codec():
    return load_codec()


@pytest.fixture
def random_codec():
    torch.manual_seed(0)
    return LinearCodec(CodecConfig(latent_channels=5, shift=0.5, scale=2.0))


def psnr(a, b):
    return -10 * (a - b).square().mean().log10().item()


def smooth(channels):
    coarse = torch.rand(1, channels, 9, 13, generator=torch.Generator().manual_seed(0))
    return interpolate(coarse, size=(144, 208), mode="bicubic").clamp(0, 1).expand(1, 3, -1, -1)


def photographs():
    pictures = {path.stem: read_image(path)[..., :256, :256] for path in sorted(CLEAN.glob("*.jpg"))}
    return {name: picture.expand(1, 3, -1, -1) for name, picture in pictures.items()}


@pytest.mark.parametrize(("channels", "least"), [(1, 60), (3, 43)])
def test_smooth_pictures_come_back_almost_unchanged(codec, channels, least):
    assert psnr(codec.decode(codec.encode(smooth(channels))), smooth(channels)) > least


def test_photographs_lose_little(codec):
    kept = {name: psnr(codec.decode(codec.encode(p)), p) for name, p in photographs().items()}
    assert sum(kept.values()) / len(kept) > 39 and min(kept.values()) > 33, kept


def test_scaled_latents_of_photographs_have_a_mean_square_near_one(codec):
    squares = [codec.encode(p).square().mean() for p in photographs().values()]
    assert codec.shift == 0 and 0.5 < sum(squares) / len(squares) * codec.scale**2 < 2


def test_borders_of_blocks_do_not_show(codec):
    """On a gradient, what is added to the steps between blocks stays far below one of 255 levels."""
    again = codec.decode(codec.encode(smooth(1)))
    steps = (again - smooth(1)).diff(dim=-1).abs().mean((0, 1, 2))
    assert steps[3::4].mean() < 0.3 / 255


def test_encoding_is_affine_and_so_is_decoding(random_codec):
    a, b = torch.rand(2, 2, 3, 8, 12, generator=torch.Generator().manual_seed(2)).unbind()
    encode = random_codec.encode
    torch.testing.assert_close(encode(0.3 * a + 0.7 * b), 0.3 * encode(a) + 0.7 * encode(b), atol=1e-5, rtol=1e-5)
    random_codec.decoder.weight.mul_(0.02)  # within 0..1: nothing is clamped
    z_a, z_b = encode(a), encode(b)
    mixed = 0.3 * random_codec.decode(z_a) + 0.7 * random_codec.decode(z_b)
    torch.testing.assert_close(random_codec.decode(0.3 * z_a + 0.7 * z_b), mixed, atol=1e-5, rtol=1e-5)


def test_sizes(random_codec):
    assert (random_codec.downscale, random_codec.latent_channels) == (4, 5)
    assert (random_codec.shift, random_codec.scale) == (0.5, 2.0)
    latent = random_codec.encode(torch.rand(2, 3, 4, 20))
    assert latent.shape == (2, 5, 1, 5) and random_codec.decode(latent).shape == (2, 3, 4, 20)
    assert not any(p.requires_grad for p in random_codec.parameters())
    for size in ((6, 8), (8, 7)):
        with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} px; both sides must be multiples of 4"):
            random_codec.encode(torch.rand(1, 3, *size))


def test_pictures_of_a_batch_do_not_meet(random_codec):
    pictures = torch.rand(3, 3, 8, 8)
    latent = random_codec.encode(pictures)
    torch.testing.assert_close(latent[1:2], random_codec.encode(pictures[1:2]))
    torch.testing.assert_close(random_codec.decode(latent)[1:2], random_codec.decode(latent[1:2]))


def test_saving_and_loading(random_codec, tmp_path):
    random_codec.save(tmp_path / "codec.safetensors", training={"photographs": 3})
    again = LinearCodec.load(tmp_path / "codec.safetensors")
    assert again.config == random_codec.config and not again.training
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.equal(again.encode(pixels), random_codec.encode(pixels))
    header = read_header(tmp_path / "codec.safetensors")
    assert header.method == "codec" and header.training == {"photographs": 3}
