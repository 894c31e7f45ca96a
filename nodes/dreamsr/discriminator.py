"""The discriminator of the RA-LoRA's training (not in the paper: which; Isola et al. 2017 with Miyato et al. 2018)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Scores how real every patch of a picture looks: 4 x 4 convolutions of stride 2, all with spectral norm.

    The receptive field of a score is 70 px with three layers of stride 2, as in pix2pix.
    """

    def __init__(self, width: int = 64, layers: int = 3, channels: int = 3):
        """
        Args:
            width: channels after the first convolution; doubled by each further one up to 8 x.
            layers: convolutions of stride 2.
        """
        super().__init__()
        widths = [channels, *(width * 2 ** min(i, 3) for i in range(layers + 1))]
        stages: list[nn.Module] = []
        for i in range(layers + 1):
            convolution = nn.Conv2d(widths[i], widths[i + 1], 4, stride=2 if i < layers else 1, padding=1)
            stages += [spectral_norm(convolution), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*stages, spectral_norm(nn.Conv2d(widths[-1], 1, 4, padding=1)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in 0..1, H and W at least 32 -> scores (B, 1, H/8 - 2, W/8 - 2), large = real."""
        return self.layers(2 * pixels - 1)
