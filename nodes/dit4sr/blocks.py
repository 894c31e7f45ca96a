"""One block of the network: attention, MLPs and the LR injection between them (DiT4SR sections 3.2 and 3.3).

Shapes: B batch, N image tokens of one stream, M text tokens, D width; [X, L] are the noise and LR streams, (B, 2N, D).
"""

from __future__ import annotations

import torch
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX
from einops import rearrange
from torch import Tensor, nn

from .attention import ControlAttention
from .config import DiT4SRConfig


class ControlFeedForward(nn.Module):
    """MLP of [X, L] with the LR injection between its two linears (section 3.3).

    h_X <- h_X + scale * conv(h_L), where h = GELU(W_1 x) and conv is a 3x3 depth-wise convolution on the token grid.
    """

    def __init__(self, config: DiT4SRConfig):
        super().__init__()
        dim, hidden = config.inner_dim, 4 * config.inner_dim
        self.net = nn.ModuleList([_GELUProjection(dim, hidden), nn.Identity(), nn.Linear(hidden, dim)])
        self.injection = config.ablations.lr_injection
        self.layer = config.ablations.injection_layer
        if self.layer == "conv":
            self.control_conv = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        else:
            self.control_linear = nn.Linear(hidden, hidden)

    @property
    def control(self) -> nn.Module:
        return self.control_conv if self.layer == "conv" else self.control_linear

    def init_control(self) -> None:
        nn.init.zeros_(self.control.weight)
        nn.init.zeros_(self.control.bias)

    def forward(self, streams: Tensor, grid: tuple[int, int], scale: float) -> Tensor:
        hidden = self.net[0](streams)
        if self.injection:
            x, lr = hidden.chunk(2, dim=1)
            hidden = torch.cat([x + scale * self._inject(lr, grid), lr], dim=1)
        return self.net[2](hidden)

    def _inject(self, lr: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.layer == "linear":
            return self.control_linear(lr)
        picture = rearrange(lr, "b (h w) d -> b d h w", h=grid[0], w=grid[1])
        return rearrange(self.control_conv(picture), "b d h w -> b (h w) d")


class FeedForward(nn.Module):
    """MLP of the text stream."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList([_GELUProjection(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net[2](self.net[0](tokens))


class _GELUProjection(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.gelu(self.proj(tokens), approximate="tanh")


class MMDiTControlBlock(nn.Module):
    """One block over the streams [X, L] and the text; X and L share modulation, norms and MLP weights."""

    def __init__(self, config: DiT4SRConfig, dual_attention: bool, last: bool):
        super().__init__()
        dim = config.inner_dim
        self.last = last
        self.norm1 = SD35AdaLayerNormZeroX(dim) if dual_attention else AdaLayerNormZero(dim)
        self.norm1_context = (
            AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6) if last else AdaLayerNormZero(dim)
        )
        self.attn = ControlAttention(config, "keys_only" if last else "stream")
        self.attn2 = ControlAttention(config, "unused") if dual_attention else None
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = ControlFeedForward(config)
        if not last:
            self.norm2_context = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.ff_context = FeedForward(dim)

    def init_control(self) -> None:
        for part in (self.attn, self.attn2, self.ff):
            if part is not None:
                part.init_control()

    def forward(
        self, streams: Tensor, text: Tensor, emb: Tensor, grid: tuple[int, int], injection_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Updates [X, L] (B, 2N, D) and the text (B, M, D); `emb` is the time and text modulation, (B, D)."""
        normed, gate, shift_mlp, scale_mlp, gate_mlp, *dual = self.norm1(streams, emb=emb)
        if self.last:
            normed_text = self.norm1_context(text, emb)
        else:
            normed_text, gate_text, *modulation_text = self.norm1_context(text, emb=emb)

        update, update_text = self.attn(normed, normed_text)
        streams = streams + gate[:, None] * update
        if self.attn2 is not None:
            normed, gate = dual
            streams = streams + gate[:, None] * self.attn2(normed)[0]
        hidden = _modulate(self.norm2(streams), shift_mlp, scale_mlp)
        streams = streams + gate_mlp[:, None] * self.ff(hidden, grid, injection_scale)

        if not self.last:
            shift_mlp, scale_mlp, gate_mlp = modulation_text
            text = text + gate_text[:, None] * update_text
            hidden = _modulate(self.norm2_context(text), shift_mlp, scale_mlp)
            text = text + gate_mlp[:, None] * self.ff_context(hidden)
        return streams, text


def _modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return tokens * (1 + scale[:, None]) + shift[:, None]
