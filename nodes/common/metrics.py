"""Picture quality in numbers, measured by pyiqa (the optional extra `metrics`); nothing is ever downloaded.

The measures, and what they look at:

| name       | direction | measured on                                                                             |
|------------|-----------|-----------------------------------------------------------------------------------------|
| `psnr`     | higher    | Y of MATLAB's YCbCr (16..235), as super-resolution papers do; decibels                   |
| `psnr_rgb` | higher    | the three RGB channels together, which also sees colour shifts; decibels                 |
| `ssim`     | higher    | the same Y, 11 px Gaussian window of sigma 1.5, no shrinking before                      |
| `fsim`     | higher    | RGB: the chromatic version, FSIMc                                                        |
| `gmsd`     | lower     | luma                                                                                     |
| `nlpd`     | lower     | luma                                                                                     |
| `niqe`     | lower     | luma, no reference, in whole blocks of 96 px from the top left (256 px: 2 x 2 blocks)    |

No border is cut off.
"""

import logging
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

NIQE_BLOCK = 96  # px
NIQE_FILE = "niqe_modelparameters.mat"


@dataclass(frozen=True)
class Measure:
    """What pyiqa calls a measure, and how to read it."""

    label: str
    pyiqa_name: str
    lower_better: bool = False
    needs_reference: bool = True
    decimals: int = 4
    options: tuple[tuple[str, str], ...] = ()


_MATLAB_Y = (("color_space", "ycbcr"),)
MEASURES: dict[str, Measure] = {
    "psnr": Measure("PSNR", "psnry", decimals=2, options=_MATLAB_Y),
    "psnr_rgb": Measure("PSNR RGB", "psnr", decimals=2),
    "ssim": Measure("SSIM", "ssim", options=_MATLAB_Y),
    "fsim": Measure("FSIM", "fsim"),
    "gmsd": Measure("GMSD", "gmsd", lower_better=True),
    "nlpd": Measure("NLPD", "nlpd", lower_better=True),
    "niqe": Measure("NIQE", "niqe", lower_better=True, needs_reference=False, decimals=2),
}


class MetricsNotInstalledError(RuntimeError):
    """pyiqa or what it stands on cannot be imported."""


@dataclass
class Metric:
    """A measure ready to use: `metric(sr, hr)` gives one number a picture."""

    name: str
    measure: Measure
    network: torch.nn.Module

    @torch.no_grad()
    def __call__(self, sr: Tensor, hr: Tensor | None = None) -> list[float]:
        """Measures a batch.

        Args:
            sr: pictures to judge, (B, 3, H, W) in 0..1.
            hr: clean pictures of the same shape; not needed where `measure.needs_reference` is False.
        Returns: B numbers; NaN where the measure is undefined for a picture (NIQE of a flat or too small one).
        Raises: ValueError if a reference is missing or has another shape.
        """
        if not self.measure.needs_reference:
            return [self._without_reference(picture) for picture in sr.split(1)]
        if hr is None or hr.shape != sr.shape:
            given = "none" if hr is None else str(tuple(hr.shape))
            raise ValueError(f"{self.measure.label} compares with a clean picture of shape {tuple(sr.shape)}, "
                             f"but got {given}.")
        return self.network(sr, hr).double().flatten().tolist()

    def _without_reference(self, picture: Tensor) -> float:
        height, width = picture.shape[-2:]
        if min(height, width) < NIQE_BLOCK or max(height, width) < 2 * NIQE_BLOCK:
            log.warning("%s needs two blocks of %d px; a picture of %d x %d px has none: left out.",
                        self.measure.label, NIQE_BLOCK, width, height)
            return float("nan")
        try:
            return float(self.network(picture))
        except torch.linalg.LinAlgError:  # the features of a flat picture are not numbers
            log.warning("%s is undefined for a flat picture: left out.", self.measure.label)
            return float("nan")


def cached_niqe_parameters() -> Path | None:
    """The NIQE parameters that an earlier use of pyiqa has left in torch's cache folder, if any."""
    file = Path(torch.hub.get_dir()) / "pyiqa" / NIQE_FILE
    return file if file.is_file() else None


def load_metrics(names: Iterable[str] = tuple(MEASURES), *, niqe_parameters: str | Path | None = None,
                 device: torch.device | str = "cpu") -> dict[str, Metric]:
    """Builds measures by name, in the order asked for.

    Args:
        names: keys of `MEASURES`.
        niqe_parameters: NIQE's parameter file (`niqe_modelparameters.mat`); None = the copy in pyiqa's cache. With
            neither, NIQE is left out and the log says so: nothing is downloaded.
        device: where to compute.
    Raises: ValueError for an unknown name, FileNotFoundError for a missing parameter file, MetricsNotInstalledError
        (a RuntimeError) if pyiqa cannot be imported.
    """
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in MEASURES]
    if unknown:
        raise ValueError(f"unknown measure {', '.join(unknown)}; there are {', '.join(MEASURES)}.")
    if niqe_parameters is not None and not Path(niqe_parameters).is_file():
        raise FileNotFoundError(f"no NIQE parameter file at {niqe_parameters}; leave the option out to do without "
                                f"NIQE, or pass the {NIQE_FILE} that pyiqa's authors publish.")
    pyiqa = _import_pyiqa()
    metrics = {}
    for name in names:
        options: dict[str, Any] = dict(MEASURES[name].options)
        if name == "niqe":
            file = niqe_parameters or cached_niqe_parameters()
            if file is None:
                log.warning("NIQE is left out: no parameter file was given, and pyiqa's cache has no %s.", NIQE_FILE)
                continue
            options["pretrained_model_path"] = str(file)
        with _quiet():
            network = pyiqa.create_metric(MEASURES[name].pyiqa_name, device=torch.device(device), **options)
        metrics[name] = Metric(name, MEASURES[name], network)
    return metrics


def _import_pyiqa() -> Any:
    try:
        with _quiet():
            import pyiqa
    except (ImportError, RuntimeError, OSError) as error:  # torchvision built for another torch raises RuntimeError
        raise MetricsNotInstalledError(
            f"quality is measured with pyiqa, which cannot be imported here ({error}). Install it with "
            "`pip install 'comfyui-fourfold[metrics]'`; torchvision must be of the same release as torch.") from error
    return pyiqa


@contextmanager
def _quiet():
    """pyiqa reports every network that it builds as news."""
    logger = logging.getLogger("pyiqa")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
