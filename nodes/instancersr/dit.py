"""Parts of DiT (Peebles & Xie 2023) that InstanceRSR's backbone and its ControlNet branch share.

The blocks are diffusers' own; names are those of its `DiTTransformer2DModel`. Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from einops import rearrange
from torch import Tensor, nn

from ..common.attention import attend
from .config import InstanceRSRConfig


class PatchEmbedding(nn.Module):
    """Latent -> tokens with their positions."""

    def __init__(self, config: InstanceRSRConfig, channels: int):
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(channels, config.width, kernel_size=patch, stride=patch)
        self.base = config.sample_size // patch

    def forward(self, latent: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, N, D), row by row, in the weights' dtype even under autocast."""
        tokens = self.proj(latent)
        grid = (tokens.shape[-2], tokens.shape[-1])
        tokens = rearrange(tokens, "b d h w -> b (h w) d")
        return (tokens + _positions(tokens.shape[-1], grid, self.base, tokens.device)).to(self.proj.weight.dtype)


@lru_cache(maxsize=16)
def _positions(width: int, grid: tuple[int, int], base: int, device: torch.device) -> Tensor:
    """Sines and cosines of the tokens' places, (1, N, D) float32; both sides of the grid span 0..base."""
    with torch.inference_mode(False):
        table = get_2d_sincos_pos_embed(width, grid, base_size=base, device=torch.device("cpu"), output_type="pt")
        return table.float()[None].to(device)


def dit_block(config: InstanceRSRConfig) -> BasicTransformerBlock:
    """A block of DiT with adaLN-Zero: modulated by an embedding of timestep and class that is its own."""
    block = BasicTransformerBlock(
        config.width,
        config.num_attention_heads,
        config.attention_head_dim,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=config.num_embeds_ada_norm,
        attention_bias=True,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        norm_eps=config.norm_eps,
    )
    block.attn1.set_processor(_Attend())
    block.norm1.emb.class_embedder.dropout_prob = 0.0  # the class is "none" already
    return block


class _Attend:
    """diffusers' attention processor with our attention, which is faster in bfloat16 on a CPU."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        q, k, v = (
            rearrange(layer(hidden_states), "b n (h d) -> b h n d", h=attn.heads)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        return attn.to_out[0](rearrange(attend(q, k, v), "b h n d -> b n (h d)"))


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, N, patch * patch * C) with the channel fastest -> (B, C, h, w); the grid need not be square."""
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch)


def zero_adaptive_norms(blocks: nn.ModuleList) -> None:
    """Blocks begin as the identity (adaLN-Zero)."""
    for block in blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
