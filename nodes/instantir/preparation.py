"""How a picture is sized for InstantIR: published sizes where one window holds it, its own size where windows do."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from ..common.images import Prepared, pad, prepare_lr
from .config import Sampling


def working_size(height: int, width: int, short: int, long: int, multiple: int) -> tuple[int, int]:
    """The size that a picture is drawn at in one window, as published, (h, w) in pixels.

    First the short side is raised to `short`, then the long side capped at `long` (the cap wins), then both sides are
    floored to `multiple` (but not to zero).
    """
    height, width = (side * max(1, short / min(height, width)) for side in (height, width))
    shrink = min(1, long / max(height, width))
    return tuple(max(multiple, int(round(side * shrink, 6)) // multiple * multiple) for side in (height, width))


def prepare(
    image: Tensor, sampling: Sampling, scale: float | None = None, size: tuple[int, int] | None = None
) -> Prepared:
    """Brings a picture to the size that it is drawn at; `images.crop` brings the result to the target.

    A target of at most `max_long_side` (or any, with `tile` 0) is drawn at its `working_size`, which may change its
    proportions a little, as published. A larger one keeps its size and is padded: windows take it.

    Args:
        image: (B, C, H, W) in 0..1, C 1 to 4. scale, size: of the target, see `prepare_lr`.
    Raises: ValueError as `prepare_lr`.
    """
    target = prepare_lr(image, scale, size, multiple=1)
    colours = prepare_lr(image, multiple=1).pixels
    if max(target.size) <= sampling.max_long_side or not sampling.tile:
        sides = sampling.min_short_side, sampling.max_long_side
        work = working_size(*target.size, *sides, sampling.multiple)
        return replace(target, pixels=_resize(colours, work, sampling), work=work)
    target = prepare_lr(image, scale, size, sampling.multiple, sampling.min_short_side)
    bottom, right = (padded - side for padded, side in zip(target.pixels.shape[-2:], target.work, strict=True))
    return replace(target, pixels=pad(_resize(colours, target.work, sampling), bottom, right))


def _resize(image: Tensor, size: tuple[int, int], sampling: Sampling) -> Tensor:
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, size=size, mode=sampling.interpolation, antialias=True).clamp(0, 1)
