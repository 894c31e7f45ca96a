"""The DCP resampler: learned queries that read the vision encoder's tokens (InstantIR section 3.2; Perceiver)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from ..common.attention import attend
from .config import ResamplerConfig


class PerceiverAttention(nn.Module):
    """The queries attend to [features, queries]; no projection has a bias."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        inner = heads * dim_head
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """(B, N, D) features and (B, Q, D) queries -> the queries' update, (B, Q, D)."""
        features, latents = self.norm1(features), self.norm2(latents)
        k, v = self.to_kv(torch.cat([features, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=self.heads) for x in (self.to_q(latents), k, v))
        return self.to_out(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))


class Resampler(nn.Module):
    """Turns (B, N, embedding_dim) tokens of any number into (B, num_queries, output_dim). Keys: `image_proj`."""

    def __init__(self, config: ResamplerConfig):
        super().__init__()
        self.config = config
        dim, hidden = config.dim, config.dim * config.ff_mult
        self.latents = nn.Parameter(torch.randn(1, config.num_queries, dim) / dim**0.5)
        self.proj_in = nn.Linear(config.embedding_dim, dim)
        self.proj_out = nn.Linear(dim, config.output_dim)
        self.norm_out = nn.LayerNorm(config.output_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim, config.heads, config.dim_head),
                    nn.Sequential(
                        nn.LayerNorm(dim),
                        nn.Linear(dim, hidden, bias=False),
                        nn.GELU(),
                        nn.Linear(hidden, dim, bias=False),
                    ),
                ]
            )
            for _ in range(config.depth)
        )

    def forward(self, features: Tensor) -> Tensor:
        """c_lq: (B, 1+N, embedding_dim) features of the LQ picture -> (B, num_queries, output_dim) tokens."""
        features = self.proj_in(features)
        latents = self.latents.expand(len(features), -1, -1)
        for attention, feed_forward in self.layers:
            latents = latents + attention(features, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))


@dataclass(frozen=True)
class DCPTokens:
    """The DCP's tokens of B pictures, (B, Q, D): for the UNet, and for the Previewer if there is one."""

    tokens: Tensor
    previewer: Tensor | None = None

    def expand(self, batch: int) -> DCPTokens:
        """One row for each of `batch` pictures. Raises: ValueError if there is neither one row nor as many."""
        if len(self.tokens) not in (1, batch):
            raise ValueError(f"image tokens of {len(self.tokens)} pictures do not fit {batch}; give 1 or as many.")
        both = (None if x is None else x.expand(batch, -1, -1) for x in (self.tokens, self.previewer))
        return DCPTokens(*both)
