"""Contact sheets: a row a photograph, a labelled column a method."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..nodes.common.checkpoints import atomic_path
from ..nodes.common.image_files import to_pillow

MARGIN = 8  # px
LABEL_SIZE = 18  # px
BACKGROUND, INK = (255, 255, 255), (30, 30, 30)


def write_sheet(path: Path, rows: Sequence[Mapping[str, Tensor]], cell: int = 256) -> None:
    """Writes a sheet, PNG or JPEG by the name's ending.

    Args:
        rows: for each photograph: label -> picture (1, C, H, W) in 0..1. The first row gives the columns.
        cell: width of a column, px, and the most that a row is high; pictures are fitted in, keeping their proportions.
    Raises: ValueError if there is nothing to show.
    """
    if not rows:
        raise ValueError("a sheet needs at least one row of pictures.")
    labels = list(rows[0])
    panels = [{label: _fit(row[label], cell) for label in labels if label in row} for row in rows]
    heights = [max(panel.height for panel in row.values()) for row in panels]
    top = LABEL_SIZE + 2 * MARGIN
    width, height = MARGIN + len(labels) * (cell + MARGIN), top + sum(heights) + len(rows) * MARGIN
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LABEL_SIZE)
    for column, label in enumerate(labels):
        draw.text((MARGIN + column * (cell + MARGIN), MARGIN - 2), label, fill=INK, font=font)
    for row, height in zip(panels, heights, strict=True):
        for column, label in enumerate(labels):
            if label in row:
                sheet.paste(row[label], (MARGIN + column * (cell + MARGIN), top))
        top += height + MARGIN
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG"
    with atomic_path(path) as temporary:
        sheet.save(temporary, kind, quality=90)


def _fit(picture: Tensor, cell: int) -> Image.Image:
    height, width = picture.shape[-2:]
    factor = cell / max(height, width)
    if factor != 1:
        size = max(1, round(height * factor)), max(1, round(width * factor))
        picture = F.interpolate(picture, size=size, mode="bicubic", antialias=factor < 1)
    return to_pillow(picture[0]).convert("RGB")
