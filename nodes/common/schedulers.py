"""Noise schedulers of the Stable Diffusion kind by name (diffusers'), and the noise level that each step is at."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from torch import Tensor

Level = tuple[Tensor, Tensor]  # alpha and sigma of  x_t = alpha x_0 + sigma noise,  alpha^2 + sigma^2 = 1

_DDIM: dict[str, Any] = dict(clip_sample=False, set_alpha_to_one=False)  # latents are not in -1..1
SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, _DDIM),
    "ddim trailing": (DDIMScheduler, dict(clip_sample=False, timestep_spacing="trailing")),  # noise to noiseless
    "ddpm": (DDPMScheduler, dict(clip_sample=False)),
    "euler": (EulerDiscreteScheduler, {}),
    "euler ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpm++ 2m": (DPMSolverMultistepScheduler, {}),
    "dpm++ 2m karras": (DPMSolverMultistepScheduler, dict(use_karras_sigmas=True)),
    "dpm++ 2m sde": (DPMSolverMultistepScheduler, dict(algorithm_type="sde-dpmsolver++")),
}


class NoiseSchedule:
    """The scaled-linear noise schedule of Stable Diffusion: beta_t = (linear from sqrt(first) to sqrt(last))^2.

    alpha_t^2 = prod (1 - beta),  sigma_t^2 = 1 - alpha_t^2.
    """

    def __init__(self, beta_start: float = 0.00085, beta_end: float = 0.012, train_timesteps: int = 1000):
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, train_timesteps, dtype=torch.float64, device="cpu")
        cumulative = torch.cumprod(1 - roots**2, dim=0)
        self.ratios = ((1 - cumulative) / cumulative).sqrt()  # sigma / alpha of every timestep

    def __len__(self) -> int:
        return len(self.ratios)

    def alpha_sigma(self, t: Tensor) -> Level:
        """alpha and sigma at timesteps t (any shape, 0..n-1), float32, shape and device of t.

        Between two timesteps sigma / alpha is interpolated linearly, as Euler's scheduler of diffusers does.
        """
        self.ratios = table = self.ratios.to(t.device)
        t = t.double().clamp(0, len(table) - 1)
        low = t.floor().long()
        ratio = torch.lerp(table[low], table[t.ceil().long()], t - low)
        alpha = 1 / (1 + ratio**2).sqrt()
        return alpha.float(), (ratio * alpha).float()


def make_scheduler(
    name: str, steps: int, beta_start: float = 0.00085, beta_end: float = 0.012, train_timesteps: int = 1000
) -> Any:
    """A scheduler for noise predictions on the scaled-linear schedule, set to `steps` steps.

    Steps are spaced as SDXL's own scheduler spaces them ("leading", offset 1), except for "ddim trailing", which starts
    at pure noise and ends on the clean latent itself: with few steps the last level of the others is visible grain.

    Args:
        name: of SCHEDULERS. steps: 1..train_timesteps.
        beta_start, beta_end: of the noise schedule.
    Raises: ValueError for an unknown name or a number of steps out of range.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"there is no scheduler {name!r}; choose one of {', '.join(SCHEDULERS)}.")
    if not 1 <= steps <= train_timesteps:
        raise ValueError(f"steps is {steps}; it must be in 1..{train_timesteps}.")
    kind, options = SCHEDULERS[name]
    shared = dict(
        num_train_timesteps=train_timesteps,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        prediction_type="epsilon",
    )
    scheduler = kind(**(shared | options))
    scheduler.set_timesteps(steps)
    return scheduler


def noise_levels(scheduler: Any) -> Level:
    """alpha and sigma of every step's x_t.

    The network sees x_t so scaled with every scheduler (`scale_model_input` does it for Euler's, which step in
    x_0 + sigma' noise).

    Args:
        scheduler: a diffusers scheduler after `set_timesteps`.
    Returns: two tensors (n,), float32.
    Raises: ValueError for a flow-matching scheduler, or one for other predictions than epsilon.
    """
    kind = scheduler.config.get("prediction_type")
    if kind != "epsilon" or getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(
            f"the scheduler {type(scheduler).__name__} expects {kind or 'velocities of a flow'}; a scheduler for noise "
            "predictions (prediction_type 'epsilon') is needed, for example DDIM."
        )
    timesteps, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        ratio = torch.as_tensor(sigmas)[: len(timesteps)].double().cpu()
        alpha = 1 / (1 + ratio**2).sqrt()
        return alpha.float(), (ratio * alpha).float()
    cumulative = scheduler.alphas_cumprod.double()[timesteps.long().cpu()]
    return cumulative.sqrt().float(), (1 - cumulative).sqrt().float()
