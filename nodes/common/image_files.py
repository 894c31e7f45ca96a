"""Picture files: reading whatever Pillow reads, writing whole or not at all."""

import json
import logging
import os
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .color_profiles import to_srgb

log = logging.getLogger(__name__)

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's mode

# suffix -> Pillow's format and settings; JPEG without chroma subsampling, the others lossless or nearly so
FORMATS = {
    ".png": ("PNG", {"compress_level": 4}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95, "exact": True}),
    ".tif": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}),
}


def checked(image: Tensor) -> Tensor:
    """The image as float32 in 0..1, or a ValueError that says why it is no (B, C, H, W) picture in 0..1."""
    if image.dim() != 4 or image.shape[1] not in MODES or not image.numel():
        raise ValueError(
            f"the image has shape {tuple(image.shape)}; expected (B, C, H, W), none of them 0, with C 1 (grey), "
            f"2 (grey + alpha), 3 (RGB) or 4 (RGB + alpha)."
        )
    if not image.is_floating_point():
        raise ValueError(f"the image is {image.dtype}; expected floats in 0..1. Divide 8-bit values by 255.")
    low, high = image.min().item(), image.max().item()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("the image holds NaN or infinity; expected values in 0..1.")
    if low < -0.5 or high > 1.5:
        raise ValueError(f"the image's values run from {low:g} to {high:g}; expected 0..1.")
    return image.float().clamp(0, 1)


def read_image(path: str | Path) -> Tensor:
    """Reads a picture file into (1, C, H, W) float32 in 0..1, upright.

    Whatever Pillow opens: 1-bit, grey, palette, CMYK, alpha, 16-bit grey (all 16 bits; of 16-bit colour the upper 8),
    float TIFF in 0..1; the EXIF orientation is applied, and an embedded profile other than sRGB (of 8-bit pictures);
    of several frames the first one counts.

    Raises: FileNotFoundError if there is no such file; ValueError, naming it, if it is no picture or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; expected a picture.")
    array = np.atleast_3d(_array(_open(path), path)).astype(np.float32)
    return torch.from_numpy(array).permute(2, 0, 1)[None].contiguous()


def _open(path: Path) -> Image.Image:
    """The first frame, fully decoded and upright."""
    try:
        with Image.open(path) as image:
            image.load()
            return to_srgb(_upright(image, path), path)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture that can be read, whatever its name says.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large to be read safely: {error}") from error
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"{path} is damaged or cut off ({error}). Get the file again.") from error


def _upright(image: Image.Image, path: Path) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # the EXIF block is damaged, the picture is not
        log.warning("%s has unreadable EXIF data (%s); its orientation is ignored.", path, error)
        return image.copy()


def _array(image: Image.Image, path: Path) -> np.ndarray:
    """Pixels (H, W) or (H, W, C) in 0..1."""
    if image.mode.startswith("I"):  # 16-bit grey; "I" holds 16 bits too where Pillow opens a PNG
        array = np.asarray(image).astype(np.float64)
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(f"{path} holds whole numbers from {array.min():g} to {array.max():g}; expected 0..65535.")
        return array / 65535
    if image.mode == "F":
        array = np.asarray(image)
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"{path} holds floats from {array.min():g} to {array.max():g}; expected 0..1.")
        return array
    transparent = image.has_transparency_data
    grey = image.mode in ("1", "L", "LA", "La")
    mode = MODES[(1 if grey else 3) + int(transparent)]
    try:
        return np.asarray(image if image.mode == mode else image.convert(mode)) / 255
    except ValueError as error:
        raise ValueError(f"{path} has colours of mode {image.mode}, which do not convert to {mode}: {error}") from error


def write_image(path: str | Path, image: Tensor, metadata: Mapping[str, str] | None = None) -> None:
    """Writes one picture as 8-bit file in the format of its suffix (.png, .jpg, .webp, .tif), whole or not at all.

    The file appears under its name once it is complete; an existing one is replaced.

    Args:
        image: (1, C, H, W) float in 0..1.
        metadata: texts by name: PNG text chunks; in other formats one JSON object in EXIF's ImageDescription.
    Raises: ValueError for another suffix, more than one picture, alpha in a JPEG, NaN, or a size or metadata that the
        format cannot hold; FileNotFoundError if the folder does not exist.
    """
    path, metadata = Path(path), dict(metadata or {})
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path} has the suffix {path.suffix!r}; expected one of {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; create it first.")
    image = checked(image)
    if image.shape[0] != 1:
        raise ValueError(f"{image.shape[0]} pictures for one file {path}; expected (1, C, H, W), one per file.")
    picture, (kind, settings) = to_pillow(image[0]), FORMATS[path.suffix.lower()]
    if kind == "JPEG" and picture.mode in ("LA", "RGBA"):
        raise ValueError(f"{path}: JPEG holds no transparency. Write a .png, .webp or .tif, or drop the alpha channel.")
    temporary = path.with_name(f".{path.name[:64]}.{uuid.uuid4().hex}.tmp")
    try:
        picture.save(temporary, format=kind, **settings, **_embedded(kind, metadata))
        os.replace(temporary, path)
    except (ValueError, OSError, struct.error) as error:
        if getattr(error, "errno", None) is not None:  # a full disk, a missing permission: the system says it itself
            raise
        raise ValueError(f"{path}: a {kind} file cannot hold this picture or its metadata: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _embedded(kind: str, metadata: dict[str, str]) -> dict:
    """Pillow's save arguments for the metadata."""
    if not metadata:
        return {}
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for key, text in metadata.items():
            chunks.add_text(key, text)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps(metadata)
    return {"exif": exif}


def to_pillow(image: Tensor) -> Image.Image:
    """(C, H, W) in 0..1 -> Pillow image of mode L, LA, RGB or RGBA, rounded to 8 bits."""
    array = (image.float().clamp(0, 1) * 255).round().byte().cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[..., 0] if image.shape[0] == 1 else array)


def from_pillow(image: Image.Image) -> Tensor:
    """Pillow image of mode L, LA, RGB or RGBA -> (1, C, H, W) float32 in 0..1."""
    array = np.array(image, dtype=np.float32) / 255
    return torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1)[None].contiguous()
