"""From a clean photograph to a poor one: the two-stage ("high-order") degradation of Real-ESRGAN, seeded per sample.

Real-ESRGAN (Wang et al. 2021): one classical stage is x = JPEG((y * k) resized + n) (section 3.1, eq. 1); two of them,
one after the other, make the high-order degradation (section 3.2); sinc filters add ringing (section 3.3):

    blur -> random resize -> Gaussian or Poisson noise -> JPEG              (first stage)
    blur -> random resize -> noise -> [resize to H/scale, sinc] and JPEG    (second stage, the last two in random order)

All random numbers come from one CPU generator a sample: first the *recipe* (kernels, sizes, strengths), then the noise
itself, always as many numbers as the sizes ask for. So a sample depends neither on its batch nor on the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .blur_kernels import KERNEL_KINDS, bell_kernel, filter2d, sinc_kernel, trim
from .degradation_settings import DEGRADATIONS, LIGHT, REAL_ESRGAN, SEESR, DegradationSettings, StageSettings
from .jpeg import jpeg

__all__ = [
    "DEGRADATIONS",
    "LIGHT",
    "REAL_ESRGAN",
    "SEESR",
    "DegradationSettings",
    "Recipe",
    "Stage",
    "StageSettings",
    "apply_recipe",
    "degrade",
    "draw_recipe",
]

T = TypeVar("T")
_TOLERANCE = 1e-4  # what a resize may overshoot 0..1 by before it counts as a mistake


@dataclass(frozen=True)
class Stage:
    """What one stage does to one picture; None = step left out."""

    kernel: Tensor | None  # (k, k)
    resize: float  # factor; of the second stage: relative to the final size
    mode: str  # "area", "bilinear" or "bicubic"
    noise: str | None  # "gaussian" or "poisson"
    strength: float  # Gaussian: sigma in grey levels of 0..255; Poisson: scale
    grey_noise: bool
    quality: float | None  # JPEG, 1..100


@dataclass(frozen=True)
class Recipe:
    """All that is drawn for one picture but the noise itself."""

    first: Stage
    second: Stage
    final_kernel: Tensor | None
    final_mode: str
    sinc_before_jpeg: bool
    antialias: bool


class _Draws:
    """Uniform numbers of one generator, fetched in one go: a recipe costs one call instead of dozens."""

    def __init__(self, generator: torch.Generator, count: int = 64):
        self._numbers = iter(torch.rand(count, generator=generator, dtype=torch.float64).tolist())

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._numbers)

    def chance(self, probability: float) -> bool:
        return next(self._numbers) < probability

    def index(self, weights: Sequence[float]) -> int:
        left = next(self._numbers) * sum(weights)
        for i, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return i
        return max(i for i, weight in enumerate(weights) if weight > 0)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.index((1.0,) * len(options))]


def _odd_size(draws: _Draws, settings: StageSettings) -> int:
    return draws.pick(range(settings.kernel_size[0], settings.kernel_size[1] + 1, 2))


def _draw_kernel(draws: _Draws, settings: StageSettings) -> Tensor:
    size = _odd_size(draws, settings)
    if draws.chance(settings.sinc_prob):
        low = settings.sinc_cutoff_small if size < settings.sinc_small_size else settings.sinc_cutoff_large
        return sinc_kernel(size, draws.uniform(low, math.pi))
    kind = KERNEL_KINDS[draws.index(settings.kernel_probs)]
    sigma_x, sigma_y = draws.uniform(*settings.blur_sigma), draws.uniform(*settings.blur_sigma)
    theta = draws.uniform(-math.pi, math.pi)
    low, high = settings.plateau_beta if kind.startswith("plateau") else settings.generalized_beta
    beta = draws.uniform(low, 1.0) if draws.chance(0.5) else draws.uniform(1.0, high)
    return trim(bell_kernel(kind, size, sigma_x, sigma_y, theta, beta))


def _draw_stage(draws: _Draws, settings: StageSettings, modes: tuple[str, ...]) -> Stage:
    kernel = _draw_kernel(draws, settings) if draws.chance(settings.blur_prob) else None
    low, high = settings.resize_range
    bounds = ((1.0, high), (low, 1.0), (1.0, 1.0))[draws.index(settings.resize_probs)]
    resize, mode = draws.uniform(*bounds), draws.pick(modes)
    noise = None
    if draws.chance(settings.noise_prob):
        noise = "gaussian" if draws.chance(settings.gaussian_prob) else "poisson"
    strength = draws.uniform(*(settings.poisson_scale if noise == "poisson" else settings.gaussian_sigma))
    grey_noise = draws.chance(settings.grey_noise_prob)
    quality = draws.uniform(*settings.jpeg_quality) if draws.chance(settings.jpeg_prob) else None
    return Stage(kernel, resize, mode, noise, strength, grey_noise, quality)


def draw_recipe(settings: DegradationSettings, generator: torch.Generator) -> Recipe:
    """Draws kernels, factors and strengths of one picture from `generator` (on the CPU)."""
    draws = _Draws(generator)
    first = _draw_stage(draws, settings.first, settings.resize_modes)
    second = _draw_stage(draws, settings.second, settings.resize_modes)
    final_kernel = None
    if draws.chance(settings.final_sinc_prob):
        final_kernel = sinc_kernel(
            _odd_size(draws, settings.second), draws.uniform(settings.final_sinc_cutoff, math.pi)
        )
    before = draws.chance(settings.sinc_before_jpeg_prob)
    return Recipe(first, second, final_kernel, draws.pick(settings.resize_modes), before, settings.antialias)


def _resize(x: Tensor, size: tuple[int, int], mode: str, antialias: bool) -> Tensor:
    if x.shape[-2:] == size:
        return x
    if mode == "area":
        return F.interpolate(x, size=size, mode="area")
    return F.interpolate(x, size=size, mode=mode, antialias=antialias)


def _gaussian_noise(x: Tensor, sigma: float, grey: bool, generator: torch.Generator) -> Tensor:
    shape = (1, 1 if grey else x.shape[1], *x.shape[-2:])
    return torch.randn(shape, generator=generator).to(x.device, non_blocking=True) * (sigma / 255)


_QUANTILES = 2048


@lru_cache(maxsize=8)
def _poisson_counts(device: torch.device) -> tuple[Tensor, Tensor]:
    """Poisson's inverse distribution function as a table, so that one draw is one look-up, on any device.

    Returns: counts (9 * 256 * 2048,) int16, by log2 of the peak, grey level, quantile: the count at the quantiles
        (q + 0.5) / 2048 of the rate peak * level / 255; and the peaks 1, 2, 4, ..., 256, (9,) float32.
    """
    peaks = 2.0 ** torch.arange(9, dtype=torch.float64)
    quantiles = ((torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES).expand(256, -1).contiguous()
    counts = torch.empty(len(peaks), 256, _QUANTILES, dtype=torch.int16)
    for table, peak in zip(counts, peaks.tolist(), strict=True):
        rate = (torch.arange(256, dtype=torch.float64) * peak / 255)[:, None]
        count = torch.arange(int(peak + 5 * peak**0.5 + 12), dtype=torch.float64)
        below = torch.special.gammaincc((count + 1).expand(256, -1), rate.expand(-1, len(count)))  # P(N <= count)
        table.copy_(torch.searchsorted(below.contiguous(), quantiles))
    return counts.flatten().to(device), peaks.float().to(device)


def _poisson_noise(x: Tensor, scale: float, grey: bool, generator: torch.Generator) -> Tensor:
    """scale * (Poisson(peak * x) / peak - x), the peak being the number of grey levels in use, up to a power of two."""
    if grey:
        x = (x * x.new_tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    level = (x * 255).round_().clamp_(0, 255).long()
    counts, peaks = _poisson_counts(x.device)
    used = torch.zeros(256, device=x.device).index_fill_(0, level.flatten(), 1).sum()
    log2_peak = torch.bucketize(used, peaks)  # a tensor: the accelerator is not waited for
    draw = torch.randint(_QUANTILES, x.shape, generator=generator).to(x.device, non_blocking=True)
    count = counts.index_select(0, ((log2_peak * 256 + level) * _QUANTILES + draw).flatten()).view(x.shape)
    return (count / peaks[log2_peak] - level / 255) * scale


def _apply_stage(x: Tensor, stage: Stage, size: tuple[int, int], antialias: bool, generator: torch.Generator) -> Tensor:
    """Blur, resize to `size` and noise; the JPEG is the caller's, since its place differs between the stages."""
    if stage.kernel is not None:
        x = filter2d(x, stage.kernel)
    x = _resize(x, size, stage.mode, antialias)
    if stage.noise == "gaussian":
        x = x + _gaussian_noise(x, stage.strength, stage.grey_noise, generator)
    elif stage.noise == "poisson":
        x = x + _poisson_noise(x, stage.strength, stage.grey_noise, generator)
    return x.clamp(0, 1)


