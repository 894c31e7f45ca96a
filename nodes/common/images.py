"""Pictures on their way in and out: enlarging, padding, putting back alpha and grey, sheets. Files: image_files.py.

Here an image is a float32 tensor (B, C, H, W) in 0..1 ("bchw"); C is 1 grey, 2 grey + alpha, 3 RGB, 4 RGB + alpha.
ComfyUI's IMAGE is (B, H, W, C) in 0..1.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .image_files import MODES, checked, from_pillow, read_image, to_pillow, write_image

__all__ = [
    "Prepared",
    "checked",
    "crop",
    "finish",
    "from_comfy",
    "from_pillow",
    "pad",
    "prepare_lr",
    "read_image",
    "resize",
    "side_by_side",
    "to_comfy",
    "to_pillow",
    "write_image",
]

LONGEST = 4  # not in the paper: a picture raised to min_short_side grows to at most 4 x that on its long side


@dataclass(frozen=True)
class Prepared:
    """A low-resolution picture made ready for a model, and what is needed to give the result its form back.

    pixels: (B, 3, H', W') enlarged LR at working size, padded on the right and at the bottom to the model's multiple.
    size: (h, w) exact target size in pixels.
    work: (h, w) working size without the padding; larger than `size` where `min_short_side` asked for it.
    lr: (B, 3, h, w) enlarged LR of exactly the target size, the reference for the colour fix.
    alpha: (B, 1, h, w) enlarged alpha, or None.
    grey: the picture had one colour channel.
    """

    pixels: Tensor
    size: tuple[int, int]
    work: tuple[int, int]
    lr: Tensor
    alpha: Tensor | None
    grey: bool


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic interpolation as in Pillow (a = -0.5, antialiased where it shrinks), clamped to 0..1.

    Args:
        image: (B, C, H, W) float in 0..1.
        size: (h, w) in pixels.
    Returns: (B, C, h, w) float32; the values are untouched where the size is already right.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image.float()
    return F.interpolate(image.float(), size=size, mode="bicubic", antialias=True).clamp(0, 1)


def prepare_lr(
    image: Tensor,
    scale: float | None = None,
    size: tuple[int, int] | None = None,
    multiple: int = 16,
    min_short_side: int = 0,
) -> Prepared:
    """Enlarges a low-resolution picture to its target size and pads it for a model.

    Padding mirrors the picture; where it is too small for that, its last row or column is repeated. Alpha is enlarged
    apart from the colours. Values slightly outside 0..1 are clamped.

    Args:
        image: (B, C, H, W) float in 0..1, C in 1..4, any size from 1 px.
        scale: of the sides, > 0; the target is rounded to whole pixels. Neither scale nor size = the size it has.
        size: exact target (h, w) instead of a scale.
        multiple: of the padded sides, in pixels.
        min_short_side: in pixels; a smaller target is worked on at this size, and `crop` shrinks the result back.
            not in the paper: for very long pictures the growth stops where the long side is 4 x min_short_side, and the
            short side is padded.
    Raises: ValueError for anything that is no such image (NaN, values in 0..255, other shapes) or a target below 1 px.
    """
    image = checked(image)
    if scale is not None and size is not None:
        raise ValueError(f"both scale {scale} and size {size} are given; give one of them.")
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}; it must be above 0, for example 4.")
    height, width = (int(side) for side in size or (max(1, round(side * (scale or 1))) for side in image.shape[-2:]))
    if height < 1 or width < 1 or multiple < 1:
        raise ValueError(f"the target is {height}x{width} px in multiples of {multiple}; all must be 1 or more.")
    short, long = sorted((height, width))
    growth = max(1.0, min(min_short_side / short, LONGEST * min_short_side / long))
    work = (round(height * growth), round(width * growth))

    colours, alpha = (image[:, :-1], image[:, -1:]) if image.shape[1] in (2, 4) else (image, None)
    grey = colours.shape[1] == 1
    rgb = colours.expand(-1, 3, -1, -1).contiguous()
    lr = resize(rgb, (height, width))
    enlarged = lr if work == (height, width) else resize(rgb, work)
    bottom, right = (math.ceil(max(side, min_short_side) / multiple) * multiple - side for side in work)
    return Prepared(
        pixels=pad(enlarged, bottom, right),
        size=(height, width),
        work=work,
        lr=lr,
        alpha=None if alpha is None else resize(alpha, (height, width)),
        grey=grey,
    )


def pad(image: Tensor, bottom: int, right: int) -> Tensor:
    """Pads (B, C, H, W) below and on the right: mirrored where the side is longer than the padding, else edge."""
    mode = "reflect" if bottom < image.shape[-2] else "replicate"
    image = F.pad(image, (0, 0, 0, bottom), mode=mode) if bottom else image
    mode = "reflect" if right < image.shape[-1] else "replicate"
    return F.pad(image, (0, right, 0, 0), mode=mode) if right else image


def crop(pixels: Tensor, prepared: Prepared) -> Tensor:
    """A model's picture (B, 3, H', W') without its padding, at the exact target size: (B, 3, h, w) float32.

    A picture that has the target size already is returned as it is.
    Raises: as `unpad`.
    """
    return resize(unpad(pixels, prepared), prepared.size)


def unpad(pixels: Tensor, prepared: Prepared) -> Tensor:
    """A model's picture (B, 3, H', W') without its padding, at the working size; of the target size, as it is.

    Raises: ValueError if the picture has neither the padded nor the target size.
    """
    if tuple(pixels.shape[-2:]) == prepared.size:
        return pixels
    if pixels.shape[-2:] != prepared.pixels.shape[-2:]:
        raise ValueError(
            f"the picture is {tuple(pixels.shape)}; expected the prepared size {tuple(prepared.pixels.shape[-2:])} or "
            f"the target size {prepared.size}."
        )
    height, width = prepared.work
    return pixels[..., :height, :width]


def finish(pixels: Tensor, prepared: Prepared) -> Tensor:
    """Gives the result the form of the input: `crop`, clamp to 0..1, one channel for a grey input, alpha put back.

    Args:
        pixels: (B, 3, H', W') from the model, or (B, 3, h, w) already cropped and colour-fixed.
    Returns: (B, C, h, w) float32 in 0..1, C as the input of `prepare_lr` had.
    """
    colours = crop(pixels, prepared).clamp(0, 1)
    if prepared.grey:
        colours = colours.mean(dim=1, keepdim=True)
    return colours if prepared.alpha is None else torch.cat([colours, prepared.alpha.to(colours)], dim=1)


def from_comfy(image: Tensor) -> Tensor:
    """ComfyUI's IMAGE (B, H, W, C) -> (B, C, H, W) float32. Raises: ValueError for other shapes."""
    if image.dim() != 4 or image.shape[-1] not in MODES:
        raise ValueError(f"the IMAGE has shape {tuple(image.shape)}; expected (B, H, W, C) with C 1, 3 or 4.")
    return image.permute(0, 3, 1, 2).float().contiguous()


