"""Objectives of the DreamSR training (section 3.3), one small function an equation. z_0 is clean, z_1 noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import relu

from ..common.text import TextEmbedding

LossWeight = Literal["none", "t2"]
Perceptual = Callable[[Tensor, Tensor], Tensor]  # restored, clean (B, 3, H, W) in 0..1 -> mean distance
PIXEL_LOSS_UNTIL = 0.2  # t up to which the pixel loss is added (section 3.3)


def logit_normal_times(
    batch: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0, highest: float = 1.0
) -> Tensor:
    """Times of the multi-step training: t = highest * sigmoid(mean + std n), n standard normal.

    not in the paper: the distribution. The logit-normal is that of rectified flows; highest 0.8 trains only the times
    that the texture generation runs through.

    Args:
        generator: of the CPU.
    Returns: (batch,) float32 in 0..highest.
    """
    return highest * torch.sigmoid(mean + std * torch.randn(batch, generator=generator))


def add_noise(z_0: Tensor, z_1: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) z_0 + t z_1 (equation 3).

    Args:
        z_0: clean latent, (B, C, h, w), scaled.
        z_1: standard normal, same shape.
        t: (B,), 0 = clean, 1 = noise.
    """
    t = _column(t, z_0)
    return (1 - t) * z_0 + t * z_1


def velocity_target(z_0: Tensor, z_1: Tensor) -> Tensor:
    """v_gt = z_1 - z_0 (equation 4)."""
    return z_1 - z_0


def velocity_loss(
    velocity: Tensor, z_0: Tensor, z_1: Tensor, t: Tensor, weight: LossWeight = "none", l1: float = 0.0
) -> Tensor:
    """|v - v_gt|^2 (equation 5), mean over the batch.

    Args:
        velocity: the network's prediction, (B, C, h, w).
        t: (B,), for the weight.
        weight: "none", the paper's; "t2" multiplies by t^2, which makes it the error of the clean latent z_t - t v
            (not in the paper: for networks with an anchor, whose velocity grows without bound as t falls).
        l1: not in the paper: this much of the mean absolute error, weighted by t where the square is by t^2, is added.
    Raises: ValueError if the shapes differ.
    """
    target = velocity_target(z_0, z_1)
    if velocity.shape != target.shape:
        raise ValueError(f"the prediction is {tuple(velocity.shape)}, the target {tuple(target.shape)}.")
    error = velocity.float() - target.float()
    if weight == "t2":
        error = error * _column(t, error)
    loss = error.square().mean()
    return loss + l1 * error.abs().mean() if l1 else loss


def clean_latent(z_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """z_0 = z_t - t v: where the prediction's straight path ends (before equation 6)."""
    return z_t - _column(t, z_t) * velocity.to(z_t)


def needs_pixel_loss(t: Tensor, until: float = PIXEL_LOSS_UNTIL) -> Tensor:
    """Which rows of a batch get the pixel loss: t in 0..until; (B,) bool."""
    return t <= until


def pixel_loss(restored: Tensor, clean: Tensor, perceptual: Perceptual | None, weight: float = 2.0) -> Tensor:
    """|D(z_0) - I_gt|^2 + weight * LPIPS(D(z_0), I_gt) (equation 6; lambda = 2).

    Args:
        restored, clean: pictures (B, 3, H, W) in 0..1; B may be 0, the loss then is 0 and has a gradient.
        perceptual: see `common.perceptual.load_perceptual`; None = without its term.
    """
    _same(restored, clean)
    if len(restored) == 0:
        return restored.sum()
    loss = (restored.float() - clean.float()).square().mean()
    return loss if perceptual is None else loss + weight * perceptual(restored, clean)


def removal_loss(
    z_dr: Tensor,
    z_0: Tensor,
    restored: Tensor,
    clean: Tensor,
    perceptual: Perceptual | None,
    realism: Tensor | None = None,
    perceptual_weight: float = 2.0,
    gan_weight: float = 0.5,
) -> Tensor:
    """|z_dr - z_0|^2 + |D(z_dr) - I_gt|^2 + l_1 LPIPS + l_2 GAN (equation 7; l_1 = 2, l_2 = 0.5).

    Args:
        z_dr, z_0: latents of the one-step result and of the clean picture, (B, C, h, w), scaled.
        restored, clean: D(z_dr) and the clean picture, (B, 3, H, W) in 0..1.
        perceptual: None = without its term.
        realism: the discriminator's scores of `restored`; None = without the GAN term.
    """
    _same(z_dr, z_0)
    loss = (z_dr.float() - z_0.float()).square().mean()
    loss = loss + pixel_loss(restored, clean, perceptual, perceptual_weight)
    return loss if realism is None else loss + gan_weight * generator_loss(realism)


def generator_loss(scores: Tensor) -> Tensor:
    """-mean D(fake): the generator's part of the hinge loss (not in the paper: which GAN loss)."""
    return -scores.float().mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake)): the discriminator's part of the hinge loss.

    Args:
        real, fake: scores of any shape; `fake` of pictures that are detached from the generator.
    """
    return relu(1 - real.float()).mean() + relu(1 + fake.float()).mean()


def local_or_global(local: TextEmbedding, whole: TextEmbedding, takes_whole: Tensor) -> TextEmbedding:
    """Local prompts, replaced by the global ones in the rows that `takes_whole` (B,) names (pictures that are seen as a
    whole: section 4.1, probability 0.2)."""
    chosen = takes_whole.to(local.pooled.device)
    return TextEmbedding(
        torch.where(chosen[:, None, None], whole.prompt_embeds, local.prompt_embeds),
        torch.where(chosen[:, None], whole.pooled, local.pooled),
    )


def _column(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like)[:, None, None, None]


def _same(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"the result is {tuple(a.shape)}, the target {tuple(b.shape)}; expected equal.")
