"""Colour fixes: the result takes the colours of the enlarged low-resolution picture and keeps its own detail.

Both are the colour correction of StableSR (Wang et al. 2024). All take and return (B, 3, H, W) in 0..1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

METHODS = ("adain", "wavelet", "none")
LEVELS = 5  # of the a-trous decomposition, as in StableSR
EPSILON = 1e-5  # added to the variances, so that a flat picture divides by no zero


def adain(sr: Tensor, lr: Tensor) -> Tensor:
    """Per-channel mean and deviation of `lr` given to `sr` (Huang & Belongie 2017, equation 8; StableSR).

    y = sigma(lr) (sr - mu(sr)) / sigma(sr) + mu(lr), over the pixels of each sample and channel.

    Args:
        sr, lr: (B, C, H, W) float in 0..1, same size.
    Returns: (B, C, H, W) float32 in 0..1.
    Raises: ValueError if the shapes differ.
    """
    sr, lr = _pair(sr, lr)
    var_sr, mean_sr = torch.var_mean(sr, dim=(2, 3), keepdim=True, correction=0)
    var_lr, mean_lr = torch.var_mean(lr, dim=(2, 3), keepdim=True, correction=0)
    gain = ((var_lr + EPSILON) / (var_sr + EPSILON)).sqrt()
    return ((sr - mean_sr) * gain + mean_lr).clamp(0, 1)


def wavelet(sr: Tensor, lr: Tensor) -> Tensor:
    """High frequencies of `sr` on the low frequencies of `lr` (StableSR).

    With L = the picture after 5 a-trous smoothings of growing reach:  y = (sr - L(sr)) + L(lr).

    Args:
        sr, lr: (B, C, H, W) float in 0..1, same size.
    Returns: (B, C, H, W) float32 in 0..1.
    Raises: ValueError if the shapes differ.
    """
    sr, lr = _pair(sr, lr)
    return (sr + low_frequencies(lr - sr)).clamp(0, 1)  # L is linear: L(lr) - L(sr) = L(lr - sr)


def low_frequencies(image: Tensor, levels: int = LEVELS) -> Tensor:
    """What a-trous smoothing leaves: [1 2 1]/4 down and across with holes of 1, 2, 4, ... 2^(levels-1) pixels.

    The border is repeated outwards, so any size from 1 px works.
    """
    channels = image.shape[1]
    taps = torch.tensor([0.25, 0.5, 0.25], dtype=image.dtype, device=image.device)
    down = taps.view(1, 1, 3, 1).repeat(channels, 1, 1, 1)
    across = taps.view(1, 1, 1, 3).repeat(channels, 1, 1, 1)
    for level in range(levels):
        reach = 2**level
        image = F.pad(image, (reach,) * 4, mode="replicate")
        image = F.conv2d(image, down, dilation=(reach, 1), groups=channels)
        image = F.conv2d(image, across, dilation=(1, reach), groups=channels)
    return image


def color_fix(sr: Tensor, lr: Tensor, method: str = "adain") -> Tensor:
    """`adain`, `wavelet`, or `none`: sr itself, clamped to 0..1.

    Raises: ValueError for another method, or if the shapes differ.
    """
    if method == "none":
        return _pair(sr, lr)[0].clamp(0, 1)
    if method == "adain":
        return adain(sr, lr)
    if method == "wavelet":
        return wavelet(sr, lr)
    raise ValueError(f"the colour fix is {method!r}; expected one of {', '.join(METHODS)}.")


def _pair(sr: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
    if sr.shape != lr.shape or sr.dim() != 4:
        raise ValueError(
            f"the result is {tuple(sr.shape)}, the reference {tuple(lr.shape)}; expected the same (B, C, H, W). "
            f"Crop the result and enlarge the reference to the target size first."
        )
    return sr.float(), lr.float().to(sr.device)