def to_comfy(image: Tensor) -> Tensor:
    """(B, C, H, W) -> ComfyUI's IMAGE (B, H, W, C), float32 on the CPU, clamped to 0..1."""
    return image.permute(0, 2, 3, 1).float().cpu().clamp(0, 1).contiguous()


SHEET_PAPER, SHEET_INK, SHEET_GAP = (24, 24, 24), (240, 240, 240), 4  # colours, and pixels between two panels


def side_by_side(before: Tensor, after: Tensor, labels: tuple[str, str] = ("before", "after")) -> Tensor:
    """A sheet with both pictures next to each other, each under its label.

    The lower picture is enlarged without smoothing to the height of the other one, so that its pixels stay visible;
    transparency is shown on white. Panels are at least as wide as their labels.

    Args:
        before, after: (B, C, H, W) in 0..1; sizes and channels may differ, B may not.
    Returns: (B, 3, h, w) float32 in 0..1.
    Raises: ValueError if the batches differ or the number of labels is not two.
    """
    before, after = checked(before), checked(after)
    if len(before) != len(after) or len(labels) != 2:
        raise ValueError(f"{len(before)} and {len(after)} pictures with {len(labels)} labels; expected pairs and two.")
    height = max(before.shape[-2], after.shape[-2])
    font = ImageFont.load_default(size=min(48, max(14, height // 24)))
    sheets = []
    for pair in zip(before, after, strict=True):
        panels = [_panel(picture, height, label, font) for picture, label in zip(pair, labels, strict=True)]
        sheet = Image.new("RGB", (sum(p.width for p in panels) + SHEET_GAP, panels[0].height), SHEET_PAPER)
        sheet.paste(panels[0], (0, 0))
        sheet.paste(panels[1], (panels[0].width + SHEET_GAP, 0))
        sheets.append(from_pillow(sheet))
    return torch.cat(sheets)


def _panel(picture: Tensor, height: int, label: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    image = to_pillow(picture).convert("RGBA")
    if image.height < height:
        image = image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.NEAREST)
    ascent, descent = font.getmetrics()
    strip, margin = ascent + descent + 6, 6
    panel = Image.new("RGB", (max(image.width, int(font.getlength(label)) + 2 * margin), height + strip), SHEET_PAPER)
    ImageDraw.Draw(panel).text((margin, 3), label, fill=SHEET_INK, font=font)
    white = Image.new("RGBA", image.size, "white")
    panel.paste(Image.alpha_composite(white, image).convert("RGB"), (0, strip))
    return panel
