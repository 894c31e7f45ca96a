"""Solves the tiny family's linear codec from a folder of photographs; a minute on a laptop, no gradients.

    python -m fourfold.trainers.fit_codec --photographs FOLDER --output checkpoints/codec.safetensors
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle, unfold

from ..nodes.common.codec import CodecConfig, LinearCodec
from ..nodes.common.images import read_image
from .data import find_images
from .fit import option, parse

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitCodecConfig:
    """Solves the tiny family's linear codec."""

    photographs: str = option("photographs", "folder of photographs, searched recursively")
    output: str = option("checkpoints/codec.safetensors", "safetensors file to write")
    patch: int = option(4, "pixels, side of a patch")
    channels: int = option(16, "latent channels, at most 3 patch^2")
    ridge: float = option(1e-5, "regularisation of the decoder, relative to the variance, >= 0")


class Pictures:
    """RGB pictures of a folder, read anew each time: sides are cropped to multiples of the patch.

    Args:
        folder: searched recursively; pictures with a side below three patches are left out.
    """

    def __init__(self, folder: str | Path, patch: int):
        self.files, self.patch = find_images(folder), patch

    def __iter__(self) -> Iterator[Tensor]:
        """(1, 3, H, W) in 0..1 each."""
        for file in self.files:
            picture = read_image(file)
            picture = picture[:, :3] if picture.shape[1] > 2 else picture[:, :1].expand(-1, 3, -1, -1)
            height, width = (side - side % self.patch for side in picture.shape[-2:])
            if min(height, width) < 3 * self.patch:
                log.warning("%s is smaller than %d px and is left out", file, 3 * self.patch)
                continue
            yield picture[..., :height, :width]


@torch.no_grad()
def fit_codec(pictures: Iterable[Tensor], config: CodecConfig | None = None, ridge: float = 1e-5) -> LinearCodec:
    """Principal components for the encoder, least squares for the decoder.

    The encoder's rows are the eigenvectors of the covariance of patches with the largest eigenvalues; the decoder
    solves min |patch - D [codes of its neighbourhood, 1]|^2 + ridge |D|^2 over all pictures.

    Args:
        pictures: (1, 3, H, W) in 0..1 each, sides multiples of the patch, at least three patches; gone through twice.
        config: patch, channels and neighbourhood; its shift and scale are not used.
        ridge: added to the diagonal of the decoder's normal equations, relative to its mean.
    Returns: the codec with `scale` set so that scaled latents have a mean square of one.
    Raises: ValueError if there are no pictures.
    """
    config = config or CodecConfig()
    mean, covariance = _moments(pictures, config.patch)
    variances, vectors = torch.linalg.eigh(covariance)
    basis = vectors[:, -config.latent_channels :].flip(1).T  # (C, 3 p^2), loudest component first
    solution = _decoder(pictures, basis, mean, config, ridge)

    scale = float((config.latent_channels / variances[-config.latent_channels :].sum()).sqrt())
    codec = LinearCodec(CodecConfig(config.patch, config.latent_channels, config.neighbourhood, 0.0, scale))
    codec.encoder.weight.copy_(basis[:, :, None, None])
    codec.encoder.bias.copy_(-(basis @ mean))
    codec.decoder.weight.copy_(solution[:, :-1].reshape(codec.decoder.weight.shape))
    codec.decoder.bias.copy_(solution[:, -1])
    return codec.eval()


def _moments(pictures: Iterable[Tensor], patch: int) -> tuple[Tensor, Tensor]:
    """Mean (3 p^2,) and covariance of all patches, float64, values in -1..1."""
    count, total, squares = 0, 0, 0
    for picture in pictures:
        patches = _patches(picture, patch).flatten(1)
        count, total, squares = count + patches.shape[1], total + patches.sum(dim=1), squares + patches @ patches.T
    if count == 0:
        raise ValueError("there are no pictures to fit the codec to.")
    mean = total / count
    return mean, squares / count - torch.outer(mean, mean)


def _decoder(pictures: Iterable[Tensor], basis: Tensor, mean: Tensor, config: CodecConfig, ridge: float) -> Tensor:
    """The least-squares map from the codes around a patch, and one, to the patch: (3 p^2, C side^2 + 1), float64."""
    side = config.neighbourhood
    unknowns, margin = config.latent_channels * side**2 + 1, side // 2
    gram, moment = torch.zeros(unknowns, unknowns).double(), torch.zeros(unknowns, len(mean)).double()
    for picture in pictures:
        patches = _patches(picture, config.patch)
        codes = torch.einsum("ck,khw->chw", basis, patches - mean[:, None, None])
        around = unfold(codes[None], side)[0]  # (C side^2, inner patches)
        around = torch.cat([around, torch.ones_like(around[:1])])
        height, width = patches.shape[1:]
        gram += around @ around.T
        moment += around @ patches[:, margin : height - margin, margin : width - margin].flatten(1).T
    gram.diagonal()[:-1].add_(ridge * gram.diagonal()[:-1].mean())
    return torch.linalg.solve(gram, moment).T


def _patches(picture: Tensor, patch: int) -> Tensor:
    """(1, 3, H, W) in 0..1 -> (3 p^2, H/p, W/p), float64 in -1..1."""
    return pixel_unshuffle(2 * picture.double() - 1, patch)[0]


def main(argv: list[str] | None = None) -> LinearCodec:
    config = parse(FitCodecConfig, argv)
    pictures = Pictures(config.photographs, config.patch)
    codec = fit_codec(pictures, CodecConfig(config.patch, config.channels), config.ridge)
    errors = [(codec.decode(codec.encode(p)) - p).square().mean().clamp(min=1e-10) for p in pictures]
    psnr = float(-10 * torch.stack(errors).log10().mean())
    log.info("%d photographs, %.2f dB mean PSNR, scale %.4f", len(errors), psnr, codec.scale)
    codec.save(config.output, training={"photographs": len(errors), "train_psnr_db": round(psnr, 2)})
    return codec


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
