"""Checkpoints of a running training: folders that are complete or absent.

``<output_dir>/checkpoints/step-00001000/`` holds ``state.pt`` (trained parameters, optimizer, EMA, step, open log
window), ``export/`` (what `save_fn` writes) and ``complete.json``. A folder is written under a hidden name and renamed
when all of it is on disk, so a process that is killed at any moment leaves the older checkpoints as they were.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8,})")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoint folders of a training, oldest first."""
    folders = (Path(output_dir) / "checkpoints").glob("step-*")
    return sorted((f for f in folders if _NAME.fullmatch(f.name) and (f / "complete.json").is_file()),
                  key=lambda f: int(_NAME.fullmatch(f.name)[1]))


def find_checkpoint(output_dir: str | Path, resume: str | None) -> Path | None:
    """The checkpoint to continue from.

    Args:
        output_dir: of the training.
        resume: None = start anew; "latest" = the newest complete one, or none if there is none yet; else a folder.
    Raises:
        ValueError: start anew where a training already lies.
        FileNotFoundError: the named folder is no complete checkpoint.
    """
    existing = checkpoints(output_dir)
    if resume is None:
        if existing:
            raise ValueError(f"{output_dir} already holds a training up to {existing[-1].name}. Continue it with "
                             "--resume latest, or choose another --output_dir.")
        return None
    if resume == "latest":
        if not existing:
            log.info("no checkpoint in %s yet: starting at step 0", output_dir)
        return existing[-1] if existing else None
    folder = Path(resume)
    if not (folder / "complete.json").is_file():
        there = ", ".join(f.name for f in existing) or "none"
        raise FileNotFoundError(f"{folder} is not a complete checkpoint (no complete.json). Complete ones in "
                                f"{output_dir}: {there}.")
    return folder


def write_checkpoint(output_dir: str | Path, step: int, state: dict[str, Any],
                     export: Callable[[Path], None] | None = None) -> Path:
    """Write one checkpoint folder atomically.

    Args:
        output_dir: of the training.
        step: steps done.
        state: tensors, numbers, strings and containers of them only: it is read back with ``weights_only=True``.
        export: writes the weights for use into the folder it is given.
    Returns: the folder.
    """
    parent = Path(output_dir) / "checkpoints"
    target = parent / f"step-{step:08d}"
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    temporary = parent / f".writing-{target.name}-{os.getpid()}"
    (temporary / "export").mkdir(parents=True)
    torch.save(state, temporary / "state.pt")
    if export is not None:
        export(temporary / "export")
    (temporary / "complete.json").write_text(json.dumps({"step": step}), encoding="utf-8")
    for path in (*temporary.rglob("*"), temporary):
        _sync(path)
    replaced = parent / f".replaced-{target.name}"
    if target.exists():
        os.rename(target, replaced)
    os.rename(temporary, target)
    _sync(parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    return target


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The `state` of a checkpoint folder, on the CPU."""
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def drop_old(output_dir: str | Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` complete checkpoints; 0 keeps all."""
    for folder in checkpoints(output_dir)[:-keep_last] if keep_last > 0 else []:
        dropped = folder.with_name(f".dropped-{folder.name}")
        os.rename(folder, dropped)  # gone at once: deleting its files takes time, in which a process can be killed
        shutil.rmtree(dropped)


def _sweep(parent: Path) -> None:
    """Clear what killed processes left: half-written and half-deleted folders; a replaced one goes back to its name."""
    for folder in parent.glob(".replaced-*"):
        original = folder.with_name(folder.name.removeprefix(".replaced-"))
        if not original.exists():
            os.rename(folder, original)
    for pattern in (".writing-*", ".replaced-*", ".dropped-*"):
        for folder in parent.glob(pattern):
            shutil.rmtree(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
