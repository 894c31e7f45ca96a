"""What the networks of a run are told, both halves of the guidance in one batch: R rows, the negative ones first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.text import TextEmbedding
from ..common.tiling import Box
from .attention import Condition
from .model import InstantIR
from .resampler import DCPTokens

Image = DCPTokens | Tensor  # DCP tokens, or features of the vision encoder
Prompts = TextEmbedding | Sequence[tuple[TextEmbedding, float]]  # several: predictions averaged with these shares
Texts = list[tuple[TextEmbedding, Tensor]]  # of R rows each, with its share in the prediction of every row, (R,)
Told = list[tuple[Condition, Tensor]]  # the same as conditions of a network


def make_conditions(
    model: InstantIR,
    texts: Texts,
    image: DCPTokens,
    time_ids: Tensor,
    scale: float,
    previewer: bool = False,
) -> Told:
    """The conditions of the UNet or of the Previewer.

    Args:
        texts, image: of R rows.
        time_ids: (R or 1, 6).
        scale: w of equation 3.
    Raises: ValueError if the network has no Previewer to preview with.
    """
    tokens = image.previewer if previewer else image.tokens
    sizes = time_ids.expand(len(image.tokens), -1)
    return [
        (model.condition(text.prompt_embeds, text.pooled, sizes, tokens, previewer, scale), shares)
        for text, shares in texts
    ]


def window_time_ids(model: InstantIR, box: Box) -> Tensor:
    """Size conditioning of a window, (1, 6): its own size in pixels, as original and target, and no crop."""
    height, width = (side * model.config.downscale for side in (box.height, box.width))
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)


def join_prompts(low: Prompts | None, high: Prompts, batch: int) -> Texts:
    """The prompts of both halves, 2 B rows, pair by pair; without low ones, B rows.

    Where one half has fewer prompts, its last one goes on with no share.
    """
    halves = [_listed(prompts) for prompts in (low, high) if prompts is not None]
    count = max(map(len, halves))
    halves = [[*half, *[(half[-1][0], 0.0)] * (count - len(half))] for half in halves]
    texts = []
    for entries in zip(*halves, strict=True):
        text = _join_text(entries[0][0] if low is not None else None, entries[-1][0], batch)
        texts.append((text, torch.tensor([share for _, share in entries]).repeat_interleave(batch)))
    return texts


def _listed(prompts: Prompts) -> list[tuple[TextEmbedding, float]]:
    return [(prompts, 1.0)] if isinstance(prompts, TextEmbedding) else list(prompts)


def _join_text(low: TextEmbedding | None, high: TextEmbedding, batch: int) -> TextEmbedding:
    """Both prompts in one batch of 2 B rows; without a low one, B rows.

    Where one is longer, both are repeated to a common length, which attention over them does not notice: a softmax
    over the same keys n times is the same mean.
    """
    high = high.expand(batch)
    if low is None:
        return high
    low = low.expand(batch)
    length = math.lcm(low.prompt_embeds.shape[1], high.prompt_embeds.shape[1])
    tokens = [text.prompt_embeds.repeat(1, length // text.prompt_embeds.shape[1], 1) for text in (low, high)]
    pooled = torch.cat([low.pooled.to(high.pooled), high.pooled])
    return TextEmbedding(torch.cat([tokens[0].to(tokens[1]), tokens[1]]), pooled)


def join_images(model: InstantIR, low: Image | None, high: Image, batch: int) -> DCPTokens:
    """DCP tokens of both halves, 2 B rows; without a low one, B rows."""
    joined = _tokens(model, high).expand(batch)
    if low is None:
        return joined
    low = _tokens(model, low).expand(batch)
    pairs = zip((low.tokens, low.previewer), (joined.tokens, joined.previewer), strict=True)
    return DCPTokens(*(None if a is None or b is None else torch.cat([a.to(b), b]) for a, b in pairs))


def _tokens(model: InstantIR, image: Image) -> DCPTokens:
    return model.perceive(image) if isinstance(image, Tensor) else image
