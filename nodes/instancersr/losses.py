"""Objectives of the InstanceRSR training: equations 4 to 6 and their total."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .diffusion import levels

LossWeight = Literal["none", "x0"]
ALIGNMENT_WEIGHT = 0.5  # section 3.1
SCALE_WEIGHT = 0.1


def denoising_loss(
    eps: Tensor,
    noise: Tensor,
    timestep: Tensor,
    weight: LossWeight = "none",
    l1: float = 0.0,
    map_weight: float = 1.0,
) -> Tensor:
    """Equation 4: the mean of |eps - eps_theta(z_t, t, c)|^2 over both halves of the joint latent.

    Args:
        eps: the network's prediction, (B, 2C, h, w), or (B, C, h, w) without mask modelling.
        noise: what was added, same shape.
        timestep: (B,) in 0..999.
        weight: "none" as in the paper; "x0" multiplies the error by sigma_t / alpha_t, which makes it that of the clean
            latent. not in the paper: networks that emit x0 (the tiny one) would be trained on the last, almost
            noiseless timesteps alone otherwise.
        l1: not in the paper: this much of the mean absolute error is added (edges of the tiny networks are crisper).
        map_weight: not in the paper: of the map's half (paper 1).
    Raises: ValueError if the shapes differ.
    """
    if eps.shape != noise.shape:
        raise ValueError(f"the prediction is {tuple(eps.shape)}, the noise {tuple(noise.shape)}; expected equal.")
    error = eps.float() - noise.float()
    if weight == "x0":
        alpha, sigma = levels(timestep.to(error.device))
        error = error * (sigma / alpha)
    if map_weight != 1:
        picture, instances = error.chunk(2, dim=1)
        return (_size(picture, l1) + map_weight * _size(instances, l1)) / 2
    return _size(error, l1)


def _size(error: Tensor, l1: float) -> Tensor:
    return error.square().mean() + (l1 * error.abs().mean() if l1 else 0)


def alignment_loss(aligned: Tensor, target: Tensor) -> Tensor:
    """Equation 5: L_REPA = -(1/N) sum_i cos(h_phi(f_i), d_i), averaged over the batch; -1 for equal directions.

    Args:
        aligned: features after the learnable head, (B, N, E).
        target: DINOv2's patch features of the clean picture, on the same grid: (B, N, E) or (B, h, w, E) with
            h * w = N (`VisionEncoder.patches(hr, size=(h, w))`).
    Raises: ValueError if grids or widths differ.
    """
    target = target.flatten(1, -2)
    if aligned.shape != target.shape:
        raise ValueError(
            f"the features are {tuple(aligned.shape)}, DINOv2's {tuple(target.shape)}; expected equal: ask for its "
            "patches on the network's token grid, and set align_dim to its width."
        )
    return -cosine_similarity(aligned.float(), target.float(), dim=-1).mean()


def instance_targets(seeds: Sequence[int], instances: int, width: int) -> Tensor:
    """The random norms s_k that the features of the instances are drawn to.

    not in the paper: their range, uniform in 0.5..1.5 times the square root of the width; and that a picture keeps
    its targets whenever it is seen (its seed says them), for new ones at every step would teach all patches one norm.

    Args:
        seeds: one a picture.
        instances: the largest label that there may be; more labels do not change the targets of the first ones.
        width: D, channels of a feature.
    Returns: (B, 1 + instances) float32; column 0 is for patches that no instance covers.
    """
    rows = [torch.rand(instances + 1, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return (0.5 + torch.stack(rows)) * width**0.5


def instance_scale_loss(features: Tensor, assignment: Tensor, targets: Tensor) -> Tensor:
    """Equation 6: L_IS = mean over all patches i, of the instances k, of (|f_i| - s_k)^2.

    Args:
        features: before the alignment head, (B, N, D).
        assignment: label of the instance that each patch belongs to, (B, N), 0 = none (`patch_instances`).
        targets: s_k by label, (B, K) with K above the largest label (`instance_targets`).
    Raises: ValueError if the shapes do not fit.
    """
    fits = assignment.shape == features.shape[:2] and len(targets) == len(assignment)
    if not fits or int(assignment.max()) >= targets.shape[1]:
        raise ValueError(
            f"features {tuple(features.shape)}, assignment {tuple(assignment.shape)} with labels up to "
            f"{int(assignment.max())}, targets {tuple(targets.shape)}; expected (B, N, D), (B, N) and a target for "
            "every label."
        )
    wanted = targets.to(features.device, torch.float32).gather(1, assignment.to(features.device).long())
    return (features.float().norm(dim=-1) - wanted).square().mean()


def total_loss(
    denoising: Tensor,
    alignment: Tensor | None = None,
    instance_scale: Tensor | None = None,
    alignment_weight: float = ALIGNMENT_WEIGHT,
    scale_weight: float = SCALE_WEIGHT,
) -> Tensor:
    """L_denoise + 0.5 L_REPA + 0.1 L_IS; without representation learning (table 2, case 1) the first alone."""
    total = denoising
    if alignment is not None:
        total = total + alignment_weight * alignment
    if instance_scale is not None:
        total = total + scale_weight * instance_scale
    return total
