"""The numbers of the degradation: Real-ESRGAN's, SeeSR's and a light one's; `degradation.py` applies them."""

import math
from dataclasses import dataclass, fields, replace

from .blur_kernels import KERNEL_KINDS

RESIZE_MODES = ("area", "bilinear", "bicubic")


@dataclass(frozen=True)
class StageSettings:
    """One stage: blur, resize, noise, JPEG. Probabilities are 0..1; ranges are (low, high), drawn uniformly."""

    blur_prob: float  # probability of any blur at all
    sinc_prob: float  # of a blur: probability that it is a sinc filter instead of a bell-shaped kernel
    kernel_probs: tuple[float, ...]  # of the six kinds of KERNEL_KINDS, in that order; sums to 1
    blur_sigma: tuple[float, float]  # standard deviations of the bell-shaped kernels, px, above 0
    generalized_beta: tuple[float, float]  # shape of the generalised kernels; half of the draws low..1, half 1..high
    plateau_beta: tuple[float, float]  # shape of the plateau kernels, likewise
    resize_probs: tuple[float, float, float]  # enlarge, shrink, keep; sums to 1
    resize_range: tuple[float, float]  # factors: shrink by low..1, enlarge by 1..high
    noise_prob: float  # probability of any noise at all
    gaussian_prob: float  # of a noise: probability that it is Gaussian; else it is Poisson
    gaussian_sigma: tuple[float, float]  # standard deviation in grey levels of 0..255
    poisson_scale: tuple[float, float]  # factor on the Poisson noise; 1 = the noise of counted photons
    grey_noise_prob: float  # probability that the three channels share their noise
    jpeg_prob: float  # probability of a JPEG compression
    jpeg_quality: tuple[float, float]  # 1..100, not rounded
    kernel_size: tuple[int, int] = (7, 21)  # smallest and largest kernel, px, odd; all odd sizes are equally likely
    sinc_cutoff_small: float = math.pi / 3  # lowest cutoff of a sinc kernel below sinc_small_size, rad/px; highest: pi
    sinc_cutoff_large: float = math.pi / 5  # lowest cutoff of the larger sinc kernels, rad/px
    sinc_small_size: int = 13  # px

    def __post_init__(self):
        _check_probabilities(self)
        for name, floor, ceiling in (
            ("blur_sigma", 1e-3, math.inf),
            ("generalized_beta", 1e-3, math.inf),
            ("plateau_beta", 1e-3, math.inf),
            ("resize_range", 1e-3, math.inf),
            ("gaussian_sigma", 0, 255),
            ("poisson_scale", 0, math.inf),
            ("jpeg_quality", 1, 100),
            ("kernel_size", 1, math.inf),
        ):
            low, high = getattr(self, name)
            if not floor <= low <= high <= ceiling:
                raise ValueError(f"{name} must be (low, high) within {floor:g}..{ceiling:g}; got {(low, high)}.")
        for name in ("generalized_beta", "plateau_beta", "resize_range"):
            low, high = getattr(self, name)
            if not low <= 1 <= high:
                raise ValueError(f"{name} must reach from at most 1 to at least 1; got {(low, high)}.")
        if any(size % 2 == 0 for size in self.kernel_size):
            raise ValueError(f"kernel_size must be two odd numbers of pixels; got {self.kernel_size}.")
        for name, count in (("kernel_probs", len(KERNEL_KINDS)), ("resize_probs", 3)):
            probabilities = getattr(self, name)
            if len(probabilities) != count or abs(sum(probabilities) - 1) > 1e-6 or min(probabilities) < 0:
                raise ValueError(f"{name} must be {count} probabilities that sum to 1; got {probabilities}.")
        for name in ("sinc_cutoff_small", "sinc_cutoff_large"):
            _check_cutoff(name, getattr(self, name))


@dataclass(frozen=True)
class DegradationSettings:
    """Both stages and the end. Every number of the degradation is a field here or in `StageSettings`."""

    first: StageSettings
    second: StageSettings  # its resize factors are relative to the final size, H/scale x W/scale
    final_sinc_prob: float  # probability of a sinc filter after the resize to the final size
    final_sinc_cutoff: float = math.pi / 3  # its lowest cutoff, rad/px; the highest is pi
    sinc_before_jpeg_prob: float = 0.5  # probability of [resize, sinc] -> JPEG; else JPEG -> [resize, sinc]
    resize_modes: tuple[str, ...] = RESIZE_MODES  # equally likely, drawn anew for each of the three resizes
    antialias: bool = False  # low-pass before shrinking with bilinear or bicubic; Real-ESRGAN does not

    def __post_init__(self):
        _check_probabilities(self)
        _check_cutoff("final_sinc_cutoff", self.final_sinc_cutoff)
        if not self.resize_modes or not set(self.resize_modes) <= set(RESIZE_MODES):
            raise ValueError(f"resize_modes must be some of {', '.join(RESIZE_MODES)}; got {self.resize_modes}.")


def _check_probabilities(settings: StageSettings | DegradationSettings) -> None:
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if entry.name.endswith("_prob") and not 0 <= value <= 1:
            raise ValueError(f"{entry.name} is a probability and must be in 0..1; got {value}.")


def _check_cutoff(name: str, value: float) -> None:
    if not 0 < value <= math.pi:
        raise ValueError(f"{name} must be in (0, pi] radians per pixel; got {value}.")


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

# Real-ESRGAN's published training options (x4plus). The scripts of SeeSR and DiT4SR that write training pairs to disk
# hold the same numbers. All three sharpen the clean picture (unsharp mask) before; that changes the training target as
# well, so it is left to the caller.
REAL_ESRGAN = DegradationSettings(first=_REAL_ESRGAN_FIRST, second=_REAL_ESRGAN_SECOND, final_sinc_prob=0.8)

# SeeSR's published parameter file for pairs made online (the same file comes with DiT4SR): the kernels of Real-ESRGAN,
# milder resizes, noise and JPEG, fewer second blurs, no sharpening.
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

# not in the paper: blur, shrink, mild noise and JPEG, each once, for short trainings and for pictures that are little
# worse than small. Stage one blurs, stage two does the rest at the final size.
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
