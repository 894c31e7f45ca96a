"""Solving the codec: principal components and least squares, checked by what they promise."""

from pathlib import Path

import pytest
import torch
from fourfold.nodes.common.checkpoints import read_header
from fourfold.nodes.common.codec import CodecConfig, LinearCodec
from fourfold.nodes.common.images import read_image, write_image
from fourfold.trainers.fit_codec import Pictures, fit_codec, main
from torch.nn.functional import avg_pool2d, pixel_unshuffle

CLEAN = Path(__file__).parents[2] / "photographs" / "clean"


def photograph(seed, height=96, width=128):
    """Noise with the spectrum of photographs, roughly: a sum of ever coarser octaves; contrast stays off the limits."""
    draws = torch.Generator().manual_seed(seed)
    picture = torch.zeros(1, 3, height, width)
    for octave in (1, 2, 4, 8, 16):
        light, colour = (torch.randn(1, c, height, width, generator=draws) for c in (1, 3))
        picture += octave * avg_pool2d(light + 0.3 * colour, 2 * octave - 1, 1, octave - 1)
    return (0.5 + 0.07 * picture).clamp(0.02, 0.98)


@pytest.fixture(scope="module")
def pictures():
    return [photograph(seed) for seed in range(4)]


def mse(codec, pictures):
    errors = [codec.decode(codec.encode(p)) - p for p in pictures]
    return torch.cat([error.flatten() for error in errors]).double().square().mean().item()


def test_encoder_keeps_the_directions_of_largest_variance(pictures):
    codec = fit_codec(pictures, CodecConfig(patch=4, latent_channels=6))
    patches = torch.cat([pixel_unshuffle(2 * p.double() - 1, 4).flatten(2)[0] for p in pictures], dim=1)
    variances, vectors = torch.linalg.eigh(torch.cov(patches, correction=0))
    rows = codec.encoder.weight[:, :, 0, 0].double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(6).double(), atol=1e-5, rtol=0)
    kept = (rows @ vectors[:, -6:]).square().sum(dim=1)
    torch.testing.assert_close(kept, torch.ones(6).double(), atol=1e-4, rtol=0)
    codes = torch.cat([codec.encode(p).flatten(2)[0] for p in pictures], dim=1).double()
    torch.testing.assert_close(codes.var(dim=1, correction=0), variances[-6:].flip(0), rtol=1e-3, atol=1e-6)
    assert codes.mean(dim=1).abs().max() < 1e-3


def test_error_without_neighbours_is_the_variance_that_is_left_out(pictures):
    codec = fit_codec(pictures, CodecConfig(4, 6, neighbourhood=1), ridge=0.0)
    patches = torch.cat([pixel_unshuffle(2 * p.double() - 1, 4).flatten(2)[0] for p in pictures], dim=1)
    left_out = torch.linalg.eigvalsh(torch.cov(patches, correction=0))[:-6].sum() / patches.shape[0]
    assert mse(codec, pictures) == pytest.approx(left_out.item() / 4, rel=0.02)  # -1..1 is twice as wide as 0..1


def test_on_photographs_neighbours_help_and_more_channels_help():
    known, unseen = ([read_image(CLEAN / f"{name}.jpg")[..., :256, :256] for name in names]
                     for names in (("cat", "coffee", "astronaut"), ("rocket",)))
    alone, around, more = (mse(fit_codec(known, config), unseen)
                           for config in (CodecConfig(4, 6, 1), CodecConfig(4, 6, 3), CodecConfig(4, 12, 3)))
    assert around < 0.97 * alone and more < 0.7 * around


def test_all_channels_lose_nothing(pictures):
    assert mse(fit_codec(pictures, CodecConfig(2, 12), ridge=0.0), pictures) < 1e-9


def test_scaled_latents_have_a_mean_square_of_one(pictures):
    codec = fit_codec(pictures)
    square = sum(codec.encode(p).square().mean() for p in pictures) / len(pictures)
    assert (square * codec.scale**2).item() == pytest.approx(1, rel=1e-3)
    assert codec.shift == 0 and codec.config == CodecConfig(scale=codec.scale)


def test_nothing_to_fit_is_refused():
    with pytest.raises(ValueError, match="no pictures"):
        fit_codec([])


def test_pictures_are_cropped_and_turned_to_rgb(tmp_path, caplog):
    write_image(tmp_path / "a.png", photograph(0, 50, 61))
    write_image(tmp_path / "b.png", photograph(1, 48, 64)[:, :1])
    write_image(tmp_path / "c.png", torch.cat([photograph(2, 48, 64), torch.ones(1, 1, 48, 64)], dim=1))
    write_image(tmp_path / "d.png", photograph(3, 11, 40))
    pictures = Pictures(tmp_path, 4)
    shapes = [tuple(p.shape) for p in pictures]
    assert shapes == [(1, 3, 48, 60), (1, 3, 48, 64), (1, 3, 48, 64)] == [tuple(p.shape) for p in pictures]
    assert "d.png is smaller than 12 px" in caplog.text


def test_command_writes_a_file_that_describes_itself(tmp_path):
    for seed in range(3):
        write_image(tmp_path / f"{seed}.png", photograph(seed))
    file = tmp_path / "out" / "codec.safetensors"
    codec = main(["--photographs", str(tmp_path), "--output", str(file)])
    again = LinearCodec.load(file)
    assert torch.equal(again.encode(photograph(5)), codec.encode(photograph(5)))
    training = read_header(file).training
    assert training["photographs"] == 3 and training["train_psnr_db"] > 30
