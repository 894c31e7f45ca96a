"""A captioner without weights: it says in fixed words what can be measured in a photograph.

"bright, warm, high contrast, blue and green, rich texture, crisp, vertical edges"

The tiny family is trained with these sentences, so every word must carry information: the thresholds split photographs
evenly, and texture (how much detail) and sharpness (how fine the detail is) are measured apart from light and colour.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

COLORS = ("black", "grey", "white", "red", "orange", "brown", "yellow", "green", "cyan", "blue", "purple", "pink")

# Words from low to high. The thresholds between them are the quantiles (thirds, quarters or fifths) of the measure
# over 4000 random 128 px crops, ten of each of the 400 training photographs of BSDS500, measured by `describe`; so a
# word says how a picture compares with ordinary photographs. Warmth (at 20, 40 and 70 %) leaves grey pictures neutral.
SCALES: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "light": (("very dark", "dark", "mid light", "bright", "very bright"), (0.316, 0.392, 0.463, 0.540)),
    "warmth": (("cool", "neutral", "warm", "golden"), (-0.02, 0.06, 0.16)),
    "contrast": (("low contrast", "mid contrast", "high contrast"), (0.142, 0.201)),
    "texture": (("flat", "smooth", "fine texture", "rich texture", "dense texture"), (0.031, 0.046, 0.060, 0.082)),
    "sharpness": (("blurred", "soft", "sharp", "crisp"), (0.66, 0.77, 0.87)),
}
GOOD_PHOTOGRAPH = {"texture": 0.07, "sharpness": 0.9}  # "rich texture, crisp": the fourth of five, and of four, steps
COHERENCE = 0.14  # below it the edges have no common direction: the first quartile of the same crops
UPRIGHT = 12.0  # degrees; edges nearer to an axis: horizontal (29 % of the crops) or vertical (20), else diagonal (26)
SECOND_COLOR = 0.25  # share of the picture from which a second colour is named

_HUE_BINS, _VALUE_BINS = 72, 20  # 5 degrees and 0.05 each
_FLOOR = 0.5 / 255  # half an 8-bit level: rounding noise of a flat picture is neither texture nor sharpness


def _color_table() -> Tensor:
    """Index into COLORS for (hue bin, value bin) of a coloured pixel, flattened."""
    names = []
    for h in range(_HUE_BINS):
        hue = (h + 0.5) * 360 / _HUE_BINS
        for v in range(_VALUE_BINS):
            value = (v + 0.5) / _VALUE_BINS
            if value < 0.15:
                name = "black"
            elif 10 <= hue < 60 and value < 0.6:
                name = "brown"
            else:
                limits = ((15, "red"), (45, "orange"), (68, "yellow"), (160, "green"), (190, "cyan"), (255, "blue"),
                          (290, "purple"), (345, "pink"), (360, "red"))
                name = next(color for limit, color in limits if hue < limit)
            names.append(COLORS.index(name))
    return torch.tensor(names)


_COLOR_TABLE = _color_table()
_GREY_TABLE = torch.tensor([0] * 4 + [1] * 12 + [2] * 4)  # value bin of a colourless pixel -> black, grey, white


class EmbeddedCaptioner:
    """Describes photographs by light, warmth, contrast, colours, texture, sharpness and the direction of edges.

    Deterministic, and computed on the CPU whatever the device of the images: a picture always has the same caption.
    """

    identity = "embedded-1"  # changes when the words or their thresholds change

    def __init__(self, as_good: bool = False):
        """
        Args:
            as_good: say texture and sharpness of a good photograph instead of those measured. In a poor picture they
                measure the damage ("flat, blurred"), and a network that is given such a prompt paints it.
        """
        self.as_good = as_good
        if as_good:
            self.identity += " as good"

    def __call__(self, images: Tensor) -> list[str]:
        """Caption of each image.

        Args:
            images: (B, 3, H, W) or (B, 1, H, W) in 0..1, any size from 1x1.
        Returns: B sentences of at most 96 ASCII characters.
        Raises: ValueError for another shape or for NaN.
        """
        wished = GOOD_PHOTOGRAPH if self.as_good else {}
        return [sentence(measured | wished) for measured in self.describe(images)]

    def describe(self, images: Tensor) -> list[dict]:
        """What the caption is made of, for each image of a (B, 3 or 1, H, W) batch in 0..1.

        Returns: B dicts of
            light: mean luma, 0..1;
            warmth: mean of red minus blue, -1..1;
            contrast: standard deviation of luma, 0..0.5;
            texture: mean magnitude of the two finest bands of luma (details of 1..2 and of 2..4 px), 0..1;
            sharpness: magnitude of the finest band over that of the next, 0 for a flat picture, 2 for white noise;
            coherence: 0 (edges run everywhere) .. 1 (all edges are parallel), of the structure tensor;
            angle: direction in which the edges run, degrees: 0 horizontal, 45 rising to the right, 90 vertical, < 180;
            colors: {name: share}, most frequent first, shares add up to 1.
        """
        pixels = eight_bit(images) / 255
        red, green, blue = pixels.unbind(1)
        luma = (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)
        finest, next_luma = _band(luma)
        next_band, _ = _band(next_luma)
        finest, next_band = finest.abs().mean((1, 2, 3)), next_band.abs().mean((1, 2, 3))
        coherence, angle = _edge_direction(luma)
        numbers = torch.stack([
            luma.mean((1, 2, 3)), (red - blue).mean((1, 2)), luma.std((1, 2, 3), unbiased=False),
            finest + next_band, finest / (next_band + _FLOOR), coherence, angle,
        ], dim=1).tolist()
        shares = _color_shares(pixels).tolist()
        keys = ("light", "warmth", "contrast", "texture", "sharpness", "coherence", "angle")
        return [dict(zip(keys, row, strict=True), colors=_ranked(share))
                for row, share in zip(numbers, shares, strict=True)]


def sentence(measured: dict) -> str:
    """The caption for one dict of `EmbeddedCaptioner.describe`; change its numbers to ask for another picture."""
    words = {key: names[sum(measured[key] >= limit for limit in limits)] for key, (names, limits) in SCALES.items()}
    colors = list(measured["colors"].items())
    named = [name for i, (name, share) in enumerate(colors[:2]) if i == 0 or share >= SECOND_COLOR]
    return ", ".join([words["light"], words["warmth"], words["contrast"], " and ".join(named), words["texture"],
                      words["sharpness"], _direction_word(measured["coherence"], measured["angle"])])


def eight_bit(images: Tensor) -> Tensor:
    """Images to be described, at the 8-bit levels that a file would hold.

    Args:
        images: (B, 3, H, W) or (B, 1, H, W) in 0..1, on any device.
    Returns: (B, 3, H, W) float32 on the CPU, whole numbers in 0..255.
    Raises: ValueError for another shape or for NaN.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise ValueError("captions are written for images of shape (B, 3, H, W) or (B, 1, H, W), "
                         f"got {tuple(images.shape)}; set an alpha channel aside first.")
    levels = (images.detach().to("cpu", torch.float32) * 255).round_().clamp_(0, 255)
    if levels.isnan().any():
        raise ValueError("an image to caption holds NaN; expected numbers in 0..1.")
    return levels.expand(-1, 3, -1, -1)


