"""Blur kernels against their formulas, and the filter against a plain correlation."""

import math

import pytest
import torch
import torch.nn.functional as F
from fourfold.nodes.common.blur_kernels import KERNEL_KINDS, bell_kernel, filter2d, sinc_kernel, trim

SIZES = (7, 13, 21)


def moments(kernel):
    """Covariance matrix of a kernel seen as a distribution over pixel offsets (x, y)."""
    axis = torch.arange(kernel.shape[-1], dtype=torch.float64) - kernel.shape[-1] // 2
    k = kernel.double()
    xx, yy = (k.sum(0) * axis**2).sum(), (k.sum(1) * axis**2).sum()
    xy = (k * axis[:, None] * axis).sum()
    return torch.tensor([[xx, xy], [xy, yy]])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KERNEL_KINDS)
def test_bell_kernels_sum_to_one_and_are_symmetric(kind, size):
    kernel = bell_kernel(kind, size, sigma_x=2.2, sigma_y=0.9, theta=0.7, beta=1.6)
    assert kernel.shape == (size, size) and kernel.dtype == torch.float32
    assert kernel.sum().item() == pytest.approx(1, abs=1e-6)
    assert kernel.min() >= 0 and kernel.argmax().item() == size * size // 2
    assert torch.allclose(kernel, kernel.flip(0, 1), atol=1e-7)  # every kind: point symmetry
    isotropic = not kind.endswith("aniso")
    assert torch.allclose(kernel, kernel.T, atol=1e-7) == isotropic
    assert torch.allclose(kernel, kernel.flip(0), atol=1e-7) == isotropic


