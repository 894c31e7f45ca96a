"""The tiny family's text encoder as a CLIP object, which ComfyUI's own CLIPTextEncode takes.

As with ComfyUI's encoders, "(word:1.3)" moves the word's tokens away from those of the empty prompt by that factor, and
a prompt longer than the encoder's length is encoded in sections that are strung together.
"""

from types import SimpleNamespace

import comfy.model_management as management
import torch
from comfy.sd import CLIP
from comfy.sd1_clip import escape_important, token_weights, unescape_important
from torch import Tensor, nn

from ..tiny_text import TinyTextEncoder

NAME = "fourfold"  # of the only tokenizer in ComfyUI's dict of token lists
Section = list[tuple[int, float]]  # token id and weight, as ComfyUI hands them from tokenizer to encoder


def tiny_clip(encoder: TinyTextEncoder) -> CLIP:
    """A ComfyUI CLIP around `encoder`, under ComfyUI's memory management, in float32."""
    target = SimpleNamespace(
        params={"encoder": encoder},
        clip=_WeightedEncoder,
        tokenizer=lambda embedding_directory=None, tokenizer_data=None: _WeightedTokenizer(encoder),
    )
    return CLIP(target, model_options={"dtype": torch.float32, "initial_device": torch.device("cpu")})


class _WeightedTokenizer:
    """Bytes with weights, in sections of the encoder's length; each ends with the end-of-text token and padding."""

    def __init__(self, encoder: TinyTextEncoder):
        self.tokenizer, self.length = encoder.tokenizer, encoder.config.length

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options) -> dict[str, list]:
        parsed = [(text, 1.0)] if options.get("disable_weights") else token_weights(escape_important(text), 1.0)
        tokens: Section = []
        for part, weight in parsed:
            ids = self.tokenizer(unescape_important(part), add_special_tokens=False).input_ids
            tokens += [(token, weight) for token in ids]
        sections = [self._finish(section) for section in self._split(tokens)]
        if return_word_ids:
            sections = [[(token, weight, 0) for token, weight in section] for section in sections]
        return {NAME: sections}

    def _split(self, tokens: Section) -> list[Section]:
        """Sections of at most length - 1 tokens, cut after a space where there is one."""
        space = self.tokenizer(" ", add_special_tokens=False).input_ids[0]
        sections, room = [], self.length - 1
        while len(tokens) > room:
            cut = next((i + 1 for i in reversed(range(room)) if tokens[i][0] == space), room)
            sections.append(tokens[:cut])
            tokens = tokens[cut:]
        return [*sections, tokens]

    def _finish(self, section: Section) -> Section:
        padding = self.length - 1 - len(section)
        return [*section, (self.tokenizer.eos_token_id, 1.0), *[(self.tokenizer.pad_token_id, 1.0)] * padding]

    def untokenize(self, section: Section) -> list[tuple[tuple[int, float], str]]:
        return [(pair, self.tokenizer.convert_ids_to_tokens(pair[0])) for pair in section]

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class _WeightedEncoder(nn.Module):
    """What `comfy.sd.CLIP` calls its cond_stage_model."""

    def __init__(self, encoder: TinyTextEncoder, device=None, dtype=None, model_options=None):
        super().__init__()
        self.encoder = encoder.to(device=device, dtype=dtype)
        self.dtypes = {dtype}

    def set_clip_options(self, options: dict) -> None:
        """Layer choices of CLIP models: this encoder has one output."""

    def reset_clip_options(self) -> None:
        """See `set_clip_options`."""

    def load_sd(self, state: dict[str, Tensor]):
        return self.load_state_dict(state, strict=True)

    def encode_token_weights(self, tokens: dict[str, list[Section]]) -> tuple[Tensor, Tensor]:
        """prompt_embeds (1, sections * length, width) and pooled (1, width): the mean over all bytes of the prompt."""
        sections = tokens[NAME]
        ids = torch.tensor([[pair[0] for pair in section] for section in sections], device=self.encoder.device)
        weights = torch.tensor([[pair[1] for pair in section] for section in sections], device=self.encoder.device)
        mask = (ids != self.encoder.tokenizer.pad_token_id).long()
        hidden = self.encoder(ids, mask).prompt_embeds
        if (weights != 1).any():
            nothing = self.encoder.encode([""]).prompt_embeds.to(hidden)
            hidden = torch.lerp(nothing.expand_as(hidden), hidden, weights[..., None].to(hidden))
        pooled = hidden.sum(dim=(0, 1)) / mask.sum()
        place = management.intermediate_device()
        return hidden.flatten(0, 1)[None].to(place), pooled[None].to(place)
