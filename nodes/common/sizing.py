"""At which size a picture is drawn: padded, or, as InstantIR's published program has it, whole between two bounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from .images import Prepared, pad, prepare_lr

Larger = Literal["pad", "shrink"]
Interpolation = Literal["bicubic", "bilinear"]
LARGER, INTERPOLATIONS = ("pad", "shrink"), ("bicubic", "bilinear")


def working_size(height: int, width: int, short: int, long: int, multiple: int) -> tuple[int, int]:
    """The size that a picture is drawn at as a whole, as InstantIR's published program has it, (h, w) in pixels.

    First the short side is raised to `short`, then the long side capped at `long` (the cap wins), then both sides are
    floored to `multiple` (but not to zero).
    """
    height, width = (side * max(1, short / min(height, width)) for side in (height, width))
    shrink = min(1, long / max(height, width))
    return tuple(max(multiple, int(round(side * shrink, 6)) // multiple * multiple) for side in (height, width))


def prepare_sized(
    image: Tensor,
    scale: float | None = None,
    size: tuple[int, int] | None = None,
    *,
    multiple: int = 16,
    min_short_side: int = 0,
    max_long_side: int = 0,
    larger: Larger = "pad",
    interpolation: Interpolation = "bicubic",
) -> Prepared:
    """`prepare_lr`, and with `max_long_side` the published sizes of InstantIR; `images.crop` brings back the target.

    A target of at most `max_long_side` is drawn at its `working_size`, which may change its proportions a little. A
    larger one keeps its size and is padded for windows ("pad"), or is drawn at its working size, too ("shrink").

    Args:
        image: (B, C, H, W) in 0..1, C 1 to 4. scale, size, multiple, min_short_side: see `prepare_lr`.
        max_long_side: pixels; 0 = all targets are padded.
        interpolation: of the picture that is drawn; the reference for the colour fix is always bicubic.
    Raises: ValueError as `prepare_lr`, or for another choice.
    """
    for name, value, choices in (("larger", larger, LARGER), ("interpolation", interpolation, INTERPOLATIONS)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")
    target = prepare_lr(image, scale, size, multiple=1)
    if max_long_side and (max(target.size) <= max_long_side or larger == "shrink"):
        work = working_size(*target.size, min_short_side, max_long_side, multiple)
        return replace(target, pixels=_resized(image, work, interpolation), work=work)
    target = prepare_lr(image, scale, size, multiple, min_short_side)
    if interpolation == "bicubic":
        return target
    bottom, right = (padded - side for padded, side in zip(target.pixels.shape[-2:], target.work, strict=True))
    return replace(target, pixels=pad(_resized(image, target.work, interpolation), bottom, right))


def _resized(image: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """The picture's colours, (B, 3, h, w)."""
    colours = prepare_lr(image, multiple=1).pixels
    if tuple(colours.shape[-2:]) == tuple(size):
        return colours
    return F.interpolate(colours, size=size, mode=interpolation, antialias=True).clamp(0, 1)
