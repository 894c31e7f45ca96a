"""The two token streams of FLUX's blocks, and running a block on them.

Shapes: B batch, M text tokens, N image tokens (h/2 * w/2), D width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..common.flux import pack, position_ids
from ..common.text import TextEmbedding
from .ra_lora import switch

# diffusers up to 0.34 joins the streams before a single block, later ones inside it
_SINGLE_TAKES_BOTH = "encoder_hidden_states" in inspect.signature(FluxSingleTransformerBlock.forward).parameters
_FLUX_TIME = 1000  # FLUX's embeddings are of 1000 t and 1000 guidance


@dataclass(frozen=True)
class Streams:
    """What a block reads and writes.

    Attributes:
        image: (B, N, D).
        text: (B, M, D).
        emb: modulation from timestep, guidance and pooled text, (B, D).
        rotary: cosines and sines of the positions, (M + N, head) each.
    """

    image: Tensor
    text: Tensor
    emb: Tensor
    rotary: tuple[Tensor, Tensor]

    def with_tokens(self, image: Tensor, text: Tensor) -> Streams:
        return replace(self, image=image, text=text)


def embed(
    network: nn.Module, pos_embed: nn.Module, latent: Tensor, text: TextEmbedding, t: Tensor, guidance: Tensor | None
) -> Streams:
    """A latent and a prompt as the tokens that blocks take.

    Args:
        network: what holds x_embedder, context_embedder and time_text_embed: FLUX, or the MM-ControlNet.
        pos_embed: FLUX's rotary position embedding. Positions are those of a picture of the latent's own size,
            wherever in a larger one it was cut out.
        latent: (B, C, h, w).
        text: B rows.
        t: (B,) in 0..1.
        guidance: (B,), None for a network that is told none.
    """
    dtype = network.x_embedder.weight.dtype
    times = [value.to(dtype) * _FLUX_TIME for value in (t, guidance) if value is not None]
    rotary = pos_embed(position_ids(text.prompt_embeds.shape[1], *latent.shape[-2:], device=latent.device))
    return Streams(
        image=network.x_embedder(pack(latent.to(dtype))),
        text=network.context_embedder(text.prompt_embeds.to(dtype)),
        emb=network.time_text_embed(*times, text.pooled.to(dtype)),
        rotary=rotary,
    )


def run_block(block: nn.Module, streams: Streams, lora: bool = False, checkpointing: bool = False) -> Streams:
    """The streams after a double or a single block of FLUX.

    Args:
        lora: with the block's part of the RA-LoRA, or without. It is switched right before the block runs, here and
            when gradient checkpointing runs it again in the backward pass.
        checkpointing: keep no activations for the backward pass.
    """

    def run(image: Tensor, text: Tensor, emb: Tensor, *rotary: Tensor) -> tuple[Tensor, Tensor]:
        switch(block, lora)
        conditions: dict[str, Any] = dict(temb=emb, image_rotary_emb=rotary)
        if isinstance(block, FluxSingleTransformerBlock) and not _SINGLE_TAKES_BOTH:
            tokens = block(hidden_states=torch.cat([text, image], dim=1), **conditions)
            return tokens[:, : text.shape[1]], tokens[:, text.shape[1] :]
        return block(hidden_states=image, encoder_hidden_states=text, **conditions)

    arguments = (streams.image, streams.text, streams.emb, *streams.rotary)
    if checkpointing and torch.is_grad_enabled():
        text, image = checkpoint(run, *arguments, use_reentrant=False)
    else:
        text, image = run(*arguments)
    return streams.with_tokens(image, text)
