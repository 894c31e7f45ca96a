"""What LR Prepare knows of each picture of a batch, and how Color Fix gives the restored pictures their form back.

A batch goes through a workflow picture by picture: LR Prepare hands out lists, ComfyUI runs the nodes between once for
each picture, each with its own caption, and Color Fix puts the batch together again. (Were the batch left whole, a list
of N captions would make ComfyUI run the sampler N times on all N pictures.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from .color_fix import color_fix
from .images import Prepared, crop, finish


@dataclass(frozen=True)
class Frame:
    """What goes over a FOURFOLD_FRAME socket.

    prepared: of one picture.
    batch: one object for all pictures that came in one batch.
    """

    prepared: Prepared
    batch: object


def split(prepared: Prepared) -> list[Frame]:
    """A frame for each picture."""
    batch = object()
    return [Frame(replace(prepared, pixels=prepared.pixels[b:b + 1], lr=prepared.lr[b:b + 1],
                          alpha=None if prepared.alpha is None else prepared.alpha[b:b + 1]), batch)
            for b in range(len(prepared.pixels))]


def put_together(images: Sequence[Tensor], frames: Sequence[Frame], method: str) -> list[tuple[Tensor, Tensor]]:
    """Restored pictures in the colours, size and batches that they came in.

    Args:
        images: each (B, C, H', W') in 0..1 with C of 3 or more, as they come from the decoder: as many as frames, or
            of as many pictures, or all of the one picture of a single frame.
        frames: of the pictures, in the same order.
        method: one of `color_fix.METHODS`.
    Returns: for each batch that came in: pictures (B, 3 or 4, h, w) in 0..1, and their transparency (B, h, w), 0 =
        opaque, on the CPU.
    Raises: ValueError if pictures and frames do not match.
    """
    done = [(frame.batch, _fixed(image, frame.prepared, method)) for image, frame in _pairs(images, frames)]
    batches = ([fixed for _, fixed in group] for _, group in groupby(done, lambda entry: id(entry[0])))
    return [(torch.cat([picture for picture, _ in batch]), torch.cat([clear for _, clear in batch]))
            for batch in batches]


def _pairs(images: Sequence[Tensor], frames: Sequence[Frame]) -> list[tuple[Tensor, Frame]]:
    if len(images) != len(frames):  # put into batches of another size on the way, or several results of one picture
        images = [row for image in images for row in image.split(1)]
        frames = list(frames) * len(images) if len(frames) == 1 else frames
    if len(images) != len(frames):
        raise ValueError(f"there are {len(images)} restored pictures and {len(frames)} frames; connect the frame of "
                         "the LR Prepare that they went through, with no node between that leaves pictures out.")
    return list(zip(images, frames, strict=True))


def _fixed(image: Tensor, prepared: Prepared, method: str) -> tuple[Tensor, Tensor]:
    """Results of one picture, (B, 3 or 4, h, w), and their transparency (B, h, w)."""
    many = [len(image), -1, -1, -1]
    alpha = None if prepared.alpha is None else prepared.alpha.expand(many)
    prepared = replace(prepared, lr=prepared.lr.expand(many), alpha=alpha)
    sr = color_fix(crop(image[:, :3], prepared), prepared.lr, method)
    result = finish(sr, prepared)
    if prepared.grey:  # as RGB: Save Image takes three channels or four
        result = torch.cat([result[:, :1].expand(-1, 3, -1, -1), result[:, 1:]], dim=1)
    transparency = torch.zeros_like(sr[:, 0]) if alpha is None else 1 - alpha[:, 0]
    return result, transparency.cpu()
