"""Objectives of InstantIR's three trainings (sections 3.2 and 4.1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..common.schedulers import Level
from .config import Prediction

LossWeight = Literal["none", "x0"]
DISTILLED_STEPS = 50  # timesteps of the consistency distillation, 20 apart


def drop_conditions(
    batch: int, generator: torch.Generator, image: float = 0.05, text: float = 0.05, both: float = 0.05
) -> tuple[Tensor, Tensor]:
    """Which samples lose a condition; the three cases exclude each other (section 4.1: 15% in all).

    Args:
        image, text, both: probabilities that a sample loses its picture alone, its prompt alone, or both; their sum is
            at most 1.
        generator: of the CPU.
    Returns: (batch,) bool each: the picture is dropped, the prompt is dropped.
    Raises: ValueError if the probabilities are negative or sum to more than 1.
    """
    if min(image, text, both) < 0 or image + text + both > 1:
        raise ValueError(
            f"the shares to drop are {image}, {text}, {both}; none may be negative, their sum at most 1."
        )
    u = torch.rand(batch, generator=generator)
    dropped_both = (u >= image + text) & (u < image + text + both)
    return (u < image) | dropped_both, ((u >= image) & (u < image + text)) | dropped_both


def diffusion_loss(
    output: Tensor,
    x0: Tensor,
    noise: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    prediction: Prediction = "epsilon",
    weight: LossWeight = "none",
    l1: float = 0.0,
) -> Tensor:
    """Mean squared error of what the UNet puts out (equation 1): noise, v = alpha noise - sigma x0, or x0 ("sample").

    Args:
        output, x0, noise: (B, C, h, w). alpha, sigma: (B,), of x_t = alpha x0 + sigma noise.
        weight: "none" as the paper; not in the paper: "x0" weights by the error of the clean latent that the output
            stands for, |error of v|^2 sigma^2 or |error of epsilon|^2 (sigma / alpha)^2; that of a "sample" itself.
        l1: not in the paper: this much of the mean absolute error, weighted likewise, is added (crisper edges).
    Raises: ValueError if the shapes differ.
    """
    if not output.shape == x0.shape == noise.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (output, x0, noise))
        raise ValueError(f"the output, the clean latent and the noise are {shapes}; expected equal shapes.")
    alpha, sigma = _rows(alpha, x0), _rows(sigma, x0)
    target = {"epsilon": noise, "v": alpha * noise - sigma * x0, "sample": x0}[prediction]
    error = output.float() - target.float()
    if weight == "x0":
        error = error * {"epsilon": sigma / alpha, "v": sigma, "sample": 1}[prediction]
    loss = error.square().mean()
    return loss + l1 * error.abs().mean() if l1 else loss


def distilled_timesteps(
    batch: int, generator: torch.Generator, train_timesteps: int = 1000, steps: int = DISTILLED_STEPS
) -> tuple[Tensor, Tensor]:
    """Pairs of neighbouring timesteps (s, t), t = max(s - 20, 0): s is one of DDIM's 50 timesteps 19, 39, ..., 999.

    Returns: (batch,) int64 each.
    """
    stride = train_timesteps // steps
    s = (torch.randint(steps, (batch,), generator=generator) + 1) * stride - 1
    return s, (s - stride).clamp(min=0)


def guided_step(x_s: Tensor, x0: Tensor, x0_null: Tensor, w: Tensor, at_s: Level, at_t: Level) -> Tensor:
    """The teacher's DDIM step from s to t: x_t = alpha_t x0 + sigma_t epsilon, both guided as c + w (c - u).

    Args:
        x_s: (B, C, h, w).
        x0, x0_null: clean latents that the network sees in x_s under the condition c and under the null condition u.
        w: (B,) strength of the guidance; 0 = the conditional step.
        at_s, at_t: alpha and sigma, (B,) each.
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = ([_rows(level, x_s) for level in levels] for levels in (at_s, at_t))
    noise, noise_null = ((x_s - alpha_s * clean) / sigma_s for clean in (x0, x0_null))
    w = _rows(w, x_s)
    return alpha_t * (x0 + w * (x0 - x0_null)) + sigma_t * (noise + w * (noise - noise_null))


def pseudo_huber(prediction: Tensor, target: Tensor, c: float = 0.001) -> Tensor:
    """mean(sqrt((a - b)^2 + c^2) - c), for equation 5's distance between two previews (c as published)."""
    error = prediction.float() - target.float()
    return ((error.square() + c**2).sqrt() - c).mean()


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like)[:, None, None, None]
