"""Solves the tiny family's linear codec from a folder of photographs; a minute on a laptop, no gradients.

    python -m fourfold.trainers.fit_codec --photographs FOLDER --output checkpoints/codec.safetensors
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle, unfold

from ..nodes.common.codec import CodecConfig, LinearCodec
from ..nodes.common.images import read_image
from .data import find_images
from .fit import parse

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitCodecConfig:
    photographs: str = field(metadata={"help": "folder of photographs, searched recursively"})
    output: str = field(default="checkpoints/codec.safetensors", metadata={"help": "safetensors file to write"})
    patch: int = field(default=4, metadata={"help": "pixels, side of a patch"})
    channels: int = field(default=16, metadata={"help": "latent channels"})
    ridge: float = field(default=1e-5, metadata={"help": "regularisation of the decoder, relative to the variance"})


@torch.no_grad()
def fit_codec(pictures: list[Tensor], config: CodecConfig, ridge: float = 1e-5) -> LinearCodec:
    """Principal components for the encoder, least squares for the decoder.

    Args:
        pictures: (1, 3, H, W) in 0..1 each, sides multiples of the patch.
        ridge: added to the diagonal of the decoder's normal equations, relative to its mean.
    Returns: the codec with `scale` set so that scaled latents have a mean square of one.
    """
    patches = [pixel_unshuffle(2 * p.double() - 1, config.patch) for p in pictures]
    flat = torch.cat([p.flatten(2)[0] for p in patches], dim=1)  # (3 p^2, patches)
    mean = flat.mean(dim=1, keepdim=True)
    variances, vectors = torch.linalg.eigh((flat - mean) @ (flat - mean).T / flat.shape[1])
    basis = vectors[:, -config.latent_channels :].flip(1).T  # (C, 3 p^2), loudest component first
    kept = variances[-config.latent_channels :].sum()

    side = config.neighbourhood
    unknowns = config.latent_channels * side**2 + 1
    gram, moment = torch.zeros(unknowns, unknowns).double(), torch.zeros(unknowns, flat.shape[0]).double()
    for patch in patches:
        height, width = patch.shape[-2:]
        code = (basis @ (patch.flatten(2)[0] - mean)).reshape(1, -1, height, width)
        around = unfold(code, side)[0]  # (C side^2, inner patches)
        around = torch.cat([around, torch.ones_like(around[:1])])
        margin = side // 2
        inner = patch[0, :, margin : height - margin, margin : width - margin].flatten(1)
        gram += around @ around.T
        moment += around @ inner.T
    gram.diagonal()[:-1].add_(ridge * gram.diagonal()[:-1].mean())
    solution = torch.linalg.solve(gram, moment).T  # (3 p^2, unknowns)

    scale = float((config.latent_channels / kept).sqrt())
    codec = LinearCodec(CodecConfig(config.patch, config.latent_channels, side, 0.0, scale))
    codec.encoder.weight.copy_(basis[:, :, None, None])
    codec.encoder.bias.copy_(-(basis @ mean)[:, 0])
    codec.decoder.weight.copy_(solution[:, :-1].reshape(codec.decoder.weight.shape))
    codec.decoder.bias.copy_(solution[:, -1])
    return codec.eval()


def main(argv: list[str] | None = None) -> None:
    config = parse(FitCodecConfig, argv)
    files = find_images(config.photographs)
    pictures = [_crop_to_multiple(read_image(f)[:, :3], config.patch) for f in files]
    codec = fit_codec(pictures, CodecConfig(config.patch, config.channels), config.ridge)
    error = sum(float((codec.decode(codec.encode(p)) - p).square().mean().log10()) for p in pictures) / len(pictures)
    log.info("%d photographs, %.2f dB mean PSNR, scale %.4f", len(files), -10 * error, codec.scale)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    codec.save(config.output, training={"photographs": len(files), "train_psnr_db": round(-10 * error, 2)})


def _crop_to_multiple(picture: Tensor, multiple: int) -> Tensor:
    height, width = (side - side % multiple for side in picture.shape[-2:])
    return picture[..., :height, :width]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
