"""Denoising a large latent in windows, blended with Gaussian weights (MultiDiffusion, Bar-Tal et al. 2023, equation 5).

At every step each window is denoised on its own; the prediction for a pixel is the weighted mean over the windows that
hold it:  v(p) = sum_i w_i(p) v_i(p) / sum_i w_i(p).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .memory import OutOfMemory, release_cached_memory

log = logging.getLogger(__name__)

VARIANCE = 0.01  # of the Gaussian weights, in units of the (squared) window side


@dataclass(frozen=True)
class Box:
    """A window of a latent, in latent pixels."""

    top: int
    left: int
    height: int
    width: int

    def crop(self, tensor: Tensor) -> Tensor:
        """The window of `tensor` over its last two dimensions: (..., H, W) -> (..., height, width), a view."""
        return tensor[..., self.top : self.top + self.height, self.left : self.left + self.width]


# denoise(x (k*B, C, h, w), t scalar, boxes of length k) -> prediction (k*B, C', h, w). Rows are window-major: rows
# [i*B : (i+1)*B] are boxes[i] of the B samples. Spatial conditions are cropped to the boxes by the function itself.
Denoise = Callable[[Tensor, Tensor, list[Box]], Tensor]


def plan_tiles(height: int, width: int, tile: int = 64, overlap: int = 24) -> list[Box]:
    """Square windows that cover a latent, row by row (specification of DiT4SR's published program).

    Windows start every `tile - overlap` pixels; the last one of a row or column is shifted back to the border. Where
    the tile is larger than the smaller side of the latent, it shrinks to that side.
    not in the paper: the overlap of a window that had to shrink is at most half of it. The published program keeps it,
    which makes the stride tiny (or zero) for narrow pictures.

    Args:
        height, width: of the latent, in latent pixels.
        tile: side of a window, in latent pixels.
        overlap: of neighbouring windows, in latent pixels; less than `tile`.
    Returns: squares of one size: a single one for a square latent of at most `tile`, several for all others. (`whole`
        plans one window whatever the shape.)
    Raises: ValueError for an empty latent, a tile below 1 or an overlap outside 0..tile-1.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a latent of {height}x{width} has nothing to denoise; both sides must be 1 or more.")
    if tile < 1:
        raise ValueError(f"the tile is {tile} latent pixels; it must be 1 or more.")
    if not 0 <= overlap < tile:
        raise ValueError(
            f"the overlap is {overlap} latent pixels with a tile of {tile}; it must be 0 or more and smaller than the "
            f"tile. Lower the overlap or enlarge the tile."
        )
    window = min(tile, height, width)
    if window < tile:
        overlap = min(overlap, window // 2)
    stride = window - overlap
    lefts = _starts(width, window, stride)
    return [Box(top, left, window, window) for top in _starts(height, window, stride) for left in lefts]


def _starts(length: int, window: int, stride: int) -> list[int]:
    starts = list(range(0, length - window, stride))
    return [*starts, length - window]


def whole(height: int, width: int) -> list[Box]:
    """The plan of one window that covers a latent of (height, width): no tiling."""
    return [Box(0, 0, height, width)]


def gaussian_weight(height: int, width: int) -> Tensor:
    """Blending weights of one window, for parity with the published program.

    w(y, x) = g((y - height/2) / height) g((x - (width-1)/2) / width),  g(u) = exp(-u^2 / (2 * 0.01)) / sqrt(2 pi 0.01).
    The two centres differ by half a pixel, as published.

    Returns: (height, width), float32, all positive; only ratios of weights matter.
    """
    y = (torch.arange(height, dtype=torch.float64) - height / 2) / height
    x = (torch.arange(width, dtype=torch.float64) - (width - 1) / 2) / width
    exponent = -(y[:, None] ** 2 + x[None, :] ** 2) / (2 * VARIANCE)
    return (torch.exp(exponent) / (2 * torch.pi * VARIANCE)).float()


def tiled(
    denoise: Denoise,
    plan: list[Box],
    tile_batch: int = 4,
    on_window: Callable[[int, int], None] | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Wraps a Denoise into a function of the whole latent: windows are run `tile_batch` per call and blended.

    A call that runs out of device memory is repeated with half the windows, and so is every later one; when a single
    window does not fit, the error is raised. Blending is done in float32 on the latent's device, wherever the network
    lives. A plan of one window returns the prediction itself, in its own dtype.

    Args:
        denoise: see `Denoise`.
        plan: windows of one size that cover the latent (`plan_tiles`).
        tile_batch: windows per call, 1 or more.
        on_window: called with (windows done, windows in all) after each call; may raise to cancel.
    Returns: f(x_t (B, C, H, W), t scalar) -> prediction (B, C', H, W), in the dtype and on the device of x_t.
    Raises: ValueError for an empty plan, windows of several sizes, gaps between them, or a latent of another size.
    """
    if tile_batch < 1:
        raise ValueError(f"tile_batch is {tile_batch}; it must be 1 or more windows per call.")
    shares = _shares(plan)
    height, width = _extent(plan)
    at_once = min(tile_batch, len(plan))  # shrinks when memory runs out, and stays so for later steps

    def predict(x_t: Tensor, t: Tensor, start: int) -> list[Tensor]:
        """The predictions (B, C', h, w) for plan[start : start + at_once], or for fewer when memory is short."""
        nonlocal at_once
        while True:
            boxes = plan[start : start + at_once]
            try:
                prediction = denoise(torch.cat([box.crop(x_t) for box in boxes]), t, boxes)
                return list(prediction.reshape(len(boxes), x_t.shape[0], *prediction.shape[1:]))
            except OutOfMemory:
                if len(boxes) == 1:
                    raise
            at_once = (len(boxes) + 1) // 2
            release_cached_memory()
            log.warning("out of memory with %d windows at once; going on with %d.", len(boxes), at_once)

    def denoise_whole(x_t: Tensor, t: Tensor) -> Tensor:
        if tuple(x_t.shape[-2:]) != (height, width):
            raise ValueError(
                f"the plan covers a latent of {height}x{width}, but the latent is {tuple(x_t.shape)}. Make the plan "
                f"with plan_tiles of the latent's own height and width."
            )
        blended, done = None, 0
        while done < len(plan):
            predictions = predict(x_t, t, done)
            if len(plan) == 1:
                blended = predictions[0].to(x_t.device)
            elif blended is None:
                batch, channels = predictions[0].shape[:2]
                blended = torch.zeros(batch, channels, height, width, dtype=torch.float32, device=x_t.device)
            if len(plan) > 1:
                for box, share, prediction in zip(plan[done:], shares[done:], predictions, strict=False):
                    # A running weighted mean: equal predictions leave it untouched to the last bit.
                    mean = box.crop(blended)
                    mean += (prediction.to(mean) - mean) * share.to(x_t.device)
            done += len(predictions)
            if on_window is not None:
                on_window(done, len(plan))
        return blended if len(plan) == 1 else blended.to(x_t.dtype)

    return denoise_whole


def _extent(plan: list[Box]) -> tuple[int, int]:
    return max(box.top + box.height for box in plan), max(box.left + box.width for box in plan)


def _shares(plan: list[Box]) -> list[Tensor]:
    """For each window its share w_i / (w_1 + ... + w_i) in the running mean, (h, w) float32 each."""
    sizes = sorted({(box.height, box.width) for box in plan})
    if len(sizes) != 1:
        raise ValueError(f"a plan needs windows of one size, at least one; got the sizes {sizes}. Use plan_tiles.")
    weight = gaussian_weight(*sizes[0]).double()
    total = torch.zeros(_extent(plan), dtype=torch.float64)
    shares = []
    for box in plan:
        seen = box.crop(total)
        seen += weight
        shares.append((weight / seen).float())
    if not total.all():
        raise ValueError(f"the plan of {len(plan)} windows leaves gaps in a latent of {tuple(total.shape)}.")
    return shares
