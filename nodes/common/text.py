"""Text as the networks take it, and the three text encoders of Stable Diffusion 3.5 outside ComfyUI."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5EncoderModel,
    T5TokenizerFast,
)

from .pretrained import load_pretrained, require_model_folder

log = logging.getLogger(__name__)

SD3_PAGE = "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium"
SD3_TEXT_WIDTH = 4096  # of T5 XXL, and so of the text tokens of every SD3


@dataclass(frozen=True)
class TextEmbedding:
    """An encoded prompt for each row of a batch.

    Attributes:
        prompt_embeds: a token each, (B, L, C).
        pooled: the whole prompt in one vector, (B, P).
    """

    prompt_embeds: Tensor
    pooled: Tensor

    def __post_init__(self):
        if self.prompt_embeds.ndim != 3 or self.pooled.ndim != 2 or len(self.prompt_embeds) != len(self.pooled):
            raise ValueError("a text embedding is prompt_embeds (B, L, C) and pooled (B, P), got "
                             f"{tuple(self.prompt_embeds.shape)} and {tuple(self.pooled.shape)}.")

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEmbedding:
        """The same embedding on another device, in another precision, or both."""
        return TextEmbedding(self.prompt_embeds.to(device, dtype), self.pooled.to(device, dtype))

    def expand(self, batch: int) -> TextEmbedding:
        """The rows repeated as a whole up to `batch` rows: of two prompts and 6, rows 0 1 0 1 0 1.

        Raises: ValueError if `batch` is not a multiple of the number of rows.
        """
        if batch == len(self):
            return self
        if len(self) == 0 or batch % len(self):
            raise ValueError(f"{len(self)} prompts cannot be spread over a batch of {batch}: give one prompt, "
                             "or one for each picture.")
        times = batch // len(self)
        return TextEmbedding(self.prompt_embeds.repeat(times, 1, 1), self.pooled.repeat(times, 1))


class SD3TextEncoder(nn.Module):
    """CLIP-L, CLIP-G and T5 as Stable Diffusion 3 reads prompts (Esser et al. 2024, section 4.1).

    T5 may be absent: its tokens are then zero, which SD3 was trained to accept.
    """

    def __init__(self, clip_l: CLIPTextModelWithProjection, clip_g: CLIPTextModelWithProjection,
                 t5: T5EncoderModel | None, tokenizers: Sequence, width: int = SD3_TEXT_WIDTH):
        """
        Args:
            clip_l, clip_g, t5: the encoders.
            tokenizers: theirs, in the same order (the third is None where T5 is absent).
            width: channels of the text tokens where T5 is absent; otherwise T5's own width.
        """
        super().__init__()
        self.clip_l, self.clip_g, self.t5 = clip_l, clip_g, t5
        self.tokenizers = tuple(tokenizers)
        self.width = width if t5 is None else t5.config.d_model
        clip_width = clip_l.config.hidden_size + clip_g.config.hidden_size
        if clip_width > self.width:
            raise ValueError(f"CLIP's tokens are {clip_width} wide together, more than the {self.width} of T5's, to "
                             "which they are padded; the encoders belong to different models.")

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str | None = None,
                        dtype: torch.dtype | None = None) -> SD3TextEncoder:
        """The encoders of a diffusers folder of SD3 or SD3.5: text_encoder, _2 and _3, tokenizer, _2 and _3.

        Args:
            folder: local folder. Without a subfolder text_encoder_3, prompts are encoded without T5.
            dtype: None keeps the precision of the files.
        Raises: FileNotFoundError that names what is missing; MismatchedKeysError for incomplete weights.
        """
        folder = Path(folder).expanduser()
        clip_l, tokenizer = _load(folder, "", CLIPTextModelWithProjection, CLIPTokenizer, dtype)
        clip_g, tokenizer_2 = _load(folder, "_2", CLIPTextModelWithProjection, CLIPTokenizer, dtype)
        t5, tokenizer_3 = None, None
        if (folder / "text_encoder_3").is_dir():
            t5, tokenizer_3 = _load(folder, "_3", T5EncoderModel, T5TokenizerFast, dtype)
        else:
            log.warning("%s has no text_encoder_3: prompts are encoded by the two CLIP encoders alone.", folder)
        encoder = cls(clip_l, clip_g, t5, (tokenizer, tokenizer_2, tokenizer_3), width=_text_width(folder))
        return encoder.to(device).eval()

    @property
    def device(self) -> torch.device:
        return self.clip_l.device

    @torch.no_grad()
    def encode(self, prompts: list[str], t5_length: int = 256) -> TextEmbedding:
        """Tokens [CLIP-L | CLIP-G | zeros] followed by T5's, and the pooled vectors of both CLIPs.

        Args:
            prompts: B prompts; beyond 77 CLIP tokens or `t5_length` T5 tokens they are cut (a warning says what).
            t5_length: number of T5's tokens, at least 1.
        Returns: prompt_embeds (B, 77 + t5_length, 4096) and pooled (B, 768 + 1280), device and dtype of CLIP-L.
        Raises: ValueError for something else than a list of texts.
        """
        hidden, pooled = zip(*(self._clip(i, prompts) for i in (0, 1)), strict=True)
        clip = torch.cat(hidden, dim=-1)
        clip = F.pad(clip, (0, self.width - clip.shape[-1]))
        t5 = self._t5(prompts, t5_length).to(clip)
        return TextEmbedding(torch.cat([clip, t5], dim=1), torch.cat(pooled, dim=-1))

    def _clip(self, index: int, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Hidden states before the last layer, (B, 77, C), and the projected pooled vector, (B, P)."""
        encoder = (self.clip_l, self.clip_g)[index]
        ids = self._tokenize(index, prompts, self.tokenizers[index].model_max_length)
        output = encoder(ids, output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds

    def _t5(self, prompts: list[str], length: int) -> Tensor:
        if self.t5 is None:
            return torch.zeros(len(prompts), length, self.width, device=self.device)
        return self.t5(self._tokenize(2, prompts, length)).last_hidden_state

    def _tokenize(self, index: int, prompts: list[str], length: int) -> Tensor:
        return tokenize(self.tokenizers[index], prompts, length, f"text encoder {index + 1}").to(self.device)


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int, reader: str) -> Tensor:
    """Token ids of prompts, padded or cut to `length`: (B, length). A warning says what was cut off.

    Args:
        reader: who reads the tokens, for the warning: "text encoder 1".
    Raises: ValueError for something else than a list of texts.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}.")
    for ids in tokenizer(prompts, truncation=False, verbose=False).input_ids:
        if len(ids) > length:
            rest = tokenizer.decode(ids[length - 1:-1], skip_special_tokens=True)
            log.warning("%s reads %d tokens; this end of a prompt was cut off: %r", reader, length, rest)
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def _load(folder: Path, suffix: str, encoder_class: type, tokenizer_class: type, dtype: torch.dtype | None) -> tuple:
    """(encoder, tokenizer) number `suffix` of the folder."""
    encoder, tokenizer = folder / f"text_encoder{suffix}", folder / f"tokenizer{suffix}"
    page = f"{SD3_PAGE}/tree/main"
    require_model_folder(encoder, "a text encoder of Stable Diffusion 3", f"{page}/{encoder.name}")
    if not tokenizer.is_dir():
        raise FileNotFoundError(f"a tokenizer of Stable Diffusion 3 is missing: the folder {tokenizer} does not exist. "
                                f"Download all files of {page}/{tokenizer.name} into it.")
    return (load_pretrained(encoder_class, encoder, dtype),
            tokenizer_class.from_pretrained(tokenizer, local_files_only=True))


def _text_width(folder: Path) -> int:
    """Width of the text tokens that the folder's transformer takes; SD3's 4096 where it holds no transformer."""
    config = folder / "transformer" / "config.json"
    return json.loads(config.read_text())["joint_attention_dim"] if config.is_file() else SD3_TEXT_WIDTH
