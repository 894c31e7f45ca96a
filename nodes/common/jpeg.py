"""JPEG compression and decompression of tensors, batched, on any device: what a file would lose, without the file.

The lossy steps of baseline JPEG (ITU-T T.81) as JFIF encoders do them: RGB -> YCbCr (BT.601 full range), chroma halved
in both directions (4:2:0), 8x8 DCT, quantisation with the standard tables (T.81 annex K) scaled by the quality, and
back. The entropy coding loses nothing and is left out. The DCT is a matrix product, C = D B D^T.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# T.81 table K.1 (luma) and K.2 (chroma), rows = vertical frequency.
LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
_KR, _KB = 0.299, 0.114  # BT.601 luma weights of red and blue
_KG = 1 - _KR - _KB


@lru_cache(maxsize=8)
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tables (2, 8, 8), DCT matrix (8, 8), RGB -> YCbCr (3, 3), YCbCr -> RGB (3, 3)) on `device`, float32."""
    tables = torch.tensor((LUMA_TABLE, CHROMA_TABLE), dtype=torch.float32)
    n = torch.arange(8, dtype=torch.float64)
    dct = torch.cos(math.pi / 16 * (2 * n[None] + 1) * n[:, None]) / 2
    dct[0] /= math.sqrt(2)
    blue, red = 2 * (1 - _KB), 2 * (1 - _KR)
    forward = torch.tensor(
        ((_KR, _KG, _KB), (-_KR / blue, -_KG / blue, 0.5), (0.5, -_KG / red, -_KB / red)), dtype=torch.float64
    )
    return tables.to(device), dct.float().to(device), forward.float().to(device), forward.inverse().float().to(device)


def quantisation_tables(quality: Tensor) -> Tensor:
    """Standard tables scaled as the IJG encoder does: floor((T s + 50) / 100), s = 5000/q below 50, else 200 - 2q.

    Args:
        quality: (B,) in 1..100; fractions are allowed, whole numbers give exactly the tables of libjpeg.
    Returns: (B, 2, 8, 8): luma, chroma.
    """
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality).floor()
    tables = _constants(quality.device)[0]
    return ((tables * scale.view(-1, 1, 1, 1) + 50) / 100).floor().clamp(1, 255)


def _quantised(plane: Tensor, table: Tensor, dct: Tensor) -> Tensor:
    """DCT, round to multiples of the table, inverse DCT. plane (N, h, w), multiples of 8; table (N, 8, 8)."""
    n, height, width = plane.shape
    rows = (plane.reshape(-1, 8) @ dct.T).view(n, height // 8, 8, width)
    coefficients = dct @ rows  # (N, h/8, 8, w): vertical frequency, then block and horizontal frequency
    step = table.repeat(1, 1, width // 8).view(n, 1, 8, width)
    coefficients = (coefficients / step).round_() * step
    rows = dct.T @ coefficients
    return (rows.view(-1, 8) @ dct).view(n, height, width)


@torch.no_grad()
def jpeg(image: Tensor, quality: float | Tensor) -> Tensor:
    """Compresses and decompresses a batch of pictures as a JPEG file (4:2:0, standard tables) would.

    Sizes that are no multiple of 16 are filled up by repeating the last row and column, as encoders do, and cropped.
    Pixels and colour planes are rounded to 8 bits as in a file; chroma is enlarged by the triangle filter of decoders.

    Args:
        image: (B, 3, H, W) float, RGB in 0..1, any size from 1 px; values outside are clamped.
        quality: 1..100, a number or (B,), fractions allowed.
    Returns: (B, 3, H, W), multiples of 1/255 in 0..1, dtype and device of `image`.
    Raises: ValueError for another shape or a quality out of range (a tensor on an accelerator is not checked,
        to spare the wait for it).
    """
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"jpeg needs RGB pictures (B, 3, H, W); got a tensor of shape {tuple(image.shape)}.")
    batch, _, height, width = image.shape
    if not isinstance(quality, Tensor):
        if not 1 <= quality <= 100:
            raise ValueError(f"JPEG quality must be in 1..100; got {quality}.")
        quality = torch.full((batch,), float(quality), device=image.device)
    elif quality.shape != (batch,):
        raise ValueError(f"JPEG quality must be a number or one per picture ({batch},); got {tuple(quality.shape)}.")
    elif quality.device.type == "cpu" and not bool(((quality >= 1) & (quality <= 100)).all()):
        raise ValueError(f"JPEG quality must be in 1..100; got {quality.tolist()}.")
    _, dct, to_ycc, to_rgb = _constants(image.device)
    tables = quantisation_tables(quality.to(image.device, torch.float32))

    x = (image.float().clamp(0, 1) * 255).round_()
    bottom, right = -height % 16, -width % 16
    if bottom or right:
        x = F.pad(x, (0, right, 0, bottom), mode="replicate")
    ycc = (to_ycc @ x.flatten(2)).view_as(x).round_()
    luma = _quantised(ycc[:, 0] - 128, tables[:, 0], dct) + 128
    chroma = F.avg_pool2d(ycc[:, 1:], 2).flatten(0, 1)
    rounding = x.new_tensor((0.25, 0.5)).repeat(chroma.shape[-1] // 2)  # halves go down and up by turns, as in libjpeg
    chroma = (chroma + rounding).floor_()
    chroma = _quantised(chroma, tables[:, 1].repeat_interleave(2, dim=0), dct)
    chroma = chroma[:, : (height + 1) // 2, : (width + 1) // 2].unflatten(0, (batch, 2))
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear")[..., :height, :width]
    ycc = torch.cat((luma[:, None, :height, :width], chroma), dim=1)
    rgb = (to_rgb @ ycc.flatten(2)).view(image.shape)
    return (rgb.round_().clamp_(0, 255) / 255).to(image.dtype)
