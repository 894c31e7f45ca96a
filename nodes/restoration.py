"""`fourfold.restore`: one call for every method."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from .common.captions import load_captioner
from .common.devices import best_device

METHODS = ("dit4sr",)
EMBEDDED = "embedded"  # the captioner that each method brings


def restore(
    lr: Tensor,
    method: str = "dit4sr",
    model: str | Path = "tiny",
    scale: float = 4,
    seed: int = 0,
    steps: int | None = None,
    prompt: str | list[str] | None = None,
    device: str | None = None,
    color_fix: str | None = None,
    on_step: Any = None,
    base: str | Path | None = None,
    captioner: str | Path = EMBEDDED,
    **options: Any,
) -> Tensor:
    """Restores and enlarges pictures with one of the methods.

    Args:
        lr: (B, C, H, W), float in 0..1; C = 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA); any size.
        method: one of METHODS.
        model: "tiny", the checkpoint shipped with the suite, or a folder of the method's own weights.
        scale: factor of both sides.
        seed: of the noise; equal seeds give equal pictures.
        steps, color_fix: None = the paper's.
        prompt: what the picture shows, one text or one for each picture; None = captioned.
        device: "cpu", "cuda", "mps", ...; None = a GPU where there is one.
        on_step: on_step(i, n, x, x0) after each step; may raise to stop.
        base: folder of the base model, where the method's weights need one.
        captioner: "embedded", the method's own, which measures; or the folder of an image-to-text model of
            transformers, which is put on the same device.
        options: what the method's own `restore` takes beyond this.
    Returns: (B, C, H*scale, W*scale), float32 in 0..1, on the CPU.
    Raises: ValueError, FileNotFoundError and the errors of `common.errors`, each with what to do.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}; choose one of {', '.join(METHODS)}.")
    system = load_system(method, str(model), None if base is None else str(base), device, str(captioner))
    run = import_module(f".{method}.restore", __package__).restore
    return run(
        lr, system, scale=scale, seed=seed, steps=steps, prompt=prompt, color_fix=color_fix, on_step=on_step, **options
    )


_loaded: dict[tuple, Any] = {}  # at most one system


def load_system(method: str, model: str, base: str | None, device: str | None, captioner: str = EMBEDDED) -> Any:
    """The loaded system of a method; the last one is kept, so that a loop over pictures loads it once."""
    key = (method, model, base, device, captioner)
    if key not in _loaded:
        _loaded.clear()  # before the next one is loaded: two full-size systems rarely fit
        describe = None if captioner == EMBEDDED else load_captioner(captioner, device=device or best_device())
        load = import_module(f".{method}.restore", __package__).load_system
        _loaded[key] = load(model, base=base, device=device, captioner=describe)
    return _loaded[key]
