"""The curve of delta over the steps as a small picture (InstantIR figure 4 c)."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..common.images import SHEET_INK, SHEET_PAPER, from_pillow

WIDTH, HEIGHT = 480, 300  # pixels
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 34, 40  # pixels around the axes
GRID = (70, 70, 70)
COLOURS = ((255, 176, 64), (96, 190, 255), (140, 220, 110), (240, 120, 190))  # of the pictures of a batch, in turn
_MOST_TICKS = 10


def delta_plot(deltas: Tensor) -> Tensor:
    """Draws delta over the steps, one line for each picture of the batch.

    Args:
        deltas: (n, B), delta as it acted on every step, n >= 1.
    Returns: (1, 3, 300, 480) float32 in 0..1.
    Raises: ValueError for another shape, or no step at all.
    """
    if deltas.dim() != 2 or not len(deltas):
        raise ValueError(f"delta is {tuple(deltas.shape)}; expected (steps, pictures) with one step or more.")
    steps, highest = len(deltas), max(1.0, float(deltas.max()))
    sheet = Image.new("RGB", (WIDTH, HEIGHT), SHEET_PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def point(i: int, value: float) -> tuple[float, float]:
        across = i / (steps - 1) if steps > 1 else 0.5
        return LEFT + across * (right - LEFT), bottom - value / highest * (bottom - TOP)

    draw.text((LEFT, 8), "delta: 1 = close to the input, 0 = free", fill=SHEET_INK, font=font)
    draw.text((right, HEIGHT - 8), "step", fill=SHEET_INK, font=font, anchor="rs")
    for quarter in range(5):
        value = highest * quarter / 4
        y = point(0, value)[1]
        draw.line([(LEFT, y), (right, y)], fill=GRID)
        draw.text((LEFT - 6, y), f"{value:.2f}", fill=SHEET_INK, font=font, anchor="rm")
    for i in range(0, steps, max(1, -(-steps // _MOST_TICKS))):
        draw.text((point(i, 0)[0], bottom + 6), str(i + 1), fill=SHEET_INK, font=font, anchor="mt")
    for b in reversed(range(deltas.shape[1])):  # the first picture's line lies on top
        points = [point(i, float(value)) for i, value in enumerate(deltas[:, b])]
        colour = COLOURS[b % len(COLOURS)]
        draw.line(points, fill=colour, width=2)
        for x, y in points:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
    return from_pillow(sheet)
