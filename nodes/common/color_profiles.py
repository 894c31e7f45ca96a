"""Pictures with an ICC profile, in sRGB: cameras and phones also write Display P3 and Adobe RGB, printers CMYK."""

import functools
import io
import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

log = logging.getLogger(__name__)

# Pillow's mode -> mode without palette and alpha; 16-bit and float pictures are left as they are
_PLAIN = {"L": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK"}
_MODE_OF_SPACE = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # an ICC profile's colour space -> mode it applies to
_SAME = 2  # of 255; profiles that call themselves sRGB differ by as much in how they write its curve


def to_srgb(image: Image.Image, path: Path) -> Image.Image:
    """The picture in sRGB, if it is of 8 bits and carries a profile of something else; otherwise the picture itself.

    Relative colorimetric with black point compensation. Grey stays grey, alpha keeps its values, CMYK becomes RGB. A
    profile that is broken or belongs to another kind of picture is ignored, with a warning.

    Args:
        path: for the warning.
    """
    profile, plain = image.info.get("icc_profile"), _PLAIN.get(image.mode)
    if not profile or plain is None:
        return image
    try:
        transform, mode = _transform(profile)
    except (ImageCms.PyCMSError, OSError, ValueError, ImportError) as error:  # ImportError: Pillow without LittleCMS
        log.warning("%s has a colour profile that cannot be used (%s); its colours are read as sRGB.", path, error)
        return image
    if transform is None:
        return image
    if mode != plain and (plain, mode) != ("L", "RGB"):
        log.warning("%s is %s, its colour profile for %s; its colours are read as sRGB.", path, plain, mode)
        return image
    transparent = image.has_transparency_data
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if transparent else "RGB")
    elif image.mode in ("L", "RGB") and transparent:  # one value or colour stands for transparent
        image = image.convert("LA" if plain == "L" else "RGBA")
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    if plain == "L":
        converted = converted.getchannel("G")
    if transparent:
        converted.putalpha(image.getchannel("A"))
    return converted


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """The way from a profile to sRGB, None where it changes nothing, and the mode of the pictures it takes."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space not in _MODE_OF_SPACE:
        raise ValueError(f"it is for {space}; expected RGB, GRAY or CMYK")
    mode = _MODE_OF_SPACE[space]
    transform = ImageCms.buildTransform(
        source, ImageCms.createProfile("sRGB"), mode, "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION)
    return (None if mode != "CMYK" and _changes_nothing(transform, mode) else transform), mode


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether colours all over the cube, and every grey, keep their values but for rounding."""
    levels = np.arange(0, 256, 15)
    colors = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    colors = np.concatenate([colors, np.arange(256).repeat(3).reshape(-1, 3)]).astype(np.uint8)[None]
    probe = Image.fromarray(colors).convert(mode)
    after = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
    return bool(np.abs(after - np.asarray(probe.convert("RGB"))).max() <= _SAME)
