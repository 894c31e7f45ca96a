"""What is wrong with a command whatever the pictures are: found once, before anything is loaded."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from .options import sampling_settings


def check_options(options: argparse.Namespace, methods: Sequence[str]) -> None:
    """Looks at the device, the weights' place, the windows and the folder of the results.

    Args:
        options: parsed command line; options that the command does not have are not looked at.
        methods: names of the methods that the command is going to run.
    Raises: ValueError or FileNotFoundError, each with what to do.
    """
    from ..nodes.common.devices import find_device
    from ..nodes.restoration import check_model

    if options.out is not None:
        check_folder(options.out, "--out")
    find_device(options.device)
    for method in methods:
        check_model(method, options.model, options.base)
        check_names(method, sampling_settings(options))
        check_windows(method, options.model, sampling_settings(options))


def check_folder(folder: Path, option: str) -> None:
    """Whether files can be written into a folder, which is not made yet.

    Raises: ValueError that names the part of the path that is in the way.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{option} {folder} cannot be a folder: {existing} is a file. Choose another {option}.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {folder} cannot be written to: {existing} does not allow it. "
                         f"Choose another {option}.")


def check_names(method: str, settings: dict[str, Any]) -> None:
    """Whether the method has the given sampling options. Raises: ValueError that names those which it has not."""
    sampling = import_module(f"..nodes.{method}.config", __package__).Sampling
    known = {field.name for field in fields(sampling)} | {"prompt", "negative"}
    if unknown := [f"--{name.replace('_', '-')}" for name in settings if name not in known]:
        raise ValueError(f"{method} has no {' and no '.join(unknown)}: leave it out, or choose another --method.")


def check_windows(method: str, model: str, settings: dict[str, Any]) -> None:
    """Whether tile and overlap fit each other and the network, with the method's own values for what is not given.

    Raises: ValueError that names both numbers and where they are from.
    """
    from ..nodes.common.tiny import is_tiny

    presets = import_module(f"..nodes.{method}.config", __package__).PRESETS
    preset = presets["tiny" if is_tiny(model) else "full"]
    tile, overlap = (settings.get(name, getattr(preset.sampling, name)) for name in ("tile", "overlap"))
    if tile and overlap >= tile:
        given = [f"--{name} {value}" + ("" if name in settings else f" (what {method} takes if it is not given)")
                 for name, value in (("overlap", overlap), ("tile", tile))]
        raise ValueError(f"{given[0]} must be smaller than {given[1]}: lower the overlap or enlarge the tile.")
    patch = getattr(preset.network, "patch_size", 1)
    if tile % patch:
        raise ValueError(f"--tile {tile} must be a multiple of {patch}, the side of a token of {method}: "
                         f"{tile - tile % patch} or {tile - tile % patch + patch}, for example.")
