"""DreamSR's files: the whole network in one, or the adapters alone beside the user's own FLUX.

A file of ours names the weights "base.<FLUX, diffusers' names>", "head.", "control." and
"ra_lora.<FLUX layer>.lora_A.weight", and says in its metadata's config which of the parts it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common import checkpoints
from ..common.errors import WrongFileError
from ..common.flux import PAGE as FLUX_PAGE
from ..common.flux import load_flux
from .config import FLUX_FIELDS, PARTS, DreamSRConfig

NETWORK_FILE = "dreamsr.safetensors"
_PREFIXES = {"base": ("base.", "head."), "control": ("control.",), "ra_lora": ("ra_lora.",)}
_TRAIN = "No DreamSR weights are published: train them with trainers/train_dreamsr.py, or choose the tiny model."


def find_network(path: str | Path) -> Path:
    """The file itself: of a folder `NETWORK_FILE` in it. Raises: FileNotFoundError."""
    path = Path(path).expanduser()
    file = path / NETWORK_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"the DreamSR network is missing: {file} does not exist. {_TRAIN}")
    return file


def read_config(path: str | Path) -> tuple[DreamSRConfig, tuple[str, ...]]:
    """Config of the network that a file of ours belongs to, and which of `PARTS` it holds.

    Raises: FileNotFoundError, CorruptCheckpointError; WrongFileError for any other file.
    """
    file = find_network(path)
    header = checkpoints.read_header(file)
    checkpoints.require_family(header, "dreamsr", file, _TRAIN)
    if not (content := header.config):
        raise WrongFileError(f"{file} has lost its description (the metadata of a safetensors file): another program "
                             "has written it. Choose the file as it was trained.")
    parts = tuple(content.pop("parts", PARTS))
    config = DreamSRConfig.from_json(content)
    return (config if "ra_lora" in parts else replace(config, lora_rank=0)), parts


def gather(
    path: str | Path, base: str | Path | None, ra_lora: str | Path | None, dtype: torch.dtype
) -> tuple[DreamSRConfig, dict[str, Tensor]]:
    """Config and weights (under the files' names) of a network, from all the files that it is made of.

    Args, Raises: see `DreamSR.from_pretrained`.
    """
    config, parts = read_config(path)
    file = find_network(path)
    if "control" not in parts:
        raise WrongFileError(f"{file} holds {' and '.join(parts)}, but no MM-ControlNet. Choose the file that does.")
    state = checkpoints.load_state(file)
    if ra_lora is not None:
        lora_config, lora_parts = read_config(ra_lora)
        if "ra_lora" not in lora_parts:
            raise WrongFileError(f"{ra_lora} holds no RA-LoRA, only {' and '.join(lora_parts)}. {_TRAIN}")
        _require_same_flux(config, {name: getattr(lora_config, name) for name in FLUX_FIELDS}, ra_lora)
        config = replace(config, lora_rank=lora_config.lora_rank, lora_alpha=lora_config.lora_alpha,
                         t_dr=lora_config.t_dr)
        state = _only(state, [part for part in parts if part != "ra_lora"])
        state |= _only(checkpoints.load_state(find_network(ra_lora)), ["ra_lora"])
    if "base" not in parts:
        if base is None:
            raise FileNotFoundError(
                f"{file} holds adapters alone; FLUX.1-dev is needed with it. Give its file or folder, from {FLUX_PAGE}."
            )
        sizes, flux = load_flux(base, dtype)
        _require_same_flux(config, sizes, base)
        state |= {f"base.{name}": value for name, value in flux.items()}
    for name in state:  # one by one: the whole network is never there in two precisions
        state[name] = state[name].to(dtype)
    return config, state


def save(path: str | Path, config: DreamSRConfig, weights: dict[str, Tensor], parts: Sequence[str], **summary: Any):
    """Writes the weights (under the files' names) of some parts; see `DreamSR.save_pretrained`."""
    if unknown := set(parts) - set(PARTS) or not parts:
        raise ValueError(f"the parts of a DreamSR file are {', '.join(PARTS)}; got {unknown or parts}.")
    held = [part for part in PARTS if part in parts and (part != "ra_lora" or config.lora_rank)]
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / NETWORK_FILE
    description = config.to_json() | {"parts": held}
    checkpoints.save_checkpoint(file, _only(weights, held), method="dreamsr", config=description, **summary)


def _only(state: dict[str, Tensor], parts: Sequence[str]) -> dict[str, Tensor]:
    prefixes = tuple(prefix for part in parts for prefix in _PREFIXES[part])
    return {name: value for name, value in state.items() if name.startswith(prefixes)}


def _require_same_flux(config: DreamSRConfig, sizes: dict[str, Any], source: str | Path) -> None:
    told = [name for name in FLUX_FIELDS if name != "axes_dims_rope"]  # which a single file cannot tell
    wrong = [f"{name} {sizes[name]} instead of {getattr(config, name)}" for name in told
             if sizes[name] != getattr(config, name)]
    if wrong:
        raise WrongFileError(
            f"{source} does not fit the MM-ControlNet: {', '.join(wrong)}. Use both with the FLUX that they were "
            f"trained on, FLUX.1-dev ({FLUX_PAGE})."
        )
