"""How a picture is sized for InstantIR: published sizes where one window holds it, its own size where windows do."""

from __future__ import annotations

from torch import Tensor

from ..common.images import Prepared
from ..common.sizing import prepare_sized
from .config import Sampling


def prepare(
    image: Tensor, sampling: Sampling, scale: float | None = None, size: tuple[int, int] | None = None
) -> Prepared:
    """Brings a picture to the size that it is drawn at (`sizing.prepare_sized`); without windows it is drawn whole.

    Args:
        image: (B, C, H, W) in 0..1, C 1 to 4. scale, size: of the target, see `prepare_lr`.
    Raises: ValueError as `prepare_lr`.
    """
    return prepare_sized(
        image,
        scale,
        size,
        multiple=sampling.multiple,
        min_short_side=sampling.min_short_side,
        max_long_side=sampling.max_long_side,
        larger="pad" if sampling.tile else "shrink",
        interpolation=sampling.interpolation,
    )
