"""The forward process of DDPM and what a network can predict of it: noise, velocity, clean latent.

x_t = alpha_t x_0 + sigma_t eps with alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t)      (Ho et al. 2020, equation 4)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v"]
PREDICTIONS = ("epsilon", "v")


class NoiseSchedule:
    """alpha_t and sigma_t of the discrete timesteps t = 0 .. T-1.

    Args:
        alphas_cumprod: abar_t, (T,), falling from nearly 1 to nearly 0; a scheduler of diffusers has it.
    """

    def __init__(self, alphas_cumprod: Tensor):
        self.alphas_cumprod = alphas_cumprod.double().cpu()

    @classmethod
    def scaled_linear(cls, start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> NoiseSchedule:
        """Stable Diffusion's: the square roots of the betas rise linearly."""
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        return cls((1 - betas).cumprod(dim=0))

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for timesteps (B,) or a scalar, as (B, 1, 1, 1) or a scalar, float32, on `like`'s device.

        Raises: ValueError for a timestep outside 0..T-1.
        """
        steps = t.detach().cpu().long()
        if steps.min() < 0 or steps.max() >= len(self):
            raise ValueError(f"timesteps run from {int(steps.min())} to {int(steps.max())}; the schedule has 0 to "
                             f"{len(self) - 1}.")
        kept = self.alphas_cumprod[steps]
        kept = kept.view(-1, *[1] * (like.ndim - 1)) if kept.ndim else kept
        return kept.sqrt().float().to(like.device), (1 - kept).sqrt().float().to(like.device)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma noise; all (B, C, h, w), t (B,)."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """What the network should say: the noise, or v = alpha noise - sigma x0 (Salimans & Ho 2022)."""
        alpha, sigma = self.at(t, x0)
        return noise if _known(prediction) == "epsilon" else alpha * noise - sigma * x0

    def x0_of(self, x_t: Tensor, output: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """The clean latent that a prediction stands for: (x_t - sigma eps) / alpha, or alpha x_t - sigma v."""
        alpha, sigma = self.at(t, x_t)
        return (x_t - sigma * output) / alpha if _known(prediction) == "epsilon" else alpha * x_t - sigma * output

    def epsilon_of(self, x_t: Tensor, output: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """The noise that a prediction stands for: itself, or sigma x_t + alpha v."""
        if _known(prediction) == "epsilon":
            return output
        alpha, sigma = self.at(t, x_t)
        return sigma * x_t + alpha * output


def _known(prediction: Any) -> Any:
    if prediction not in PREDICTIONS:
        raise ValueError(f"the prediction is {prediction!r}; choose one of {', '.join(PREDICTIONS)}.")
    return prediction
