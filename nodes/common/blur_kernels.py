"""Blur kernels of the Real-ESRGAN degradation, and the filter that applies them.

Six bell-shaped families (Real-ESRGAN section 3.1: Gaussian, generalised Gaussian, plateau) and the circular sinc filter
that imitates ringing and overshoot (section 3.3). With the covariance S = R(theta) diag(sx^2, sy^2) R(theta)^T
and the squared distance d = p^T S^-1 p of a pixel offset p = (x, y):

    iso, aniso             k(p) ~ exp(-d / 2)
    generalized_*          k(p) ~ exp(-d^beta / 2)         beta < 1: peaked, long tails; beta > 1: flat top
    plateau_*              k(p) ~ 1 / (1 + d^beta)
    sinc                   k(p) ~ wc J1(wc |p|) / (2 pi |p|)   low-pass at wc rad/px

`iso` means sx = sy. Kernels are float32 on the CPU, (k, k) with k odd, and sum to one.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_KINDS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")

_STRIPS = 16  # strips of a picture that are filtered side by side on the CPU
_NEGLIGIBLE = 1e-4  # border rings that hold less than this share of the kernel's absolute mass are cut off


@lru_cache(maxsize=64)
def _offsets(size: int) -> tuple[Tensor, Tensor]:
    """Pixel offsets (x, y) from the kernel's centre, (size, size) each, float64."""
    if size < 1 or size % 2 == 0:
        raise ValueError(f"A blur kernel's size must be an odd number of pixels, 1 or more; got {size}.")
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    return axis.expand(size, size), axis[:, None].expand(size, size)


def _normalised(kernel: Tensor) -> Tensor:
    return (kernel / kernel.sum()).float()


def bell_kernel(kind: str, size: int, sigma_x: float, sigma_y: float, theta: float = 0.0, beta: float = 1.0) -> Tensor:
    """One of the six bell-shaped kernels.

    Args:
        kind: one of `KERNEL_KINDS`; the `_iso` kinds and `iso` ignore `sigma_y` and `theta`.
        size: width = height, px, odd.
        sigma_x, sigma_y: standard deviations along the kernel's axes, px, above 0.
        theta: rotation of the x axis, radians.
        beta: shape of the generalised and plateau kinds, above 0; ignored by `iso` and `aniso`.
    Returns: (size, size) float32, sums to one.
    Raises: ValueError for an unknown kind, an even size, or a sigma or beta that is not above 0.
    """
    if kind not in KERNEL_KINDS:
        raise ValueError(f"Unknown blur kernel kind {kind!r}; choose one of {', '.join(KERNEL_KINDS)}.")
    if min(sigma_x, sigma_y, beta) <= 0:
        raise ValueError(f"A blur kernel needs sigma_x, sigma_y and beta above 0; got {sigma_x}, {sigma_y} and {beta}.")
    x, y = _offsets(size)
    if kind.endswith("aniso"):
        along, across = math.cos(theta) * x + math.sin(theta) * y, math.cos(theta) * y - math.sin(theta) * x
        distance = (along / sigma_x) ** 2 + (across / sigma_y) ** 2
    else:
        distance = (x * x + y * y) / sigma_x**2
    if kind.startswith("generalized"):
        return _normalised(torch.exp(-0.5 * distance**beta))
    if kind.startswith("plateau"):
        return _normalised(1 / (1 + distance**beta))
    return _normalised(torch.exp(-0.5 * distance))


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """Circular low-pass (2-D sinc) kernel: k(r) = wc J1(wc r) / (2 pi r), k(0) = wc^2 / (4 pi) (Real-ESRGAN, 3.3).

    Args:
        size: width = height, px, odd.
        cutoff: wc in radians per px, above 0 and at most pi (pi lets nearly everything through).
    Returns: (size, size) float32, sums to one; has negative lobes.
    Raises: ValueError for an even size or a cutoff out of range.
    """
    if not 0 < cutoff <= math.pi:
        raise ValueError(f"A sinc kernel's cutoff must be in (0, pi] radians per pixel; got {cutoff}.")
    x, y = _offsets(size)
    radius = torch.sqrt(x * x + y * y)
    kernel = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return _normalised(kernel)


def trim(kernel: Tensor) -> Tensor:
    """Cuts off border rings that weigh next to nothing and normalises again; the filter gets cheaper, not different."""
    mass = kernel.abs()
    total, keep = mass.sum(), kernel.shape[-1]
    while keep > 1:
        edge = (kernel.shape[-1] - keep) // 2 + 1
        inner = mass[edge : kernel.shape[-1] - edge, edge : kernel.shape[-1] - edge].sum()
        if total - inner > _NEGLIGIBLE * total:
            break
        keep -= 2
    edge = (kernel.shape[-1] - keep) // 2
    kernel = kernel[edge : kernel.shape[-1] - edge, edge : kernel.shape[-1] - edge]
    return kernel / kernel.sum()


def _mirror(length: int, reach: int, device: torch.device) -> Tensor:
    """Indices -reach .. length-1+reach folded into 0 .. length-1 as mirrors do, the border pixel not repeated."""
    if length == 1:
        return torch.zeros(1 + 2 * reach, dtype=torch.long, device=device)
    period = 2 * (length - 1)
    index = torch.arange(-reach, length + reach, device=device) % period
    return torch.where(index < length, index, period - index)


def _pad_mirrored(image: Tensor, reach: int) -> Tensor:
    """Reflects any picture by any reach, also beyond the picture's own size (which `F.pad` refuses)."""
    height, width = image.shape[-2:]
    if reach < min(height, width):
        return F.pad(image, (reach, reach, reach, reach), mode="reflect")
    rows, columns = _mirror(height, reach, image.device), _mirror(width, reach, image.device)
    return image.index_select(-2, rows).index_select(-1, columns)


def filter2d(image: Tensor, kernel: Tensor) -> Tensor:
    """Correlates every channel with one kernel; borders are mirrored, so that flat pictures stay flat.

    Args:
        image: (B, C, H, W), any size from 1 px.
        kernel: (k, k) with k odd.
    Returns: (B, C, H, W), dtype and device of `image`.
    Raises: ValueError if the kernel is not square with an odd side.
    """
    size = kernel.shape[-1]
    if kernel.dim() != 2 or kernel.shape[0] != size or size % 2 == 0:
        raise ValueError(f"filter2d needs a square kernel (k, k) with k odd; got {tuple(kernel.shape)}.")
    kernel = kernel.to(image.device, image.dtype)
    batch, channels, height, width = image.shape
    padded = _pad_mirrored(image, size // 2)
    # A depth-wise convolution of three channels leaves most of a processor's vector lanes idle. So on the CPU the
    # picture is cut into horizontal strips that overlap by the kernel's reach, and the strips become channels.
    strips = min(_STRIPS, height) if image.device.type == "cpu" else 1
    rows = -(-height // strips)
    padded = F.pad(padded, (0, 0, 0, rows * strips - height))
    lanes = padded.unfold(2, rows + size - 1, rows).transpose(-1, -2)  # (B, C, strips, rows + k - 1, W + k - 1)
    lanes = lanes.reshape(batch, channels * strips, rows + size - 1, -1)
    weight = kernel.expand(lanes.shape[1], 1, size, size).contiguous()
    return F.conv2d(lanes, weight, groups=lanes.shape[1]).view(batch, channels, -1, width)[:, :, :height]
