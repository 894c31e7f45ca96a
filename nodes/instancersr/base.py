"""How a class-conditional DiT becomes the start of an InstanceRSR training (section 2.1)."""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from ..common import checkpoints
from .config import InstanceRSRConfig

BASE_PAGE = "https://huggingface.co/facebook/DiT-XL-2-512"


def widened(base: dict[str, Tensor], config: InstanceRSRConfig) -> dict[str, Tensor]:
    """A DiT's weights for the joint latent: what is new in its first and last layer is zero.

    The output layer writes [eps, var] at every position of a patch, so that [eps_x, eps_m, var_x, var_m] interleaves.
    """
    state = dict(base)
    if not config.ablations.mask_modelling:
        return state
    patch = state["pos_embed.proj.weight"]
    state["pos_embed.proj.weight"] = torch.cat([patch, torch.zeros_like(patch)], dim=1)
    outputs = 2 if config.learned_variance else 1
    for name in ("proj_out_2.weight", "proj_out_2.bias"):
        rows = rearrange(state[name], "(p o c) ... -> p o c ...", o=outputs, c=config.in_channels)
        rows = torch.stack([rows, torch.zeros_like(rows)], dim=2)
        state[name] = rearrange(rows, "p o half c ... -> (p o half c) ...")
    return state


def control_copies(base: dict[str, Tensor], config: InstanceRSRConfig) -> dict[str, Tensor]:
    """The branch's weights: copies of the base's patch embedding and first blocks, projections of zeros."""
    kept = [f"transformer_blocks.{i}." for i in range(config.control_blocks)]
    state = {f"control.{name}": base[name].clone() for name in ("pos_embed.proj.weight", "pos_embed.proj.bias")}
    for name, value in base.items():
        if name.startswith(tuple(kept)):
            state[f"control.{name.removeprefix('transformer_')}"] = value.clone()
    like = base["proj_out_1.weight"]
    for i in range(config.control_blocks):
        state[f"control.projections.{i}.weight"] = like.new_zeros(config.width, config.width)
        state[f"control.projections.{i}.bias"] = like.new_zeros(config.width)
    return state


def find_base(folder: str | Path) -> Path:
    """The folder of the base's transformer: of a pipeline's folder its `transformer`.

    Raises: FileNotFoundError if nothing is there.
    """
    folder = Path(folder).expanduser()
    inner = folder / "transformer"
    return inner if inner.is_dir() else checkpoints.require_file(folder, "the DiT", str(folder.parent), BASE_PAGE)