def test_gaussian_has_the_covariance_it_was_asked_for():
    sigma_x, sigma_y, theta = 3.0, 1.5, 0.5
    rotation = torch.tensor([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    expected = rotation @ torch.diag(torch.tensor([sigma_x**2, sigma_y**2])) @ rotation.T
    measured = moments(bell_kernel("aniso", 41, sigma_x, sigma_y, theta))
    assert torch.allclose(measured, expected.double(), rtol=2e-3)
    assert torch.allclose(moments(bell_kernel("iso", 31, 2.0, 9.0)), 4.0 * torch.eye(2).double(), atol=1e-3)


def test_quarter_turn_swaps_the_axes():
    turned = bell_kernel("generalized_aniso", 15, 2.5, 1.0, math.pi / 2, beta=0.8)
    assert torch.allclose(turned, bell_kernel("generalized_aniso", 15, 1.0, 2.5, 0.0, beta=0.8), atol=1e-7)
    assert not torch.allclose(turned, bell_kernel("generalized_aniso", 15, 2.5, 1.0, 0.0, beta=0.8), atol=1e-4)


def test_shapes_follow_their_formulas():
    sigma, beta = 1.7, 1.4
    d = torch.tensor([0.0, 1.0, 4.0, 5.0]) / sigma**2  # squared distances of four offsets
    picks = [(5, 5), (5, 6), (5, 7), (6, 7)]
    for kind, values in (
        ("iso", torch.exp(-0.5 * d)),
        ("generalized_iso", torch.exp(-0.5 * d**beta)),
        ("plateau_iso", 1 / (1 + d**beta)),
    ):
        kernel = bell_kernel(kind, 11, sigma, sigma, beta=beta)
        ratios = torch.stack([kernel[p] for p in picks]) / kernel[5, 5]
        assert torch.allclose(ratios, values, rtol=1e-5), kind
    gaussian = bell_kernel("aniso", 11, 1.7, 1.1, 0.3)
    assert torch.equal(bell_kernel("generalized_aniso", 11, 1.7, 1.1, 0.3, beta=1.0), gaussian)


@pytest.mark.parametrize("cutoff", [math.pi / 5, math.pi / 3, math.pi / 2])
def test_sinc_passes_below_its_cutoff_and_stops_above(cutoff):
    kernel = sinc_kernel(21, cutoff)
    assert kernel.sum().item() == pytest.approx(1, abs=1e-6)
    assert torch.allclose(kernel, kernel.T, atol=1e-7) and torch.allclose(kernel, kernel.flip(0), atol=1e-7)
    assert kernel.min() < 0  # the lobes that ring
    n = 256
    response = torch.fft.rfft2(kernel.double(), s=(n, n)).abs()[0]  # along the x axis
    frequency = torch.arange(n // 2 + 1) * (2 * math.pi / n)
    assert (response[frequency < cutoff - 0.45] - 1).abs().max() < 0.2
    assert response[frequency > cutoff + 0.45].max() < 0.2
    at_cutoff = response[(frequency - cutoff).abs().argmin()].item()
    assert 0.3 < at_cutoff < 0.7


def test_sinc_values_are_those_of_the_bessel_function():
    cutoff = 1.3
    kernel = sinc_kernel(9, cutoff).double()
    j1 = torch.special.bessel_j1(torch.tensor(cutoff * 2.0, dtype=torch.float64))
    assert (kernel[4, 6] / kernel[4, 4]).item() == pytest.approx(
        (cutoff * j1 / (4 * math.pi)).item() / (cutoff**2 / (4 * math.pi)), rel=1e-5
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bell_kernel("box", 7, 1, 1), "Unknown blur kernel kind 'box'.*plateau_aniso"),
        (lambda: bell_kernel("iso", 8, 1, 1), "odd number of pixels.*got 8"),
        (lambda: bell_kernel("iso", 7, 0, 1), "above 0; got 0"),
        (lambda: bell_kernel("plateau_iso", 7, 1, 1, beta=-1), "above 0.*-1"),
        (lambda: sinc_kernel(7, 4.0), r"\(0, pi\].*got 4"),
        (lambda: sinc_kernel(7, 0.0), r"\(0, pi\].*got 0"),
        (lambda: sinc_kernel(10, 1.0), "odd number of pixels.*got 10"),
        (lambda: filter2d(torch.rand(1, 3, 8, 8), torch.rand(3, 5)), r"square kernel.*\(3, 5\)"),
        (lambda: filter2d(torch.rand(1, 3, 8, 8), torch.rand(4, 4)), r"square kernel.*\(4, 4\)"),
    ],
)
def test_impossible_kernels_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_trim_makes_narrow_kernels_small_and_changes_nothing_visible():
    picture = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    narrow = bell_kernel("iso", 21, 0.3, 0.3)
    assert trim(narrow).shape[-1] <= 5
    for kernel in (narrow, bell_kernel("aniso", 21, 2.8, 0.4, 1.0), bell_kernel("plateau_iso", 21, 3, 3, beta=1)):
        trimmed = trim(kernel)
        assert trimmed.sum().item() == pytest.approx(1, abs=1e-5)
        assert (filter2d(picture, trimmed) - filter2d(picture, kernel)).abs().max() < 0.2 / 255
    wide = bell_kernel("plateau_iso", 21, 3, 3, beta=1)
    assert trim(wide).shape == wide.shape  # its border holds weight, so it stays


@pytest.mark.parametrize("shape", [(2, 3, 33, 47), (1, 3, 64, 16), (3, 1, 12, 40)])
def test_filter_is_a_plain_correlation_with_mirrored_borders(shape):
    generator = torch.Generator().manual_seed(1)
    picture, kernel = torch.rand(shape, generator=generator), torch.rand(9, 9, generator=generator)
    padded = F.pad(picture, (4, 4, 4, 4), mode="reflect")
    expected = F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).view(shape)
    assert torch.allclose(filter2d(picture, kernel), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 3), (5, 4), (17, 3)])
def test_filter_takes_pictures_smaller_than_the_kernel(size):
    kernel = bell_kernel("aniso", 21, 3.0, 1.0, 0.4)
    flat = torch.full((1, 3, *size), 0.37)
    assert torch.allclose(filter2d(flat, kernel), flat, atol=1e-6)
    picture = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2))
    pulse = torch.zeros(21, 21)
    pulse[10, 10] = 1
    assert torch.equal(filter2d(picture, pulse), picture)


def test_mirror_goes_on_beyond_the_picture():
    picture = torch.tensor([0.0, 1.0, 2.0]).view(1, 1, 1, 3).expand(1, 1, 3, 3).contiguous()
    pick = torch.zeros(9, 9)
    pick[4, 8] = 1  # the pixel four to the right: 0 1 2 | 1 0 1 2
    assert filter2d(picture, pick)[0, 0, 0].tolist() == [0.0, 1.0, 2.0]
    pick = pick.flip(1)  # four to the left
    assert filter2d(picture, pick)[0, 0, 0].tolist() == [0.0, 1.0, 2.0]
    pick = torch.zeros(9, 9)
    pick[4, 7] = 1  # three to the right
    assert filter2d(picture, pick)[0, 0, 0].tolist() == [1.0, 0.0, 1.0]


def test_filter_keeps_the_dtype():
    picture = torch.rand(1, 3, 20, 20, dtype=torch.float64)
    assert filter2d(picture, bell_kernel("iso", 7, 1, 1)).dtype == torch.float64
