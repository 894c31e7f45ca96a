"""What the networks of a run are told, both halves of the guidance in one batch: R rows, the negative ones first."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.text import TextEmbedding
from ..common.tiling import Box
from .attention import Condition
from .model import InstantIR
from .resampler import DCPTokens

Image = DCPTokens | Tensor  # DCP tokens, or features of the vision encoder


def make_conditions(
    model: InstantIR,
    text: TextEmbedding,
    previewer_text: TextEmbedding | None,
    image: DCPTokens,
    time_ids: Tensor,
    image_scale: float,
    previews: bool,
) -> tuple[Condition, Condition | None]:
    """The UNet's condition and, if there are previews, the Previewer's.

    Args:
        text, image: of R rows. previewer_text: R rows; None = as the UNet's.
        time_ids: (R or 1, 6).
    Raises: ValueError if the network has no Previewer to preview with.
    """
    rows = len(text)
    time_ids = time_ids.expand(rows, -1)
    unet = model.condition(text.prompt_embeds, text.pooled, time_ids, image.tokens, scale=image_scale)
    if not previews:
        return unet, None
    text, tokens = previewer_text or text, image.previewer
    return unet, model.condition(text.prompt_embeds, text.pooled, time_ids, tokens, previewer=True, scale=image_scale)


def window_time_ids(model: InstantIR, box: Box) -> Tensor:
    """Size conditioning of a window, (1, 6): its own size in pixels, as original and target, and no crop."""
    height, width = (side * model.config.downscale for side in (box.height, box.width))
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)


def join_text(low: TextEmbedding | None, high: TextEmbedding, batch: int) -> TextEmbedding:
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
