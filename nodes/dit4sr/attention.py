"""LR integration in attention: one joint attention over the noise, LR and text streams (DiT4SR section 3.2).

Shapes: B batch, N image tokens of one stream, M text tokens, D width, H heads.
The noise stream X and the LR stream L travel as one tensor [X, L] of (B, 2N, D), because they share every pretrained
weight; what is added for L (the `*_control` layers) sits on top of the shared projections.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ..common.attention import attend
from .config import DiT4SRConfig

TextRole = Literal["stream", "keys_only", "unused"]


class ControlAttention(nn.Module):
    """Attention of an MM-DiT-Control block (equations 1 and 2).

    Args:
        text: "stream": text tokens are attended to and updated; "keys_only": attended to, their own output is dropped
            (the last block); "unused": the second attention of SD3.5, over [X, L] alone. The published files carry
            the text layers of that one too; they are kept so that the files load and save unchanged.
    """

    def __init__(self, config: DiT4SRConfig, text: TextRole):
        super().__init__()
        dim, head_dim = config.inner_dim, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.text = text
        self.shared_keys = config.variant == "v1"
        self.residual = config.ablations.lr_residual
        self.joint = config.ablations.lr_integration

        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Identity()])
        self.to_q_control, self.to_k_control, self.to_v_control = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out_control = nn.Linear(dim, dim)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        if text != "keys_only":
            self.to_add_out = nn.Linear(dim, dim)
        norm = nn.RMSNorm if config.qk_norm else _no_norm
        self.norm_q, self.norm_k = norm(head_dim, eps=1e-6), norm(head_dim, eps=1e-6)
        self.norm_added_q, self.norm_added_k = norm(head_dim, eps=1e-6), norm(head_dim, eps=1e-6)

    def init_control(self) -> None:
        """Starts a new training: zero projections (section 3.2), output layer copied from the loaded base."""
        for layer in (self.to_q_control, self.to_k_control, self.to_v_control):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.to_out_control.load_state_dict(self.to_out[0].state_dict())

    def forward(self, streams: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Attends over [X, L, text].

        Args:
            streams: normalised [X, L], (B, 2N, D).
            text: normalised text tokens, (B, M, D); None where the text is unused.
        Returns: the updates of [X, L] (B, 2N, D) and of the text (B, M, D) or None.
        """
        n = streams.shape[1] // 2
        q, k, v = self.to_q(streams), self.to_k(streams), self.to_v(streams)
        (q_x, q_l), (k_x, k_l), (v_x, v_l) = (t.split(n, dim=1) for t in (q, k, v))
        q_x, k_x, v_x = self._heads(q_x), self._heads(k_x), self._heads(v_x)
        q_l, v_l = self._heads(self.to_q_control(q_l)), self._heads(self.to_v_control(v_l))
        q_x, k_x, q_l = self.norm_q(q_x), self.norm_k(k_x), self.norm_q(q_l)
        # the slip of v1: the noise stream's keys, normed twice, stand in for those of the LR
        k_l = self.norm_k(k_x if self.shared_keys else self._heads(self.to_k_control(k_l)))

        qkv_text = self._text_heads(text)
        if self.joint:
            out = _attend([(q_x, k_x, v_x), (q_l, k_l, v_l), *qkv_text])
            x, lr, *rest = out.split([n, n] + [t[0].shape[2] for t in qkv_text], dim=1)
        else:
            out = _attend([(q_x, k_x, v_x), *qkv_text])
            x, *rest = out.split([n] + [t[0].shape[2] for t in qkv_text], dim=1)
            lr = _attend([(q_l, k_l, v_l)])

        if self.residual:  # the LR residual of section 3.2
            lr = lr + streams[:, n:]
        updates = torch.cat([self.to_out[0](x), self.to_out_control(lr)], dim=1)
        return updates, self.to_add_out(rest[0]) if self.text == "stream" else None

    def _heads(self, tokens: Tensor) -> Tensor:
        return rearrange(tokens, "b n (h d) -> b h n d", h=self.heads)

    def _text_heads(self, text: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        if self.text == "unused":
            return []
        q = self.norm_added_q(self._heads(self.add_q_proj(text)))
        k = self.norm_added_k(self._heads(self.add_k_proj(text)))
        return [(q, k, self._heads(self.add_v_proj(text)))]


def _attend(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V over the concatenated streams; (B, H, n, d) each -> (B, sum n, H d)."""
    q, k, v = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
    return rearrange(attend(q, k, v), "b h n d -> b n (h d)")


def _no_norm(*_, **__) -> nn.Identity:
    return nn.Identity()
