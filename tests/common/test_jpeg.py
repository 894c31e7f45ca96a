"""The tensor JPEG against Pillow's files."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fourfold.nodes.common.jpeg import jpeg, quantisation_tables
from PIL import Image


def photograph(height, width, seed=0):
    """Something with a photograph's spectrum: noise at six scales, an edge and a saturated patch; (1, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.zeros(1, 3, height, width)
    for octave in range(6):
        coarse = torch.randn(1, 3, max(2, height >> octave), max(2, width >> octave), generator=generator)
        picture += F.interpolate(coarse, (height, width), mode="bicubic") * 0.012 * 2**octave**0.9
    picture += 0.5
    picture[..., width // 2 :] *= 0.7
    picture[:, 0, : height // 3, : width // 3] += 0.4
    return (picture.clamp(0, 1) * 255).round() / 255


def through_a_file(picture, quality):
    array = (picture[0].permute(1, 2, 0) * 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def psnr(a, b):
    return (-10 * torch.log10(F.mse_loss(a, b) + 1e-12)).item()


@pytest.mark.parametrize("quality", [10, 30, 50, 75, 90, 95, 100])
@pytest.mark.parametrize("size", [(96, 128), (50, 67), (33, 31)])
def test_agrees_with_pillow(size, quality):
    picture = photograph(*size)
    ours, theirs = jpeg(picture, quality), through_a_file(picture, quality)
    agreement, loss = psnr(ours, theirs), psnr(theirs, picture)
    assert agreement > 40, (agreement, loss)
    assert agreement > loss + 1  # nearer to the file than the file is to the picture
    assert psnr(ours, picture) == pytest.approx(loss, abs=0.35)


@pytest.mark.parametrize("quality", [1, 7, 25, 49, 50, 51, 75, 92, 100])
def test_tables_are_those_in_the_file(quality):
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality)
    luma, chroma = Image.open(file).quantization.values()
    ours = quantisation_tables(torch.tensor([float(quality)]))[0].int()
    assert ours[0].flatten().tolist() == luma
    assert ours[1].flatten().tolist() == chroma


def test_quality_is_monotonous_and_may_be_fractional():
    picture = photograph(64, 64)
    qualities = [5.5, 20.3, 40.0, 60.7, 80.2, 95.9]
    losses = [psnr(jpeg(picture, q), picture) for q in qualities]
    assert losses == sorted(losses) and losses[-1] - losses[0] > 8
    assert torch.equal(jpeg(picture, torch.tensor([40.0])), jpeg(picture, 40))


def test_every_picture_of_a_batch_has_its_own_quality():
    pictures = torch.cat([photograph(40, 56, seed) for seed in range(3)])
    qualities = torch.tensor([15.0, 55.5, 92.0])
    together = jpeg(pictures, qualities)
    for row in range(3):
        assert torch.equal(together[row : row + 1], jpeg(pictures[row : row + 1], qualities[row].item()))


def test_flat_pictures_stay_flat_and_grey_stays_grey():
    flat = torch.full((1, 3, 24, 40), 200 / 255)
    assert (jpeg(flat, 75) - flat).abs().max() <= 1.01 / 255
    grey = photograph(48, 48).mean(dim=1, keepdim=True).expand(1, 3, 48, 48)
    result = jpeg(grey, 60)
    assert torch.equal(result[:, 0], result[:, 1]) and torch.equal(result[:, 1], result[:, 2])


def test_chroma_is_halved_and_luma_is_not():
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    colour = torch.stack((0.5 + 0.2 * board, 0.5 - 0.2 * board * 0.299 / 0.587, 0.5 + 0.0 * board))[None]
    luma = (0.5 + 0.2 * board).expand(1, 3, 32, 32)
    inner = (..., slice(4, 28), slice(4, 28))
    assert jpeg(colour, 95)[inner].std(dim=(-1, -2)).max() < 0.02  # the coloured board becomes one even colour
    assert jpeg(luma, 95)[inner].std(dim=(-1, -2)).min() > 0.09


def test_steps_are_the_tables_multiples():
    """The DCT of a decoded grey block is a multiple of the table wherever nothing was clipped."""
    block = photograph(8, 8)[:, :1] * 0.5 + 0.25
    decoded = jpeg(block.expand(1, 3, 8, 8), 50)[0, 0] * 255 - 128
    n = torch.arange(8.0)
    dct = torch.cos(torch.pi / 16 * (2 * n + 1) * n[:, None]) / 2
    dct[0] /= 2**0.5
    steps = (dct @ decoded @ dct.T) / quantisation_tables(torch.tensor([50.0]))[0, 0]
    assert (steps - steps.round()).abs().max() < 0.15  # the pixels' rounding to 8 bits is left
    assert steps.round().abs().sum() >= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (3, 2), (16, 15)])
def test_any_size(size):
    picture = photograph(max(size[0], 4), max(size[1], 4))[..., : size[0], : size[1]]
    result = jpeg(picture, 90)
    assert result.shape == picture.shape and psnr(result, picture) > 20
    assert torch.equal(result, (result * 255).round() / 255)
    assert result.min() >= 0 and result.max() <= 1


def test_values_outside_the_range_are_clamped():
    picture = photograph(32, 32) * 3 - 1
    assert torch.equal(jpeg(picture, 80), jpeg(picture.clamp(0, 1), 80))


def test_keeps_the_dtype():
    assert jpeg(photograph(16, 16).double(), 80).dtype == torch.float64


@pytest.mark.parametrize(
    ("shape", "quality", "message"),
    [
        ((3, 16, 16), 50, r"\(B, 3, H, W\).*\(3, 16, 16\)"),
        ((1, 1, 16, 16), 50, r"\(B, 3, H, W\).*\(1, 1, 16, 16\)"),
        ((1, 3, 16, 16), 0, "1..100; got 0"),
        ((1, 3, 16, 16), 101.0, "1..100; got 101"),
        ((2, 3, 16, 16), torch.tensor([50.0, 0.5]), "1..100; got"),
        ((2, 3, 16, 16), torch.tensor([50.0]), r"one per picture \(2,\); got \(1,\)"),
    ],
)
def test_wrong_input_is_refused(shape, quality, message):
    with pytest.raises(ValueError, match=message):
        jpeg(torch.rand(shape), quality)
