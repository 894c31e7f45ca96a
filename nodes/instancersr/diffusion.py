"""Noise of DiT's diffusion: linear betas from 1e-4 to 0.02 over 1000 steps (InstanceRSR equations 2 and 3).

z_t = alpha_t z_0 + sigma_t eps, with alpha_t^2 = prod_{s <= t} (1 - beta_s) and sigma_t^2 = 1 - alpha_t^2.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .config import Spacing

TIMESTEPS = 1000
BETAS = (1e-4, 0.02)


def ddim(spacing: Spacing = "leading") -> DDIMScheduler:
    """The scheduler of sampling: deterministic DDIM on epsilon, nothing clipped (latents are not confined to -1..1)."""
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_start=BETAS[0],
        beta_end=BETAS[1],
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing=spacing,
    )


def levels(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t of timesteps (B,) in 0..999, whole numbers: (B, 1, 1, 1) float32 each, on their device.

    Raises: ValueError for timesteps out of range.
    """
    index = timestep.reshape(-1).long()
    if index.device.type != "meta" and not bool(((index >= 0) & (index < TIMESTEPS)).all()):
        raise ValueError(f"the timesteps are {index.tolist()}; expected whole numbers in 0..{TIMESTEPS - 1}.")
    alpha, sigma = (values.to(index.device)[index, None, None, None] for values in _tables())
    return alpha, sigma


@lru_cache(maxsize=1)
def _tables() -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        kept = torch.cumprod(1 - torch.linspace(*BETAS, TIMESTEPS, dtype=torch.float64, device="cpu"), dim=0)
        return kept.sqrt().float(), (1 - kept).sqrt().float()


def add_noise(z0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Equation 2: z_t = alpha_t z_0 + sigma_t eps.

    Args:
        z0: clean joint latent [z_x, z_m], (B, 2C, h, w), scaled.
        noise: standard normal, same shape.
        timestep: (B,) in 0..999.
    """
    alpha, sigma = levels(timestep.to(z0.device))
    return alpha * z0 + sigma * noise


def clean_latent(z_t: Tensor, eps: Tensor, timestep: Tensor) -> Tensor:
    """The clean latent that a prediction of the noise stands for: z_0 = (z_t - sigma_t eps) / alpha_t."""
    alpha, sigma = levels(timestep.to(z_t.device))
    return (z_t - sigma * eps) / alpha


def to_epsilon(output: Tensor, z_t: Tensor, timestep: Tensor, prediction: str) -> Tensor:
    """What a network emits, as noise: "epsilon", "v" (v = alpha eps - sigma z_0) or "x0"."""
    if prediction == "epsilon":
        return output
    alpha, sigma = levels(timestep.to(z_t.device))
    return alpha * output + sigma * z_t if prediction == "v" else (z_t - alpha * output) / sigma
