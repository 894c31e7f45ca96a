"""FLUX.1's text encoders and autoencoder outside ComfyUI: from a diffusers folder, or from its makers' single files."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from . import checkpoints
from .autoencoder import KLAutoencoder
from .errors import WrongFileError
from .flux import PAGE
from .pretrained import fill_pretrained, load_pretrained, require_model_folder
from .text import TextEmbedding, tokenize

FILES_PAGE = "https://huggingface.co/comfyanonymous/flux_text_encoders"
SHIFT, SCALE = 0.1159, 0.3611  # of FLUX's latents: z = (latent - shift) * scale
T5_LENGTH = 512  # tokens that FLUX.1-dev reads
_CLIP_LENGTH = 77


class FluxTextEncoder(nn.Module):
    """CLIP-L's pooled vector and T5's tokens, as FLUX.1 reads prompts."""

    def __init__(self, clip: CLIPTextModel, t5: T5EncoderModel, tokenizers: tuple[CLIPTokenizer, T5TokenizerFast]):
        super().__init__()
        self.clip, self.t5, self.tokenizers = clip, t5, tuple(tokenizers)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> FluxTextEncoder:
        """The encoders of a folder.

        Args:
            folder: FLUX's diffusers folder (text_encoder, text_encoder_2, tokenizer, tokenizer_2), or a folder with
                the single files of CLIP-L and T5 XXL and, as they hold no vocabulary, the folders tokenizer and
                tokenizer_2 of the diffusers folder.
            dtype: None keeps the precision of the files.
        Raises: FileNotFoundError that names what is missing; MismatchedKeysError for incomplete weights.
        """
        folder = Path(folder).expanduser()
        if (folder / "text_encoder").is_dir() or (folder / "text_encoder_2").is_dir():
            clip, t5 = (_load_folder(c, folder / name, dtype)
                        for c, name in ((CLIPTextModel, "text_encoder"), (T5EncoderModel, "text_encoder_2")))
        else:
            clip = _load_clip(find_file(folder, ("clip_l", "clip"), "CLIP-L, clip_l.safetensors", FILES_PAGE), dtype)
            t5 = _load_t5(find_file(folder, ("t5",), "T5 XXL, t5xxl_fp16.safetensors", FILES_PAGE), dtype)
        tokenizers = (_load_tokenizer(CLIPTokenizer, folder / "tokenizer"),
                      _load_tokenizer(T5TokenizerFast, folder / "tokenizer_2"))
        return cls(clip, t5, tokenizers).eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.clip.device

    @torch.no_grad()
    def encode(self, prompts: list[str], t5_length: int = T5_LENGTH) -> TextEmbedding:
        """T5's tokens (B, t5_length, 4096) and CLIP-L's pooled vector (B, 768), in the encoders' precision.

        Args:
            prompts: B texts; beyond `t5_length` tokens of T5's they are cut, and a warning says what is lost. CLIP
                reads the first 77 of its own tokens.
        Raises: ValueError for something else than a list of texts.
        """
        t5_ids = tokenize(self.tokenizers[1], prompts, t5_length, "FLUX's T5")
        clip_ids = self.tokenizers[0](
            prompts, padding="max_length", max_length=_CLIP_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        tokens = self.t5(t5_ids.to(self.device)).last_hidden_state
        return TextEmbedding(tokens, self.clip(clip_ids.to(self.device)).pooler_output.to(tokens.dtype))


def load_flux_autoencoder(path: str | Path, dtype: torch.dtype = torch.float32) -> KLAutoencoder:
    """FLUX's autoencoder: of a diffusers folder the subfolder `vae`, else the makers' single file (ae.safetensors).

    Args:
        path: the folder that holds one or the other, or the file.
    Raises: FileNotFoundError that names what is missing; WrongFileError; CorruptCheckpointError; MismatchedKeysError.
    """
    path = Path(path).expanduser()
    if (path / "vae").is_dir() or (path / "config.json").is_file():
        return KLAutoencoder.from_pretrained(path, dtype)
    file = path if path.is_file() else find_file(path, ("vae16",), "FLUX's autoencoder, ae.safetensors", PAGE)
    hint = f"Choose ae.safetensors of {PAGE}."
    checkpoints.require_family(checkpoints.read_header(file), "vae16", file, hint)
    state = checkpoints.load_state(file)
    config = _vae_config(state)
    if not config["block_out_channels"]:
        raise WrongFileError(f"{file} is an autoencoder in another layout than its makers'. {hint}")
    state = convert_ldm_vae_checkpoint(state, config)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    checkpoints.load_strict(vae, {name: value.to(dtype) for name, value in state.items()}, source=file)
    return KLAutoencoder(vae).eval().requires_grad_(False)


def find_file(folder: Path, families: tuple[str, ...], what: str, page: str) -> Path:
    """The weight file in a folder that is of one of these kinds (`families.FAMILIES`).

    Raises: FileNotFoundError that says what is missing and where it comes from; ValueError if there are several.
    """
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    found = [file for file in files if checkpoints.detect_family(file) in families]
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} files that could be {what}: "
                         f"{', '.join(file.name for file in found)}. Leave one of them there.")
    if not found:
        raise FileNotFoundError(f"{what}, is missing in {folder}. Download it from {page} into this folder, or give "
                                f"the diffusers folder of {PAGE}. Nothing is downloaded by itself.")
    return found[0]


def _vae_config(state: dict[str, Tensor]) -> dict:
    """config.json of FLUX's autoencoder, its widths read off the weights in their makers' layout."""
    first = {name.partition("encoder.down.")[2]: value for name, value in state.items() if "encoder.down." in name}
    widths = []
    while f"{len(widths)}.block.0.conv1.weight" in first:
        widths.append(first[f"{len(widths)}.block.0.conv1.weight"].shape[0])
    layers = sum(name.startswith("0.block.") and name.endswith(".conv1.weight") for name in first)
    return dict(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=tuple(widths), layers_per_block=layers,
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
        sample_size=1024, use_quant_conv=False, use_post_quant_conv=False, shift_factor=SHIFT, scaling_factor=SCALE,
    )


def _load_clip(file: Path, dtype: torch.dtype | None) -> CLIPTextModel:
    state = _without_prefix(checkpoints.load_state(file), "text_model.embeddings.token_embedding.weight")
    state = {name: value for name, value in state.items() if name.startswith("text_model.")}
    (vocabulary, width), inner = (state[f"text_model.{name}.weight"].shape
                                  for name in ("embeddings.token_embedding", "encoder.layers.0.mlp.fc1"))
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner[0], num_attention_heads=max(1, width // 64),
        num_hidden_layers=sum(name.endswith("layer_norm1.weight") for name in state), hidden_act="quick_gelu",
        max_position_embeddings=state["text_model.embeddings.position_embedding.weight"].shape[0],
        bos_token_id=0, eos_token_id=2,  # 2: the pooled vector is that of the highest token, the end of the text
    )
    return fill_pretrained(CLIPTextModel, config, state, file, dtype)


def _load_t5(file: Path, dtype: torch.dtype | None) -> T5EncoderModel:
    state = _without_prefix(checkpoints.load_state(file), "encoder.block.0.layer.0.SelfAttention.q.weight")
    attention = "encoder.block.0.layer.0.SelfAttention"
    (vocabulary, width), heads = state["shared.weight"].shape, state[f"{attention}.relative_attention_bias.weight"]
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=state[f"{attention}.q.weight"].shape[0] // heads.shape[1],
        d_ff=state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0], num_heads=heads.shape[1],
        num_layers=sum(name.endswith("SelfAttention.q.weight") for name in state), feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=heads.shape[0],
    )
    state.setdefault("encoder.embed_tokens.weight", state["shared.weight"])
    return fill_pretrained(T5EncoderModel, config, state, file, dtype)


def _without_prefix(state: dict[str, Tensor], landmark: str) -> dict[str, Tensor]:
    """The weights of the network that holds `landmark`, without what stands before its names."""
    prefix = next(name for name in state if name.endswith(landmark)).removesuffix(landmark)
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _load_folder(model_class: type, folder: Path, dtype: torch.dtype | None) -> nn.Module:
    require_model_folder(folder, "a text encoder of FLUX.1", f"{PAGE}/tree/main/{folder.name}")
    return load_pretrained(model_class, folder, dtype)


def _load_tokenizer(tokenizer_class: type, folder: Path):
    if not folder.is_dir():
        raise FileNotFoundError(f"a tokenizer of FLUX.1 is missing: the folder {folder} does not exist. Download all "
                                f"files of {PAGE}/tree/main/{folder.name} into it.")
    return tokenizer_class.from_pretrained(folder, local_files_only=True)
