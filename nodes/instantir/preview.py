"""The Previewer by itself: what it makes of a latent at one noise level, in one evaluation (InstantIR figure 3 b)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.text import TextEmbedding
from ..common.tiling import Box
from .conditions import window_time_ids
from .model import InstantIR
from .resampler import DCPTokens


@torch.no_grad()
def preview_at(
    model: InstantIR,
    latent: Tensor,
    noise: Tensor,
    noise_level: float,
    image: DCPTokens,
    text: TextEmbedding,
    image_scale: float = 1.0,
) -> Tensor:
    """Noises a latent and previews it:  x_t = alpha_t z + sigma_t noise,  t = 999 noise_level.

    Args:
        latent: clean, scaled, (B, C, h, w).
        noise: standard normal, same shape.
        noise_level: 0 (hardly any noise) to 1 (hardly anything else).
        image: DCP tokens with the Previewer's, one row or B. text: what the Previewer reads, one row or B.
        image_scale: w of equation 3.
    Returns: the clean latent that the Previewer sees, (B, C, h, w), float32, on the device of `latent`.
    Raises: ValueError for a level out of range, other shapes, or a network without a Previewer.
    """
    if not 0 <= noise_level <= 1:
        raise ValueError(f"the noise level is {noise_level}; it must be in 0..1.")
    if noise.shape != latent.shape:
        raise ValueError(f"the noise is {tuple(noise.shape)}, the latent {tuple(latent.shape)}; expected equal.")
    z, batch = latent.float(), len(latent)
    t = torch.tensor(noise_level * (model.config.train_timesteps - 1))
    alpha, sigma = level = model.alpha_sigma(t)  # on the CPU: some devices have no float64
    sizes = window_time_ids(model, Box(0, 0, *z.shape[-2:])).expand(batch, -1)
    text, tokens = text.expand(batch), image.expand(batch).previewer
    condition = model.condition(text.prompt_embeds, text.pooled, sizes, tokens, previewer=True, scale=image_scale)
    return model.clean(alpha.to(z) * z + sigma.to(z) * noise.to(z), t, condition, level=level)
