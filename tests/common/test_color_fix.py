"""Colour fixes: the statistics they promise, and any size from one pixel."""

import pytest
import torch
from fourfold.nodes.common.color_fix import METHODS, adain, color_fix, low_frequencies, wavelet


def picture(seed, *shape, low=0.3, high=0.7):
    return low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_adain_gives_every_channel_of_every_sample_the_reference_statistics():
    sr, lr = picture(0, 2, 3, 20, 31, low=0.1, high=0.4), picture(1, 2, 3, 20, 31, low=0.5, high=0.8)
    fixed = adain(sr, lr)
    torch.testing.assert_close(fixed.mean((2, 3)), lr.mean((2, 3)), rtol=0, atol=1e-4)
    torch.testing.assert_close(fixed.std((2, 3)), lr.std((2, 3)), rtol=0, atol=1e-4)
    torch.testing.assert_close(fixed[1:], adain(sr[1:], lr[1:]))
    ranks = [image.flatten(2).argsort(dim=-1) for image in (sr, fixed)]
    assert torch.equal(*ranks)  # an increasing map: detail stays


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_a_picture_fixed_by_itself_stays(method):
    sr = picture(0, 2, 3, 17, 23)
    torch.testing.assert_close(color_fix(sr, sr, method), sr, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_a_colour_cast_is_removed(method):
    lr = picture(0, 1, 3, 40, 40)
    cast = torch.tensor([0.1, -0.05, 0.02]).view(1, 3, 1, 1)
    torch.testing.assert_close(color_fix(lr + cast, lr, method), lr, rtol=0, atol=1e-5)


def test_wavelet_keeps_high_frequencies_and_takes_low_ones():
    ramp = torch.linspace(0.3, 0.6, 256).expand(1, 3, 256, 256)
    checks = torch.zeros(1, 3, 256, 256)
    checks[..., ::2, ::2] = checks[..., 1::2, 1::2] = 0.1
    fixed = wavelet(0.4 + checks, ramp)
    detail = (fixed - ramp)[..., 64:-64, 64:-64]
    torch.testing.assert_close(detail, (checks - 0.05)[..., 64:-64, 64:-64], rtol=0, atol=1e-4)


def test_low_frequencies_of_an_impulse():
    impulse = torch.zeros(1, 1, 129, 129)
    impulse[..., 64, 64] = 1
    once = low_frequencies(impulse, levels=1)[0, 0, 63:66, 63:66]
    torch.testing.assert_close(once, torch.outer(*[torch.tensor([0.25, 0.5, 0.25])] * 2))
    five = low_frequencies(impulse)[0, 0]
    torch.testing.assert_close(five.sum(), torch.tensor(1.0))
    reach = (five > 0).nonzero()
    assert reach.min() == 64 - 31 and reach.max() == 64 + 31  # 1 + 2 + 4 + 8 + 16


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (33, 18)])
def test_any_size_gives_finite_values_in_range(method, size):
    sr, lr = picture(0, 2, 3, *size, low=-0.4, high=1.4).double(), picture(1, 2, 3, *size)
    fixed = color_fix(sr, lr, method)
    assert fixed.shape == lr.shape and fixed.dtype == torch.float32
    assert fixed.min() >= 0 and fixed.max() <= 1


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_flat_pictures(method):
    flat = torch.full((1, 3, 12, 12), 0.2)
    lr = torch.full((1, 3, 12, 12), 0.7)
    torch.testing.assert_close(color_fix(flat, lr, method), lr)
    assert torch.isfinite(color_fix(flat, picture(0, 1, 3, 12, 12), method)).all()


def test_wrong_arguments_are_named():
    sr = picture(0, 1, 3, 8, 8)
    with pytest.raises(ValueError, match="'histogram'; expected one of adain, wavelet, none"):
        color_fix(sr, sr, "histogram")
    for method in METHODS:
        with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\), the reference \(1, 3, 8, 9\)"):
            color_fix(sr, picture(0, 1, 3, 8, 9), method)
