"""The two text encoders of SDXL, from a diffusers folder or from a single file in its makers' layout."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from . import checkpoints
from .errors import MismatchedKeysError
from .pretrained import fill_pretrained, load_pretrained, require_model_folder
from .text import TextEmbedding, tokenize

PAGE = "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0"
LENGTH = 77  # tokens of a prompt
CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."  # in a single file
_HEAD_DIM = 64  # of both; shapes do not tell it


class SDXLTextEncoder(nn.Module):
    """CLIP-L and OpenCLIP-G as SDXL reads prompts (Podell et al. 2023, section 2.1): layers before the last, side by
    side, and the pooled vector of the second.

    Args:
        clip_l, clip_g: the encoders. tokenizers: theirs, in the same order.
    """

    def __init__(self, clip_l: CLIPTextModel, clip_g: CLIPTextModelWithProjection, tokenizers: Sequence[Any]):
        super().__init__()
        self.clip_l, self.clip_g = clip_l, clip_g
        self.tokenizers = tuple(tokenizers)

    @property
    def device(self) -> torch.device:
        return self.clip_l.device

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextEmbedding:
        """prompt_embeds (B, 77, 768 + 1280) and pooled (B, 1280). Longer prompts are cut; a warning says what is lost.

        Raises: ValueError for something else than a list of texts.
        """
        low, high = (
            encoder(
                tokenize(tokenizer, prompts, LENGTH, f"text encoder {i}").to(self.device), output_hidden_states=True
            )
            for i, (encoder, tokenizer) in enumerate(zip((self.clip_l, self.clip_g), self.tokenizers, strict=True), 1)
        )
        return TextEmbedding(torch.cat([low.hidden_states[-2], high.hidden_states[-2]], dim=-1), high.text_embeds)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype | None = None, tokenizer: str | Path | None = None
    ) -> SDXLTextEncoder:
        """Loads the encoders of a diffusers folder or a single file. Nothing is downloaded.

        Args:
            path: folder with text_encoder, text_encoder_2, tokenizer and tokenizer_2; or a full SDXL checkpoint.
            dtype: of the weights; None keeps the precision of the files.
            tokenizer: for a single file, which holds no vocabulary: folder of CLIP's tokenizer (vocab.json,
                merges.txt); None = the folder `tokenizer` beside the file.
        Raises: FileNotFoundError that names what is missing; WrongFileError, MismatchedKeysError.
        """
        path = Path(path).expanduser()
        if path.is_file():
            return cls._from_file(path, dtype, Path(tokenizer) if tokenizer else path.parent / "tokenizer")
        loaded = []
        for suffix, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
            folder = path / f"text_encoder{suffix}"
            require_model_folder(folder, "a text encoder of SDXL", f"{PAGE}/tree/main/{folder.name}")
            loaded.append(load_pretrained(kind, folder, dtype))
        return cls(*loaded, [_tokenizer(path / name) for name in ("tokenizer", "tokenizer_2")]).eval()

    @classmethod
    def _from_file(cls, path: Path, dtype: torch.dtype | None, tokenizer: Path) -> SDXLTextEncoder:
        header = checkpoints.read_header(path)
        checkpoints.require_family(header, "sdxl", path, f"Choose a full SDXL checkpoint, for example of {PAGE}.")
        if not any(name.startswith(CLIP_G) for name in header.tensors):
            raise FileNotFoundError(
                f"{path} holds a network without text encoders. Choose a full SDXL checkpoint, or the folder of {PAGE}."
            )
        words = [_tokenizer(tokenizer), _tokenizer(tokenizer, pad_token="!")]
        state = {name: value for name, value in checkpoints.load_state(path).items() if name.startswith("conditioner.")}
        low = {name.removeprefix(CLIP_L): value for name, value in state.items() if name.startswith(CLIP_L)}
        try:
            width = state[f"{CLIP_G}ln_final.weight"].shape[0]
            high = convert_open_clip_checkpoint(
                SimpleNamespace(config=SimpleNamespace(hidden_size=width)), state, prefix=CLIP_G
            )
            clip_l = _build(CLIPTextModel, low, "quick_gelu", path, dtype)
            return cls(clip_l, _build(CLIPTextModelWithProjection, high, "gelu", path, dtype), words).eval()
        except KeyError as error:
            raise MismatchedKeysError(
                f"{path} does not hold SDXL's text encoders complete: {error} is missing. Download it again."
            ) from error


def _build(
    kind: type, state: Mapping[str, Tensor], activation: str, path: Path, dtype: torch.dtype | None
) -> nn.Module:
    """A CLIP text model with sizes read off its weights."""
    state = {name: value for name, value in state.items() if not name.endswith("position_ids")}
    shapes = {name.removeprefix("text_model."): tuple(value.shape) for name, value in state.items()}
    layers = [int(found[1]) for name in shapes if (found := re.match(r"encoder\.layers\.(\d+)\.", name))]
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=1 + max(layers),
        num_attention_heads=max(1, width // _HEAD_DIM),
        max_position_embeddings=shapes["embeddings.position_embedding.weight"][0],
        projection_dim=shapes.get("text_projection.weight", (width,))[0],
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=2,  # the pooled vector is that of the highest token, the end of the text
    )
    return fill_pretrained(kind, config, dict(state), path, dtype)


def _tokenizer(folder: Path, **options: Any) -> CLIPTokenizer:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"a tokenizer of SDXL is missing: the folder {folder} does not exist. Download all files of "
            f"{PAGE}/tree/main/tokenizer into it."
        )
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True, **options)