def _band(luma: Tensor) -> tuple[Tensor, Tensor]:
    """Details of one octave: (luma minus its 3x3 mean, luma at half size)."""
    blurred = F.avg_pool2d(luma, 3, stride=1, padding=1, count_include_pad=False)
    return luma - blurred, F.avg_pool2d(luma, 2, ceil_mode=True)


def _edge_direction(luma: Tensor) -> tuple[Tensor, Tensor]:
    """Coherence (0..1) and direction of the edges (degrees, 0..180) from the structure tensor of (B, 1, H, W) luma."""
    padded = F.pad(luma, (0, 1, 0, 1), mode="replicate")
    across, down = padded.diff(dim=-1), -padded.diff(dim=-2)  # y upwards
    gx, gy = across[..., 1:, :] + across[..., :-1, :], down[..., 1:] + down[..., :-1]  # share a centre
    xx, yy, xy = ((a * b).mean((1, 2, 3)) for a, b in ((gx, gx), (gy, gy), (gx, gy)))
    coherence = ((xx - yy) ** 2 + 4 * xy**2).sqrt() / (xx + yy + 4 * _FLOOR**2)
    gradient = 0.5 * torch.atan2(2 * xy, xx - yy)
    return coherence, (torch.rad2deg(gradient) + 90) % 180


def _direction_word(coherence: float, angle: float) -> str:
    if coherence < COHERENCE:
        return "mixed edges"
    if min(angle, 180 - angle) < UPRIGHT:
        return "horizontal edges"
    return "vertical edges" if abs(angle - 90) < UPRIGHT else "diagonal edges"


def _color_shares(pixels: Tensor) -> Tensor:
    """Share of each of COLORS in (B, 3, H, W) pixels -> (B, 12). The more saturated a pixel, the more it counts."""
    red, green, blue = F.avg_pool2d(pixels, 2, ceil_mode=True).flatten(2).unbind(1)
    alpha, beta = red - 0.5 * (green + blue), (math.sqrt(3) / 2) * (green - blue)
    chroma = (alpha * alpha + beta * beta).sqrt()
    value = torch.maximum(torch.maximum(red, green), blue)
    hue_bin = (torch.atan2(beta, alpha) * (_HUE_BINS / (2 * math.pi))).floor_().long() % _HUE_BINS
    value_bin = (value * _VALUE_BINS).long().clamp_(max=_VALUE_BINS - 1)
    colored = (chroma / 0.15).clamp_(max=1)
    weights = torch.cat([colored * (0.5 + chroma), 1 - colored], dim=1)
    names = torch.cat([_COLOR_TABLE[hue_bin * _VALUE_BINS + value_bin], _GREY_TABLE[value_bin]], dim=1)
    shares = torch.zeros(len(pixels), len(COLORS)).scatter_add_(1, names, weights)
    return shares / shares.sum(1, keepdim=True)


def _ranked(shares: list[float]) -> dict[str, float]:
    order = sorted(range(len(COLORS)), key=lambda i: -shares[i])
    return {COLORS[i]: shares[i] for i in order}
