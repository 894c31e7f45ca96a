"""Objectives of the DiT4SR training."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LossWeight = Literal["none", "sigma2"]


def logit_normal_sigma(
    batch: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0, shift: float = 3.0
) -> Tensor:
    """Noise levels of the training: u is logit-normal and goes through the schedule's shift.

    sigma = shift * u / (1 + (shift - 1) * u), the paper's implementation details with shift 3: 3u / (1 + 2u).

    Args:
        batch: number of levels.
        generator: of the CPU.
        mean, std: of the normal before the logistic function.
    Returns: (batch,) float32 in 0..1.
    """
    u = torch.sigmoid(mean + std * torch.randn(batch, generator=generator))
    return shift * u / (1 + (shift - 1) * u)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - sigma) x0 + sigma noise: the straight path of rectified flow (section 3.1).

    Args:
        x0: clean latent, (B, C, h, w), scaled.
        noise: standard normal, same shape.
        sigma: (B,), 0 = clean, 1 = noise.
    """
    sigma = sigma.to(x0)[:, None, None, None]
    return (1 - sigma) * x0 + sigma * noise


def flow_matching_loss(
    velocity: Tensor,
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    weight: LossWeight = "sigma2",
    l1: float = 0.0,
) -> Tensor:
    """Mean over the batch of w(sigma) |v - (noise - x0)|^2 (section 3.1).

    With "sigma2", w = sigma^2: the error of the clean latent x0 = x_t - sigma v, which is what the published script
    weights by; with "none", w = 1.

    Args:
        velocity: the network's prediction, (B, C, h, w).
        l1: not in the paper: this much of the mean absolute error with weight sqrt(w) is added (edges of the tiny
            networks are crisper with it).
    Raises: ValueError if the shapes differ.
    """
    target = noise - x0
    if velocity.shape != target.shape:
        raise ValueError(f"the prediction is {tuple(velocity.shape)}, the target {tuple(target.shape)}.")
    error = velocity.float() - target.float()
    if weight == "sigma2":
        error = error * sigma.to(error)[:, None, None, None]
    loss = error.square().mean()
    return loss + l1 * error.abs().mean() if l1 else loss
