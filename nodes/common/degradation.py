"""From a clean photograph to a poor one: the two-stage ("high-order") degradation of Real-ESRGAN, seeded per sample.

Real-ESRGAN (Wang et al. 2021), eq. 1 and 2: one stage is  x = JPEG((y * k) resized + n),  and two stages are applied:

    blur -> random resize -> Gaussian or Poisson noise -> JPEG              (first stage)
    blur -> random resize -> noise -> [resize to H/scale, sinc] and JPEG    (second stage, the last two in random order)

All random numbers come from one CPU generator a sample: first the *recipe* (kernels, sizes, strengths), then the noise
itself, always as many numbers as the sizes ask for. So a sample depends neither on its batch nor on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .blur_kernels import KERNEL_KINDS, bell_kernel, filter2d, sinc_kernel, trim
from .jpeg import jpeg

RESIZE_MODES = ("area", "bilinear", "bicubic")
_PI = 3.141592653589793


@dataclass(frozen=True)
class StageSettings:
    """One stage: blur, resize, noise, JPEG. Probabilities are 0..1, ranges are (low, high), drawn uniformly."""

    blur_prob: float  # probability of any blur at all
    sinc_prob: float  # of a blur: probability that it is a sinc filter instead of a bell-shaped kernel
    kernel_probs: tuple[float, ...]  # of the six kinds of KERNEL_KINDS, in that order; sums to 1
    blur_sigma: tuple[float, float]  # standard deviations of the bell-shaped kernels, px
    generalized_beta: tuple[float, float]  # shape of the generalised kernels; half of the draws below 1, half above
    plateau_beta: tuple[float, float]  # shape of the plateau kernels, likewise
    resize_probs: tuple[float, float, float]  # enlarge, shrink, keep; sums to 1
    resize_range: tuple[float, float]  # factors: shrink by low..1, enlarge by 1..high
    noise_prob: float  # probability of any noise at all
    gaussian_prob: float  # of a noise: probability that it is Gaussian; else Poisson
    gaussian_sigma: tuple[float, float]  # standard deviation in grey levels of 0..255
    poisson_scale: tuple[float, float]  # factor on the Poisson noise; 1 = as physics would have it
    grey_noise_prob: float  # probability that the three channels share their noise
    jpeg_prob: float  # probability of a JPEG compression
    jpeg_quality: tuple[float, float]  # 1..100
    kernel_size: tuple[int, int] = (
        7,
        21,
    )  # smallest and largest kernel, px, odd; all odd sizes alike
    sinc_cutoff_small: float = _PI / 3  # lowest cutoff of a sinc kernel below sinc_small_size px, rad/px; highest: pi
    sinc_cutoff_large: float = _PI / 5  # lowest cutoff of the larger sinc kernels, rad/px
    sinc_small_size: int = 13  # px


@dataclass(frozen=True)
class DegradationSettings:
    """Both stages and the end. Every number of the degradation is a field here or in `StageSettings`."""

    first: StageSettings
    second: StageSettings  # its resize factors are relative to the final size, H/scale x W/scale
    final_sinc_prob: float  # probability of a sinc filter after the resize to the final size
    final_sinc_cutoff: float = _PI / 3  # its lowest cutoff, rad/px; the highest is pi
    sinc_before_jpeg_prob: float = 0.5  # probability of [resize, sinc] -> JPEG; else JPEG -> [resize, sinc]
    resize_modes: tuple[str, ...] = RESIZE_MODES  # drawn with equal probability for each of the three resizes
    antialias: bool = False  # low-pass before shrinking with bilinear or bicubic; Real-ESRGAN does not


_REAL_ESRGAN_FIRST = StageSettings(
    blur_prob=1.0,
    sinc_prob=0.1,
    kernel_probs=(0.45, 0.25, 0.12, 0.03, 0.12, 0.03),
    blur_sigma=(0.2, 3.0),
    generalized_beta=(0.5, 4.0),
    plateau_beta=(1.0, 2.0),
    resize_probs=(0.2, 0.7, 0.1),
    resize_range=(0.15, 1.5),
    noise_prob=1.0,
    gaussian_prob=0.5,
    gaussian_sigma=(1.0, 30.0),
    poisson_scale=(0.05, 3.0),
    grey_noise_prob=0.4,
    jpeg_prob=1.0,
    jpeg_quality=(30.0, 95.0),
)
_REAL_ESRGAN_SECOND = replace(
    _REAL_ESRGAN_FIRST,
    blur_prob=0.8,
    blur_sigma=(0.2, 1.5),
    resize_probs=(0.3, 0.4, 0.3),
    resize_range=(0.3, 1.2),
    gaussian_sigma=(1.0, 25.0),
    poisson_scale=(0.05, 2.5),
)

# The numbers of Real-ESRGAN's published training options (x4plus). The paper's program also sharpens the clean picture
# first; that concerns the training target and is left to the caller.
REAL_ESRGAN = DegradationSettings(first=_REAL_ESRGAN_FIRST, second=_REAL_ESRGAN_SECOND, final_sinc_prob=0.8)

# The numbers of SeeSR's published degradation parameters: the same kernels, a milder rest. DiT4SR and DreamSR take them.
SEESR = DegradationSettings(
    first=replace(
        _REAL_ESRGAN_FIRST,
        resize_range=(0.3, 1.5),
        gaussian_sigma=(1.0, 15.0),
        poisson_scale=(0.05, 2.0),
        jpeg_quality=(60.0, 95.0),
    ),
    second=replace(
        _REAL_ESRGAN_SECOND,
        blur_prob=0.5,
        resize_range=(0.6, 1.2),
        gaussian_sigma=(1.0, 12.0),
        poisson_scale=(0.05, 1.0),
        jpeg_quality=(60.0, 100.0),
    ),
    final_sinc_prob=0.8,
)

# not in the paper: a light degradation (blur, x1/4, mild noise, JPEG, each once) for short trainings and for pictures
# that are merely small.
LIGHT = DegradationSettings(
    first=replace(
        _REAL_ESRGAN_FIRST,
        sinc_prob=0.0,
        blur_sigma=(0.2, 2.0),
        resize_probs=(0.0, 0.0, 1.0),
        noise_prob=0.0,
        jpeg_prob=0.0,
    ),
    second=replace(
        _REAL_ESRGAN_SECOND,
        blur_prob=0.0,
        resize_probs=(0.0, 0.0, 1.0),
        gaussian_sigma=(0.0, 6.0),
        poisson_scale=(0.05, 0.5),
        jpeg_quality=(70.0, 95.0),
    ),
    final_sinc_prob=0.0,
    resize_modes=("bicubic",),
    antialias=True,
)

DEGRADATIONS: dict[str, DegradationSettings] = {"real_esrgan": REAL_ESRGAN, "seesr": SEESR, "light": LIGHT}


@dataclass(frozen=True)
class Stage:
    """What one stage does to one picture; None = step left out."""

    kernel: Tensor | None  # (k, k)
    resize: float  # factor
    mode: str  # one of RESIZE_MODES
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
    antialias: bool = field(default=False)


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

    def pick(self, options: Sequence) -> object:
        return options[self.index((1.0,) * len(options))]


def _odd_size(draws: _Draws, settings: StageSettings) -> int:
    return draws.pick(range(settings.kernel_size[0], settings.kernel_size[1] + 1, 2))


def _draw_kernel(draws: _Draws, settings: StageSettings) -> Tensor:
    size = _odd_size(draws, settings)
    if draws.chance(settings.sinc_prob):
        low = settings.sinc_cutoff_small if size < settings.sinc_small_size else settings.sinc_cutoff_large
        return sinc_kernel(size, draws.uniform(low, _PI))
    kind = KERNEL_KINDS[draws.index(settings.kernel_probs)]
    sigma_x, sigma_y = draws.uniform(*settings.blur_sigma), draws.uniform(*settings.blur_sigma)
    theta = draws.uniform(-_PI, _PI)
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
        final_kernel = sinc_kernel(_odd_size(draws, settings.second), draws.uniform(settings.final_sinc_cutoff, _PI))
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


@lru_cache(maxsize=24)
def _poisson_table(peak: int, device: torch.device) -> Tensor:
    """Poisson noise (count - rate) / peak of rate peak * level / 255 at 2048 quantiles: (256 * 2048,), level-major."""
    rate = (torch.arange(256, dtype=torch.float64) * peak / 255)[:, None]
    count = torch.arange(int(peak + 10 * peak**0.5 + 12), dtype=torch.float64)[None]
    cdf = torch.special.gammaincc(count + 1, rate.expand(256, count.shape[1]))
    middle = ((torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES).expand(256, _QUANTILES).contiguous()
    drawn = torch.searchsorted(cdf.contiguous(), middle)
    return ((drawn - rate) / peak).float().flatten().to(device)


def _poisson_noise(x: Tensor, scale: float, grey: bool, generator: torch.Generator) -> Tensor:
    if grey:
        x = (x * x.new_tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    level = (x * 255).round_().clamp_(0, 255).long()
    used = int(torch.zeros(256, device=x.device).index_fill_(0, level.flatten(), 1).sum())
    peak = 1 << (used - 1).bit_length()
    quantile = torch.randint(_QUANTILES, x.shape, generator=generator).to(x.device, non_blocking=True)
    return _poisson_table(peak, x.device)[level * _QUANTILES + quantile] * scale


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
    """Degrades one picture by a recipe. hr (1, 3, H, W) in 0..1 -> (1, 3, H // scale, W // scale), 8-bit levels."""
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
    """Makes the low-resolution counterpart of clean pictures (Real-ESRGAN section 3, eq. 1 and 2, figure 2).

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
    rows = []
    for picture, own_seed in zip(hr.float().split(1), seeds, strict=True):
        generator = torch.Generator().manual_seed(own_seed)
        rows.append(apply_recipe(picture, draw_recipe(settings, generator), generator, scale))
    return torch.cat(rows)


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
        if not (low >= 0 and high <= 1):
            raise ValueError(f"Pixels must lie in 0..1; found {low:.4g}..{high:.4g}. Divide 8-bit pixels by 255.")
    seeds = [int(seed) + b for b in range(hr.shape[0])] if isinstance(seed, int) else [int(s) for s in seed]
    if len(seeds) != hr.shape[0]:
        raise ValueError(f"Got {len(seeds)} seeds for {hr.shape[0]} pictures; give one a picture, or a single number.")
    return seeds
