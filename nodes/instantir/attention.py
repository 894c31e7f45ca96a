"""Cross-attention over the text and, beside it, over the DCP tokens modulated by time (InstantIR equations 3 and 4).

What these layers need besides the picture is in a `Condition`, made once for a picture; a `Pass` is one evaluation of
the UNet under it. Both travel through diffusers' `cross_attention_kwargs`, so that the layers keep no state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.attention import attend

_NORM_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Condition:
    """What a UNet is told of P pictures, the same at every step.

    What the layers compute from it alone (keys and values, text and size embeddings) is kept in `kept`, if there is
    one: a condition lives for one picture, and its results live and die with it.

    Attributes:
        prompt_embeds: text tokens, (P, L, C).
        pooled: pooled text, (P, C').
        time_ids: sizes in pixels, (P, 6): original height and width, crop top and left, target height and width.
        tokens: DCP tokens, (P, Q, C''), or None: text alone.
        previewer: whether the Previewer's LoRA is on.
        scale: w of equation 3.
        kept: results by name; None = nothing is kept (training).
    """

    prompt_embeds: Tensor
    pooled: Tensor
    time_ids: Tensor
    tokens: Tensor | None
    previewer: bool = False
    scale: float = 1.0
    kept: dict[object, tuple[Tensor, ...]] | None = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pooled)

    def once(self, name: object, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """`compute()`, or what it gave before under this name."""
        if self.kept is None:
            return compute()
        if name not in self.kept:
            self.kept[name] = compute()
        return self.kept[name]


@dataclass(eq=False)
class Pass:
    """One evaluation of N rows: row i is under the condition's picture rows[i].

    Attributes:
        rows: (N,) indices into the condition; None = N equals P and row i is picture i.
        temb: (N, T) time embedding with text and size, before the last activation; the UNet puts it here.
    """

    condition: Condition
    rows: Tensor | None = None
    temb: Tensor | None = None

    def spread(self, kept: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(P, ...) results to (N, ...), one for each row."""
        return kept if self.rows is None else tuple(tensor[self.rows] for tensor in kept)


class AdaLayerNorm(nn.Module):
    """Equation 4: Phi(x, t) = LayerNorm(x) * (1 + scale(t)) + shift(t)."""

    def __init__(self, dim: int, time_dim: int):
        super().__init__()
        self.linear = nn.Linear(time_dim, 2 * dim)

    def forward(self, normed: Tensor, temb: Tensor) -> Tensor:
        """(N, Q, D) tokens that were normed without affine, (N, T) time embedding -> (N, Q, D)."""
        shift, scale = self.linear(F.silu(temb))[:, None].chunk(2, dim=-1)
        return normed * (1 + scale) + shift


class TimeAwareCrossAttention(nn.Module):
    """Equation 3: attention over the text plus w times attention over the DCP tokens, before the output projection.

    A diffusers attention processor. Keys: `ip_adapter.<index>` of the published adapter.

    Args:
        dim: width of the layer.
        token_dim: width of the DCP tokens.
        time_dim: width of the time embedding.
    """

    def __init__(self, dim: int, token_dim: int, time_dim: int):
        super().__init__()
        self.to_k_ip = nn.Linear(token_dim, dim, bias=False)
        self.to_v_ip = nn.Linear(token_dim, dim, bias=False)
        self.ln_k_ip = AdaLayerNorm(dim, time_dim)
        self.ln_v_ip = AdaLayerNorm(dim, time_dim)

    def __call__(  # not forward: diffusers reads the names of the arguments here
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        step: Pass | None = None,
    ) -> Tensor:
        """(N, HW, dim) -> (N, HW, dim). `encoder_hidden_states` is the condition's text, `step` must be given."""
        condition = step.condition
        q = _heads(attn.to_q(hidden_states), attn)
        out = attend(q, *(_heads(x, attn) for x in step.spread(_text(attn, condition))))
        if condition.tokens is not None and condition.scale != 0:
            k, v = step.spread(condition.once((self, "tokens"), lambda: self._tokens(condition)))
            k, v = self.ln_k_ip(k, step.temb), self.ln_v_ip(v, step.temb)
            out = out + condition.scale * attend(q, _heads(k, attn), _heads(v, attn))
        return _out(attn, out)

    def _tokens(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """Keys and values of the DCP tokens up to where time comes in, (P, Q, dim) each."""
        projected = self.to_k_ip(condition.tokens), self.to_v_ip(condition.tokens)
        k, v = (F.layer_norm(x, x.shape[-1:], eps=_NORM_EPS) for x in projected)
        return k, v


class TextCrossAttention:
    """The cross-attention of a base without DCP; what does not change with time is kept as above."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        step: Pass | None = None,
    ) -> Tensor:
        q = _heads(attn.to_q(hidden_states), attn)
        return _out(attn, attend(q, *(_heads(x, attn) for x in step.spread(_text(attn, step.condition)))))


class SelfAttention:
    """Self-attention by the fastest way on the device (`attend`); it is told of the step and has no use for it."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        step: Pass | None = None,
    ) -> Tensor:
        q, k, v = (_heads(layer(hidden_states), attn) for layer in (attn.to_q, attn.to_k, attn.to_v))
        return _out(attn, attend(q, k, v))


def _text(attn: Attention, condition: Condition) -> tuple[Tensor, ...]:
    text = condition.prompt_embeds
    return condition.once((attn, "text"), lambda: (attn.to_k(text), attn.to_v(text)))


def _heads(tokens: Tensor, attn: Attention) -> Tensor:
    return rearrange(tokens, "b n (h d) -> b h n d", h=attn.heads)


def _out(attn: Attention, attended: Tensor) -> Tensor:
    out = attn.to_out[0](rearrange(attended, "b h n d -> b n (h d)"))
    return attn.to_out[1](out) / attn.rescale_output_factor
