"""How good is a method? Clean photographs are degraded, restored and compared with themselves.

    pairs = validation_pairs("photographs/", DEGRADATIONS["seesr"])
    rows = evaluate(pairs, {"bicubic": bicubic, "mine": lambda lr, seed: my_restore(lr, seed=seed)}, load_metrics())
    means = summarise(rows)

What is compared is the picture as it would be saved: clamped and rounded to 8 bit.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .degradation import DegradationSettings, degrade
from .image_files import read_image
from .images import resize
from .metrics import Metric

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
CLEAN = "clean"  # name of the rows of the clean photographs themselves
BICUBIC = "bicubic"

Restorer = Callable[[Tensor, int], Tensor]
"""`restorer(lr (B, 3, h, w), seed) -> sr (B, 3, h * scale, w * scale)`; picture b of the batch uses seed + b."""


@dataclass(frozen=True)
class Pair:
    """A clean photograph and its degraded counterpart, both (1, C, ., .) in 0..1; measured as RGB."""

    name: str
    index: int  # place in the sorted list; seeds the degradation and the restoration
    lr: Tensor
    hr: Tensor


@dataclass(frozen=True)
class Row:
    """What was measured on one picture of one method."""

    name: str
    index: int
    method: str
    scores: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0  # restoration alone, an equal share of its batch


def list_photographs(folder: str | Path, recursive: bool = False) -> list[Path]:
    """The pictures of a folder, sorted by path. Raises FileNotFoundError if there is no folder or no picture in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: pass the folder that holds the photographs.")
    files = folder.rglob("*") if recursive else folder.iterdir()
    found = sorted(file for file in files if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise FileNotFoundError(f"no photographs in {folder}: looked for {', '.join(SUFFIXES)}.")
    return found


def centre_crop(photograph: Tensor, size: int, name: str = "photograph") -> Tensor:
    """The middle `size` x `size` px of (B, C, H, W). Raises ValueError if the picture is smaller."""
    height, width = photograph.shape[-2:]
    if min(height, width) < size:
        raise ValueError(f"{name} has {width} x {height} px, less than the {size} px of the centre crop: "
                         "take it out, or use a smaller crop.")
    top, left = (height - size) // 2, (width - size) // 2
    return photograph[..., top:top + size, left:left + size]


def validation_pairs(folder: str | Path, settings: DegradationSettings, *, crop: int = 256, scale: int = 4,
                     limit: int | None = None) -> list[Pair]:
    """Centre crops of a folder's photographs with degraded counterparts that depend on nothing but place and settings.

    Args:
        folder: clean photographs; taken in sorted order, the first `limit` of them.
        settings: degradation; photograph i is degraded with seed i.
        crop: side of the centre crop, px; a multiple of `scale`.
    Raises: ValueError for a crop that is no multiple of the scale or larger than a photograph, FileNotFoundError
        if there is nothing to read.
    """
    if crop < scale or crop % scale:
        raise ValueError(f"the crop is a multiple of the scale {scale}; got {crop}.")
    pairs = []
    for index, file in enumerate(list_photographs(folder)[:limit]):
        hr = centre_crop(as_rgb(read_image(file)), crop, file.name).contiguous()
        pairs.append(Pair(file.stem, index, degrade(hr, settings, index, scale), hr))
    return pairs


def bicubic(lr: Tensor, seed: int = 0, scale: int = 4) -> Tensor:
    """The baseline: bicubic enlargement, (B, C, h, w) -> (B, C, h * scale, w * scale)."""
    return resize(lr, (lr.shape[-2] * scale, lr.shape[-1] * scale))


def evaluate(pairs: Sequence[Pair], restorers: Mapping[str, Restorer], metrics: Mapping[str, Metric], *,
             batch: int = 1, clean: bool = True, on_picture: Callable[[Pair, str, Tensor], None] | None = None,
             on_row: Callable[[Row], None] | None = None) -> list[Row]:
    """Restores every pair with every restorer and measures the results.

    Args:
        pairs: what `validation_pairs` gives, or your own.
        restorers: name -> `Restorer`; called with the LR pictures and the index of the first of them as seed.
        metrics: what `load_metrics` gives.
        batch: pictures of equal size restored and measured per call. Results do not depend on it, only the time.
        clean: add rows named "clean" with the measures that need no reference.
        on_picture: called with pair, method and the picture (1, 3, H, W), e.g. to keep it.
        on_row: called with every row once it is measured.
    Returns: rows, method by method within each batch.
    Raises: ValueError if a restorer gives another size than the clean photograph's or values that are not finite.
    """
    rows = []
    for group in _batches(pairs, batch):
        lr, hr = torch.cat([pair.lr for pair in group]), as_rgb(torch.cat([pair.hr for pair in group]))
        for method, restore in restorers.items():
            started = time.perf_counter()
            sr = restore(lr, group[0].index)
            seconds = (time.perf_counter() - started) / len(group)
            sr = _saved(_checked(sr, hr, method, group))
            rows += _measure(group, method, sr, hr, metrics, seconds, on_picture, on_row)
        blind = {name: metric for name, metric in metrics.items() if not metric.measure.needs_reference}
        if clean and blind:
            rows += _measure(group, CLEAN, hr, hr, blind, 0.0, on_picture, on_row)
    return rows


def summarise(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Means by method, over the pictures for which a measure is defined; `seconds` is the mean time a picture."""
    collected: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        scores = collected.setdefault(row.method, {})
        for name, value in row.scores.items():
            scores.setdefault(name, []).append(value)
        scores.setdefault("seconds", []).append(row.seconds)
    return {method: {name: _mean(values) for name, values in scores.items()} for method, scores in collected.items()}


def _batches(pairs: Sequence[Pair], size: int) -> Iterator[list[Pair]]:
    """Runs of neighbours (index and size) of at most `size`, so that picture b of a batch may use seed + b."""
    group: list[Pair] = []
    for pair in pairs:
        fits = group and len(group) < size and pair.index == group[-1].index + 1 and pair.lr.shape == group[0].lr.shape
        if group and not fits:
            yield group
            group = []
        group.append(pair)
    if group:
        yield group


def _checked(sr: Tensor, hr: Tensor, method: str, group: Sequence[Pair]) -> Tensor:
    names = ", ".join(pair.name for pair in group)
    sr = as_rgb(sr)
    if sr.shape != hr.shape:
        raise ValueError(f"{method} gave {tuple(sr.shape)} for {names}, but the clean photograph is {tuple(hr.shape)}.")
    if not torch.isfinite(sr).all():
        raise ValueError(f"{method} gave values that are not finite for {names}.")
    return sr.float().to(hr.device)


def _saved(picture: Tensor) -> Tensor:
    return (picture.clamp(0, 1) * 255).round() / 255


def _measure(group: Sequence[Pair], method: str, sr: Tensor, hr: Tensor, metrics: Mapping[str, Metric], seconds: float,
             on_picture: Callable[[Pair, str, Tensor], None] | None, on_row: Callable[[Row], None] | None) -> list[Row]:
    scores = {name: metric(sr, hr) for name, metric in metrics.items()}
    rows = []
    for b, pair in enumerate(group):
        row = Row(pair.name, pair.index, method, {name: values[b] for name, values in scores.items()}, seconds)
        rows.append(row)
        if on_picture is not None:
            on_picture(pair, method, sr[b:b + 1])
        if on_row is not None:
            on_row(row)
    return rows


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if math.isfinite(value)]
    return sum(defined) / len(defined) if defined else float("nan")


def as_rgb(photograph: Tensor) -> Tensor:
    """(B, C, H, W) with C in 1..4 -> (B, 3, H, W): grey in three channels, alpha dropped."""
    channels = photograph.shape[1]
    if channels in (1, 2):  # grey, grey with alpha
        return photograph[:, :1].expand(-1, 3, -1, -1)
    return photograph[:, :3]
