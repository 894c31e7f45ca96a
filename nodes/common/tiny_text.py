"""The tiny family's text encoder: bytes in, a small T5 encoder, no vocabulary file (not in the papers)."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from . import checkpoints
from .text import TextEmbedding

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TinyTextConfig:
    width: int = 128  # of the tokens and of the pooled vector
    layers: int = 2
    heads: int = 4
    hidden: int = 384  # of the feed-forward
    length: int = 96  # bytes; shorter prompts are padded, longer ones cut


class TinyTextEncoder(nn.Module):
    """ByT5's tokens through a small T5 encoder; the pooled vector is the mean over the prompt's bytes.

    The rows of padding are zero: an empty prompt is the null prompt, all zeros but for the end-of-text token.
    """

    def __init__(self, config: TinyTextConfig | None = None):
        super().__init__()
        self.config = config = config or TinyTextConfig()
        self.tokenizer = ByT5Tokenizer()
        self.encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(self.tokenizer),
                d_model=config.width,
                d_kv=config.width // config.heads,
                d_ff=config.hidden,
                num_layers=config.layers,
                num_heads=config.heads,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, (B, length) each, int64. A longer prompt is cut; a warning says what is lost.

        Raises: ValueError for something else than a list of texts.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}.")
        room = self.config.length - 1  # the end-of-text token takes one place
        for encoded in (prompt.encode() for prompt in prompts):
            if len(encoded) > room:
                rest = encoded[room:].decode(errors="replace")
                log.warning("the text encoder reads %d bytes; this end of a prompt was cut off: %r", room, rest)
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.config.length, return_tensors="pt"
        )
        return tokens.input_ids, tokens.attention_mask

    def forward(self, ids: Tensor, mask: Tensor) -> TextEmbedding:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden = hidden * mask[..., None].to(hidden.dtype)
        return TextEmbedding(hidden, hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True).to(hidden.dtype))

    def encode(self, prompts: list[str]) -> TextEmbedding:
        """prompt_embeds (B, length, width) and pooled (B, width)."""
        ids, mask = self.tokenize(prompts)
        return self(ids.to(self.device), mask.to(self.device))

    def export_state(self) -> dict[str, Tensor]:
        """The weights without T5's second name for the embedding, which transformers ties to the first."""
        return {k: v for k, v in self.state_dict().items() if k != "encoder.encoder.embed_tokens.weight"}

    def save(self, path: str | Path, state: dict[str, Tensor] | None = None, **summary) -> None:
        checkpoints.save_checkpoint(
            path, state or self.export_state(), method="text", config=asdict(self.config), **summary
        )

    @classmethod
    def load(cls, path: str | Path) -> TinyTextEncoder:
        encoder = cls(TinyTextConfig(**checkpoints.read_header(path).config))
        state = {k: v.float() for k, v in checkpoints.load_state(path).items()}
        state["encoder.encoder.embed_tokens.weight"] = state["encoder.shared.weight"]
        checkpoints.load_strict(encoder, state, source=path)
        return encoder.eval().requires_grad_(False)
