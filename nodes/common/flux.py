"""FLUX.1 as diffusers runs it: how a latent becomes tokens; its weights from a folder or from its makers' file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from einops import rearrange
from torch import Tensor

from . import checkpoints
from .errors import MismatchedKeysError, WrongFileError

PAGE = "https://huggingface.co/black-forest-labs/FLUX.1-dev"
PATCH = 2  # latents, side of a token
_WIDTH = 3072  # of FLUX.1, the only one that diffusers' conversion knows
_AXES = (16, 56, 56)  # of the rotary position embedding, for heads of 128
_MAKERS_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
_OTHER_PARTS = ("text_encoders.", "vae.", "first_stage_model.")


def pack(latent: Tensor) -> Tensor:
    """(B, C, h, w), h and w even -> tokens (B, h/2 * w/2, 4 C)."""
    return rearrange(latent, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: (B, h/2 * w/2, 4 C) -> (B, C, h, w)."""
    return rearrange(
        tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height // PATCH, w=width // PATCH, p=PATCH, q=PATCH
    )


def position_ids(text_tokens: int, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Rotary positions (0, row, column) of the text's tokens, all zero, and of a latent's, (M + h/2 * w/2, 3)."""
    rows, columns = torch.meshgrid(torch.arange(height // PATCH), torch.arange(width // PATCH), indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros(text_tokens, 3, dtype=image.dtype), image]).to(device, torch.float32)


def resolution_shift(tokens: int) -> float:
    """Shift k of FLUX's noise levels, t' = k t / (1 + (k - 1) t), for a picture of so many tokens.

    k = exp(mu), mu linear in the number of tokens: 0.5 at 256, 1.15 at 4096.
    """
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def load_flux(path: str | Path, dtype: torch.dtype | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sizes and weights of a FLUX transformer, in diffusers' layout.

    Args:
        path: the pipeline's diffusers folder, its `transformer`, or the single file of its makers (with or without
            text encoders and autoencoder in it).
        dtype: of the weights; None = as stored.
    Returns: the arguments of `FluxTransformer2DModel`, and its state.
    Raises: FileNotFoundError; CorruptCheckpointError; WrongFileError for anything but FLUX.1-dev's kind;
        MismatchedKeysError for a single file with missing or unknown weights.
    """
    path = find_flux(path)
    header = checkpoints.read_header(path)
    hint = f"Choose flux1-dev.safetensors or the folder of {PAGE}."
    checkpoints.require_family(header, ("flux", "flux_schnell"), path, hint)
    if scaled := [name for name in header.tensors if name.endswith(("scaled_fp8", "scale_weight", "weight_scale"))]:
        raise WrongFileError(
            f"{path} holds weights with scales apart ({checkpoints.shorten(scaled, 2)}), which are not read here. "
            f"{hint}"
        )
    state = checkpoints.load_state(path)
    if any("double_blocks." in name for name in state):
        state = from_makers_layout(state, path)
    if dtype is not None:
        for name in state:  # one by one: the whole network is never there in two precisions
            state[name] = state[name].to(dtype)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return flux_sizes(shapes) | _written_sizes(path), state


def find_flux(path: str | Path) -> Path:
    """The file or folder of the transformer: of a pipeline's folder its `transformer`, or the one single file in it.

    Raises: FileNotFoundError if nothing is there.
    """
    path = checkpoints.require_file(
        Path(path).expanduser(), "the FLUX transformer", "the folder you name, or ComfyUI/models/diffusion_models", PAGE
    )
    if (path / "transformer").is_dir():
        return path / "transformer"
    if path.is_dir() and not (path / "config.json").is_file():
        files = [f for f in sorted(path.glob("*.safetensors")) if checkpoints.detect_family(f).startswith("flux")]
        return files[0] if len(files) == 1 else path
    return path


def flux_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arguments of `FluxTransformer2DModel` that weights of these shapes (diffusers' names) ask for."""
    width, in_channels = shapes["x_embedder.weight"]
    head_dim = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "in_channels": in_channels,
        "num_layers": _count(shapes, "transformer_blocks"),
        "num_single_layers": _count(shapes, "single_transformer_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "axes_dims_rope": tuple(axis * head_dim // sum(_AXES) for axis in _AXES),
    }


def _count(shapes: Mapping[str, Any], name: str) -> int:
    return 1 + max((int(found[1]) for key in shapes if (found := re.match(rf"{name}\.(\d+)\.", key))), default=-1)


def _written_sizes(path: Path) -> dict[str, Any]:
    """What a folder's config.json says that shapes cannot."""
    file = path / "config.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {"axes_dims_rope": tuple(content["axes_dims_rope"])} if "axes_dims_rope" in content else {}


def from_makers_layout(state: dict[str, Tensor], source: str | Path = "the file") -> dict[str, Tensor]:
    """The weights of the makers' single file under diffusers' names. `state` is emptied on the way.

    diffusers' own conversion does it, but for the fused layers of the single blocks, which it splits at the width of
    FLUX.1 alone: those are split here.

    Args:
        state: name -> tensor; text encoders and autoencoder in it are left out.
        source: named in errors.
    Raises: MismatchedKeysError naming missing or unknown weights.
    """
    prefix = next((p for p in _MAKERS_PREFIXES if any(name.startswith(f"{p}double_blocks.") for name in state)), "")
    network = {}
    for name in list(state):
        value = state.pop(name)
        if name.startswith(prefix) and not name.startswith(_OTHER_PARTS):
            network[name.removeprefix(prefix)] = value
    fused = {}
    for name in list(network):
        if found := re.fullmatch(r"single_blocks\.(\d+)\.linear1\.(weight|bias)", name):
            fused[found[1], found[2]] = network.pop(name)
            network[name] = torch.empty(7 * _WIDTH, 0)
    try:
        converted = convert_flux_transformer_checkpoint_to_diffusers(network)
    except KeyError as error:
        raise MismatchedKeysError(
            f"{source} lacks the weight {error} of a FLUX transformer. Download it again from {PAGE}."
        ) from error
    if network:
        raise MismatchedKeysError(
            f"{source} holds {len(network)} weights that FLUX.1 has not: {checkpoints.shorten(sorted(network))}. "
            f"Choose flux1-dev.safetensors of {PAGE}."
        )
    while fused:
        (block, kind), value = fused.popitem()
        width = value.shape[0] // 7
        parts = value.split([width, width, width, 4 * width])
        for layer, part in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), parts, strict=True):
            converted[f"single_transformer_blocks.{block}.{layer}.{kind}"] = part.clone()
    return converted
