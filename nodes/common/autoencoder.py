"""Stable Diffusion's autoencoders outside ComfyUI, with the same face as the tiny family's codec."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from . import checkpoints
from .errors import MismatchedKeysError

TILED_FROM = 1024  # pixels, side from which encoding and decoding go tile by tile


class Autoencoder(Protocol):
    """What restore functions need: `LinearCodec` and `KLAutoencoder` have it."""

    downscale: int  # pixels per latent
    latent_channels: int
    shift: float  # z = (latent - shift) * scale
    scale: float

    def encode(self, pixels: Tensor) -> Tensor: ...

    def decode(self, latent: Tensor) -> Tensor: ...


class KLAutoencoder(nn.Module):
    """diffusers' AutoencoderKL. `encode` gives unscaled latents, the mean of the posterior."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae
        vae.enable_tiling()
        vae.tile_sample_min_size = TILED_FROM
        vae.tile_latent_min_size = TILED_FROM // self.downscale

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def shift(self) -> float:
        return self.vae.config.shift_factor or 0.0

    @property
    def scale(self) -> float:
        return self.vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 -> (B, C, H/8, W/8), float32."""
        return self.vae.encode(self._to_vae(2 * pixels - 1)).latent_dist.mean.float()

    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) unscaled -> (B, 3, 8h, 8w) in 0..1, float32; lets gradients through to the latent."""
        return (self.vae.decode(self._to_vae(latent)).sample.float() / 2 + 0.5).clamp(0, 1)

    def _to_vae(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.vae.device, self.vae.dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> KLAutoencoder:
        """Loads the `vae` subfolder of a diffusers folder, or the folder itself if it is one.

        Raises: FileNotFoundError that says where the folder is to be had; WrongFileError, CorruptCheckpointError;
            MismatchedKeysError if weights are missing, surplus or of another shape.
        """
        folder = Path(folder)
        place = folder / "vae" if (folder / "vae").is_dir() else folder
        if not (place / "config.json").is_file():
            raise FileNotFoundError(
                f"no VAE in {folder}: a subfolder 'vae' with config.json and its weights is expected, as in "
                "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium. Give the folder of that model as base."
            )
        hint = "Give a diffusers folder with a subfolder 'vae'."
        checkpoints.require_family(checkpoints.read_header(place), ("vae16", "vae4"), place, hint)
        vae, report = AutoencoderKL.from_pretrained(
            place, torch_dtype=dtype, local_files_only=True, output_loading_info=True
        )
        wrong = "; ".join(f"{kind.removesuffix('_keys')}: {keys}" for kind, keys in report.items() if keys)
        if wrong:
            raise MismatchedKeysError(f"{place}: the weights do not fit config.json ({wrong}). Download both again.")
        return cls(vae).eval().requires_grad_(False)


def to_model(latent: Tensor, shift: float, scale: float) -> Tensor:
    """Unscaled VAE latent -> what the diffusion network sees: z = (latent - shift) * scale."""
    return (latent - shift) * scale


def to_vae(z: Tensor, shift: float, scale: float) -> Tensor:
    """The inverse of `to_model`."""
    return z / scale + shift
