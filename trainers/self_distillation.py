"""Learning features without labels: a student that sees a poor view agrees with a teacher that sees the clean one.

DINO (Caron et al. 2021) for the class token, iBOT (Zhou et al. 2022) for the patches, Sinkhorn-Knopp centering and the
KoLeo regulariser as in DINOv2 (Oquab et al. 2023).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize


class PrototypeHead(nn.Module):
    """Tokens -> cosine similarity with `prototypes` learned directions: (..., width) -> (..., prototypes), float32."""

    def __init__(self, width: int, prototypes: int, hidden: int = 256, bottleneck: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck))
        self.directions = nn.Parameter(torch.randn(prototypes, bottleneck) / math.sqrt(bottleneck))

    def forward(self, tokens: Tensor) -> Tensor:
        points = normalize(self.layers(tokens).float(), dim=-1)
        with torch.autocast(points.device.type, enabled=False):
            return points @ normalize(self.directions.float(), dim=-1).T


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """Sharp assignments that use all prototypes alike (SwAV, Caron et al. 2020, section 3.1): this rules out collapse.

    Q = exp(scores / temperature), then `rounds` times: every prototype gets the same mass, every sample the same mass.

    Args:
        scores: (N, K) of the teacher, float32; N is what this process has.
        temperature: above 0; lower = sharper.
    Returns: (N, K), rows sum to 1.
    """
    q = ((scores - scores.max()) / temperature).exp()
    for _ in range(rounds):
        q = q / q.sum(dim=0, keepdim=True).clamp(min=1e-12)
        q = q / q.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return q


def cross_entropy(assignments: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """-sum_k q_k log softmax(scores / temperature)_k for every sample: DINO's equation 1.

    Args:
        assignments: (N, K) of the teacher. scores: (N, K) of the student, float32.
    Returns: (N,).
    """
    return -(assignments * log_softmax(scores / temperature, dim=-1)).sum(dim=-1)


def koleo(tokens: Tensor) -> Tensor:
    """-mean log distance to the nearest neighbour among the normalised tokens (N, C), N at least 2: spreads them."""
    points = normalize(tokens.float(), dim=-1)
    nearest = (points @ points.T).fill_diagonal_(-2.0).argmax(dim=1)
    return -((points - points[nearest]).norm(dim=-1) + 1e-8).log().mean()


def block_mask(batch: int, grid: tuple[int, int], share: float, lowest: float, highest: float,
               generator: torch.Generator) -> Tensor:
    """One rectangle of patches a picture, hidden from the student.

    Args:
        grid: (h, w) patches.
        share: of the pictures that get a rectangle, 0..1.
        lowest, highest: its area relative to the picture, drawn uniformly; its sides' ratio is in 1/2..2.
        generator: of the CPU.
    Returns: (batch, h * w) bool.
    """
    height, width = grid
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    for row, (chosen, area, ratio, top, left) in enumerate(torch.rand(batch, 5, generator=generator).tolist()):
        if chosen >= share:
            continue
        area, stretch = (lowest + (highest - lowest) * area) * height * width, 2 ** (ratio - 0.5)
        tall = min(max(round(math.sqrt(area) * stretch), 1), height)
        wide = min(max(round(math.sqrt(area) / stretch), 1), width)
        top, left = round(top * (height - tall)), round(left * (width - wide))
        mask[row, top:top + tall, left:left + wide] = True
    return mask.flatten(1)
