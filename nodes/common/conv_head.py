"""A small convolutional head for the tiny transformers, which write a picture token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvHead(nn.Module):
    """Corrects an unpatchified output over the borders of the tokens that wrote it.

    not in the papers: a network of a few million parameters, trained for an hour, leaves steps between its tokens that
    show as a weave in skies. Three 3 x 3 convolutions see the neighbouring tokens and the LR latent. The last starts at
    zero, so that a network without the head goes on where it was.
    """

    def __init__(self, channels: int, context_channels: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels + context_channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )
        self.init_zero()

    def init_zero(self) -> None:
        """Makes the head the identity."""
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, output: Tensor, context: Tensor) -> Tensor:
        """Output (B, channels, h, w) and context (B, context_channels, h, w), the LR latent -> the corrected output."""
        return output + self.layers(torch.cat([output, context], dim=1))
