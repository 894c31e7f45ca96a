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
        cell: side of a cell, px; pictures are shrunk or enlarged to fit, keeping their proportions.
    Raises: ValueError if there is nothing to show.
    """
    if not rows:
        raise ValueError("a sheet needs at least one row of pictures.")
    labels = list(rows[0])
    head = LABEL_SIZE + 2 * MARGIN
    size = (MARGIN + len(labels) * (cell + MARGIN), head + len(rows) * (cell + MARGIN))
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LABEL_SIZE)
    for column, label in enumerate(labels):
        draw.text((MARGIN + column * (cell + MARGIN), MARGIN - 2), label, fill=INK, font=font)
    for line, row in enumerate(rows):
        for column, label in enumerate(labels):
            if label in row:
                picture = _fit(row[label], cell)
                sheet.paste(picture, (MARGIN + column * (cell + MARGIN), head + line * (cell + MARGIN)))
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
