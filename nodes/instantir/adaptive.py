"""Adaptive restoration (InstantIR section 3.3): how far previews and predictions differ says how good the input is."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from .config import Adaptive

REST_BELOW = 0.1  # a sample whose residuals would be scaled by this or less goes without (published program)
MODES = get_args(Adaptive)


class AdaptiveRestoration:
    """delta of every sample over the steps (equation 7), and what is done with it.

    - "off": nothing; delta is still measured.
    - "paper": the Aggregator's reference is  preview + delta (lq - preview)  (algorithm 1, line 5).
      not in the paper: delta is clamped to 0..1, so that the reference lies between the two.
    - "release", as the published program: delta, clamped to 0..conditioning_scale, scales the residuals of the next
      step.

    At the start delta is 1 and the previous preview is zero (algorithm 1, line 2).

    Args:
        mode: see above.
        batch: number of samples.
        conditioning_scale: of the Aggregator's residuals.
    """

    def __init__(self, mode: Adaptive, batch: int, conditioning_scale: float = 1.0):
        if mode not in MODES:
            raise ValueError(f"the adaptive mode is {mode!r}; choose one of {', '.join(MODES)}.")
        self.mode, self.conditioning_scale = mode, conditioning_scale
        self.delta = torch.ones(batch)
        self.previous: Tensor | None = None

    def factor(self) -> Tensor:
        """delta as it acts on the coming step, (B,)."""
        return self.delta.clamp(0, self.conditioning_scale if self.mode == "release" else 1)

    def scale(self) -> Tensor:
        """What the residuals of each sample are multiplied by, (B,)."""
        if self.mode == "release":
            return self.factor()
        return torch.full_like(self.delta, self.conditioning_scale)

    def aggregating(self) -> Tensor:
        """Which samples the Aggregator works for, (B,) bool; the others get no residuals and keep their delta.

        Without adaptation a small scale is the user's wish, and only zero rests.
        """
        return self.scale() > (0 if self.mode == "off" else REST_BELOW)

    def reference(self, preview: Tensor, lq_latent: Tensor) -> Tensor:
        """The Aggregator's reference; both (G B, C, h, w), G times the B samples one after the other (guidance)."""
        if self.mode != "paper":
            return preview
        delta = self.factor().to(preview).repeat(len(preview) // len(self.delta))
        return torch.lerp(preview, lq_latent.to(preview), delta[:, None, None, None])

    def update(self, preview: Tensor, x0: Tensor, previewed: Tensor) -> Tensor:
        """Equation 7:  |p_t - x0_t|^2 / |p_t - p_{t+1}|^2,  sums over a sample.

        Args:
            preview: p_t of the conditional half, (B, C, h, w).
            x0: the scheduler's clean latent from the guided prediction, same shape.
            previewed: (B,) bool, samples that have a preview at this step; the others are left as they are.
        Returns: the ratios, (B,), NaN where there was no preview.
        """
        preview, x0 = preview.float(), x0.float()
        previous = torch.zeros_like(preview) if self.previous is None else self.previous
        change = _energy(preview - previous).clamp_min(torch.finfo(torch.float32).tiny)
        ratio = (_energy(preview - x0) / change).cpu()
        seen = previewed.to(preview.device)[:, None, None, None]
        self.previous = torch.where(seen, preview, previous)
        self.delta = torch.where(previewed, ratio, self.delta)
        return torch.where(previewed, ratio, torch.nan)


def _energy(difference: Tensor) -> Tensor:
    return difference.square().sum(dim=(1, 2, 3))
