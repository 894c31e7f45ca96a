"""SDXL's autoencoder, from a diffusers folder or from a single file in its makers' layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from . import checkpoints
from .autoencoder import KLAutoencoder

PREFIX = "first_stage_model."
SCALE = 0.13025
PAGE = "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0"


def read_sdxl_vae(path: str | Path, dtype: torch.dtype = torch.float32) -> KLAutoencoder:
    """The autoencoder of a diffusers folder (pipeline or `vae`), of a full SDXL checkpoint, or of a VAE's own file.

    Args:
        dtype: of the weights; half precision becomes float32, because SDXL's VAE overflows in it (bfloat16 does not).
    Raises: FileNotFoundError, WrongFileError, CorruptCheckpointError, MismatchedKeysError.
    """
    path = Path(path).expanduser()
    dtype = torch.float32 if dtype == torch.float16 else dtype
    if path.is_dir():
        return KLAutoencoder.from_pretrained(path, dtype)
    header = checkpoints.read_header(path)
    checkpoints.require_family(header, ("sdxl", "vae4"), path, f"Choose a full SDXL checkpoint, for example of {PAGE}.")
    prefix = PREFIX if any(name.startswith(PREFIX) for name in header.tensors) else ""
    if f"{prefix}encoder.conv_in.weight" not in header.tensors:
        raise FileNotFoundError(
            f"{path} holds no autoencoder, only a network. Choose a full SDXL checkpoint, or the folder of {PAGE}."
        )
    shapes = {name.removeprefix(prefix): shape for name, (_, shape) in header.tensors.items()}
    config = _config(shapes)
    state = {k: v.to(dtype) for k, v in checkpoints.load_state(path).items() if k.startswith(prefix)}
    vae = AutoencoderKL(**config).to(dtype)
    checkpoints.load_strict(vae, convert_ldm_vae_checkpoint(state, config), source=path)
    return KLAutoencoder(vae).eval().requires_grad_(False)


def _config(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """diffusers' config from the shapes in the makers' layout."""
    levels = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"encoder\.down\.(\d+)\.", name)))
    blocks = [int(found[1]) for name in shapes if (found := re.match(r"encoder\.down\.0\.block\.(\d+)\.", name))]
    return dict(
        block_out_channels=tuple(shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)),
        layers_per_block=1 + max(blocks),
        latent_channels=shapes["decoder.conv_in.weight"][1],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=1024,
        scaling_factor=SCALE,
    )
