"""The ControlNet branch over the LR latent (InstanceRSR section 2.1; Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .config import InstanceRSRConfig
from .dit import PatchEmbedding, dit_block


class ControlBranch(nn.Module):
    """Copies of the backbone's patch embedding and first blocks see z_y; what each block makes of it goes through a
    linear projection, to be added to the backbone's features after the same block.

    not in the paper: how many blocks (a config field); and that the branch sees z_y alone, not the noisy latent.
    """

    def __init__(self, config: InstanceRSRConfig):
        super().__init__()
        self.pos_embed = PatchEmbedding(config, config.in_channels)
        self.blocks = nn.ModuleList(dit_block(config) for _ in range(config.control_blocks))
        self.projections = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.control_blocks))

    def init_projections(self) -> None:
        """Silences the branch: a new training on a loaded base begins as the base."""
        for projection in self.projections:
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, lr_latent: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        """What is added after each of the first blocks, (B, N, D) each.

        Args:
            lr_latent: z_y, (B, C, h, w).
            run: run(block, tokens) -> tokens, with the step's timestep and class.
        """
        tokens, added = self.pos_embed(lr_latent), []
        for block, projection in zip(self.blocks, self.projections, strict=True):
            tokens = run(block, tokens)
            added.append(projection(tokens))
        return added
