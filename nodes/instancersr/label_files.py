"""Label maps as PNG files: one label per pixel, 0 = no instance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from ..common.checkpoints import atomic_path


def read_labels(path: str | Path) -> Tensor:
    """Reads a label map of one channel: grey of 8 or 16 bits, or a palette image, whose indices count.

    Returns: (H, W) int64, the numbers as they are in the file.
    Raises: FileNotFoundError; ValueError, naming the file, if it is no picture, damaged, or one of several channels.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no label map {path}.")
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
                raise ValueError(
                    f"{path} has pixels of mode {image.mode}; a label map has one channel with one label per pixel."
                )
            array = np.asarray(image).astype(np.int64)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture that can be read, whatever its name says.") from error
    except (OSError, SyntaxError) as error:  # what Pillow raises on a cut or damaged PNG
        raise ValueError(f"{path} is damaged or cut off ({error}). Make it again.") from error
    if array.min() < 0:
        raise ValueError(f"{path} holds the label {array.min()}; labels are 0 or more.")
    return torch.from_numpy(array)


def write_labels(path: str | Path, labels: Tensor, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a label map as PNG, whole or not at all: 8 bits, or 16 where a label is above 255.

    Args:
        labels: (H, W), whole numbers in 0..65535.
        metadata: PNG text chunks by name.
    Raises: ValueError for other labels or shapes.
    """
    array = labels.cpu().numpy()
    if array.ndim != 2 or not array.size or array.min() < 0 or array.max() > 65535:
        span = f" from {array.min()} to {array.max()}" if array.size else ""
        raise ValueError(f"the labels are {array.shape}{span}; expected (H, W) with whole numbers in 0..65535.")
    chunks = PngImagePlugin.PngInfo()
    for name, text in (metadata or {}).items():
        chunks.add_text(name, text)
    with atomic_path(path) as temporary:
        image = Image.fromarray(array.astype(np.uint8 if array.max() < 256 else np.uint16))
        image.save(temporary, format="PNG", pnginfo=chunks)
