"""The tiny family's autoencoder: a closed-form linear codec.

No paper asks for it: it stands in for SD's VAEs where a download is not wanted. The encoder projects every 4x4 patch on
the principal components of photographs; the decoder is the linear map, in the least-squares sense, from 3x3
neighbouring codes back to a patch, so that block borders are reconstructed from both sides. Nothing is trained by
gradient; `trainers/fit_codec.py` solves both from a folder of photographs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from . import checkpoints


@dataclass(frozen=True)
class CodecConfig:
    patch: int = 4  # pixels, side of a patch = how much smaller the latent is
    latent_channels: int = 16  # of the 3 * patch^2 values of a patch
    neighbourhood: int = 3  # codes, side of the square that a patch is decoded from
    shift: float = 0.0  # z = (latent - shift) * scale, the form of SD3's VAE
    scale: float = 1.0  # one number for all channels: whitening would make the finest detail as loud as the rest


class LinearCodec(nn.Module):
    """Linear autoencoder. `encode` gives unscaled latents, as ComfyUI's LATENT holds them."""

    def __init__(self, config: CodecConfig | None = None):
        super().__init__()
        self.config = config = config or CodecConfig()
        values = 3 * config.patch**2
        self.encoder = nn.Conv2d(values, config.latent_channels, kernel_size=1)
        self.decoder = nn.Conv2d(config.latent_channels, values, kernel_size=config.neighbourhood)
        self.requires_grad_(False)

    @property
    def downscale(self) -> int:
        return self.config.patch

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def shift(self) -> float:
        return self.config.shift

    @property
    def scale(self) -> float:
        return self.config.scale

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1, sides multiples of the patch -> unscaled latent (B, C, H/patch, W/patch)."""
        height, width = pixels.shape[-2:]
        if height % self.downscale or width % self.downscale:
            raise ValueError(
                f"the picture is {height} x {width} px; both sides must be multiples of {self.downscale}. "
                "Pad it first, as LR Prepare and `prepare_lr` do."
            )
        return self.encoder(pixel_unshuffle(2 * pixels.to(self.encoder.weight.dtype) - 1, self.downscale))

    def decode(self, latent: Tensor) -> Tensor:
        """Unscaled latent (B, C, h, w) -> (B, 3, h*patch, w*patch), clamped to 0..1."""
        margin = self.config.neighbourhood // 2
        framed = pad(latent.to(self.decoder.weight.dtype), (margin,) * 4, mode="replicate")
        return (pixel_shuffle(self.decoder(framed), self.downscale) / 2 + 0.5).clamp(0, 1)

    def save(self, path: str | Path, training: dict | None = None) -> None:
        checkpoints.save_checkpoint(
            path, self.state_dict(), method="codec", config=asdict(self.config), training=training
        )

    @classmethod
    def load(cls, path: str | Path) -> LinearCodec:
        codec = cls(CodecConfig(**checkpoints.read_header(path).config))
        state = {k: v.float() for k, v in checkpoints.load_state(path).items()}
        checkpoints.load_strict(codec, state, source=path)
        return codec.eval()
