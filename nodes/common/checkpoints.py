"""Checkpoints that describe themselves: atomic writing, strict keys, wrong and missing files named.

A file that this project writes is a safetensors file whose metadata holds, as strings:

- ``fourfold.format``: version of this list (`FORMAT_VERSION`);
- ``fourfold.method``: what the weights are, e.g. ``dit4sr`` or ``codec`` (see `families.FAMILIES`);
- ``fourfold.config``: JSON, the fields of the config dataclass that builds the module;
- ``fourfold.step``: training steps behind the weights;
- ``fourfold.licence``: licence of the weights;
- ``fourfold.training``: JSON, summary of the training (data, losses, hours), ``{}`` if unknown.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import MismatchedKeysError
from .families import FAMILIES, describe_family, detect_family, require_family
from .weight_files import FORMAT_VERSION, Header, folder_files, load_state, read_header, shorten

__all__ = ["DEFAULT_LICENCE", "FAMILIES", "FORMAT_VERSION", "Header", "atomic_path", "describe_family", "detect_family",
           "folder_files", "load_state", "load_strict", "read_header", "require_family", "require_file",
           "save_checkpoint", "shorten"]

DEFAULT_LICENCE = "Apache-2.0"
@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name next to `path`; on success flush it to disk and rename it to `path`.

    A reader sees the old file or the new one, never half of one; on any error the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask grants; safetensors writes files for the owner alone
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: str | Path, state: Mapping[str, Tensor], *, method: str, config: dict, step: int = 0,
                    licence: str = DEFAULT_LICENCE, training: dict | None = None,
                    dtype: torch.dtype | None = None) -> None:
    """Write `state` and its description to one safetensors file, atomically.

    Args:
        path: the file; its folder is made if missing.
        state: name -> tensor, any device; tensors that share memory are written separately.
        method: what the weights are (`families.FAMILIES`).
        config: JSON-able fields that build the module.
        step: training steps behind the weights.
        licence: SPDX name or a sentence.
        training: JSON-able summary of the training.
        dtype: floating-point tensors are stored in it; None keeps theirs.
    Raises: ValueError if a floating-point tensor is not finite after the cast (NaN, or too large for `dtype`).
    """
    tensors = {}
    for name, value in state.items():
        value = value.detach()
        if value.is_floating_point():
            value = value.to(dtype or value.dtype)
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} holds NaN or infinity as {value.dtype}; {path} was not written. "
                                 "Use an earlier checkpoint, or a dtype with a larger range (bfloat16, float32).")
        tensors[name] = value.to("cpu", copy=True).contiguous()
    metadata = {"format": "pt", "fourfold.format": str(FORMAT_VERSION), "fourfold.method": method,
                "fourfold.config": json.dumps(config), "fourfold.step": str(step), "fourfold.licence": licence,
                "fourfold.training": json.dumps(training or {})}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load `state` into `module`; every key and every shape must match.

    A module on the meta device takes the tensors as they are (dtype of the file); any other keeps its own dtype.

    Raises: MismatchedKeysError naming `source` and the missing, unexpected and wrongly shaped keys.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [f"{name} (file {tuple(state[name].shape)}, model {tuple(own[name].shape)})" for name in own
              if name in state and state[name].shape != own[name].shape]
    if missing or unexpected or shapes:
        found = "; ".join(f"{len(keys)} {kind}: {shorten(keys)}" for kind, keys in
                          (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)) if keys)
        raise MismatchedKeysError(f"{source} does not fit {type(module).__name__}: {found}. "
                                  "Choose the file that was made for this model, or the config that it was made with.")
    module.load_state_dict(dict(state), strict=True, assign=any(t.is_meta for t in own.values()))


def require_file(path: str | Path, what: str, where: str, page: str) -> Path:
    """`path` if something is there; otherwise say what is missing, where it belongs and where it comes from.

    Args:
        path: file or folder that is needed.
        what: what it is, e.g. "the DiT4SR transformer".
        where: the folder it belongs in, in the user's words, e.g. "ComfyUI/models/diffusion_models".
        page: the page it is downloaded from.
    Raises: FileNotFoundError.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{what} is missing: {path} does not exist. Download {path.name} from {page} and put "
                                f"it into {where}. Nothing is downloaded by itself.")
    return path