def _scaled(size: tuple[float, float], factor: float) -> tuple[int, int]:
    return max(1, int(size[0] * factor)), max(1, int(size[1] * factor))


def apply_recipe(hr: Tensor, recipe: Recipe, generator: torch.Generator, scale: int = 4) -> Tensor:
    """Degrades one picture (1, 3, H, W) in 0..1 by a recipe -> (1, 3, H // scale, W // scale), multiples of 1/255."""
    height, width = hr.shape[-2:]
    final_size = (height // scale, width // scale)
    first, second, antialias = recipe.first, recipe.second, recipe.antialias

    x = _apply_stage(hr, first, _scaled((height, width), first.resize), antialias, generator)
    if first.quality is not None:
        x = jpeg(x, first.quality)
    x = _apply_stage(x, second, _scaled((height / scale, width / scale), second.resize), antialias, generator)

    if second.quality is not None and not recipe.sinc_before_jpeg:
        x = jpeg(x, second.quality)
    x = _resize(x, final_size, recipe.final_mode, antialias)
    if recipe.final_kernel is not None:
        x = filter2d(x, recipe.final_kernel)
    if second.quality is not None and recipe.sinc_before_jpeg:
        x = jpeg(x, second.quality)
    return (x.clamp(0, 1) * 255).round() / 255


@torch.no_grad()
def degrade(hr: Tensor, settings: DegradationSettings, seed: int | Sequence[int], scale: int = 4) -> Tensor:
    """Makes the low-resolution counterpart of clean pictures: Real-ESRGAN's high-order degradation (sections 3.1-3.3).

    x = D2(D1(y)), each stage D(y) = JPEG((y * k) resized + n) (eq. 1), with a sinc filter at the end.

    Args:
        hr: clean pictures, (B, 3, H, W) float, RGB in 0..1; H and W at least `max(scale, 4)` px, on any device.
        settings: one of `DEGRADATIONS`, or your own.
        seed: one per picture, or a single number for the batch: row b is then degraded with seed + b.
        scale: factor between `hr` and the result, 1 or more.
    Returns: (B, 3, H // scale, W // scale) float32 on the device of `hr`, in 0..1, multiples of 1/255. A size that
        is no multiple of `scale` is rounded down; the whole picture is squeezed into it, nothing is cut off.
    Raises: ValueError for another shape, values outside 0..1 or not finite, too small a picture, seeds that do not
        match the batch, or a scale below 1.
    """
    seeds = _checked(hr, seed, scale)
    lr = hr.new_empty((len(seeds), 3, hr.shape[-2] // scale, hr.shape[-1] // scale), dtype=torch.float32)
    with torch.autocast(hr.device.type, enabled=False):
        for b, own_seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(own_seed)
            recipe = draw_recipe(settings, generator)
            lr[b : b + 1] = apply_recipe(hr[b : b + 1].float(), recipe, generator, scale)
    return lr


def _checked(hr: Tensor, seed: int | Sequence[int], scale: int) -> list[int]:
    """Refuses what cannot be degraded; returns one seed a picture."""
    if hr.dim() != 4 or hr.shape[1] != 3 or not hr.is_floating_point():
        raise ValueError(
            f"degrade needs RGB pictures as a float tensor (B, 3, H, W); got {tuple(hr.shape)} of {hr.dtype}. "
            "Convert grey or RGBA pictures to RGB first."
        )
    if scale < 1 or int(scale) != scale:
        raise ValueError(f"The scale must be a whole number, 1 or more; got {scale}.")
    smallest = max(int(scale), 4)
    if min(hr.shape[-2:]) < smallest:
        raise ValueError(
            f"A picture of {hr.shape[-2]}x{hr.shape[-1]} px is too small to be degraded at x{scale}; "
            f"both sides need at least {smallest} px."
        )
    if hr.shape[0]:
        low, high = torch.stack(hr.aminmax()).tolist()
        if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
            raise ValueError(f"Pixels must lie in 0..1; found {low:.4g}..{high:.4g}. Divide 8-bit pixels by 255.")
    seeds = [int(seed) + b for b in range(hr.shape[0])] if isinstance(seed, Integral) else [int(s) for s in seed]
    if len(seeds) != hr.shape[0]:
        raise ValueError(f"Got {len(seeds)} seeds for {hr.shape[0]} pictures; give one a picture, or a single number.")
    return [s % 2**64 for s in seeds]
