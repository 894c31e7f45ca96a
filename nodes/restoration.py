"""`fourfold.restore`: one call for every method."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from .common.captions import load_captioner
from .common.devices import find_device
from .common.tiny import is_tiny

METHODS = ("dit4sr", "instantir")
EMBEDDED = "embedded"  # the captioner that each method brings
FULL_SIZE = {  # what `model` and `base` name at full size
    "dit4sr": ("dit4sr_q, dit4sr_f or dit4sr_r1 from https://huggingface.co/acceptee/DiT4SR",
               "Stable Diffusion 3.5 medium from https://huggingface.co/stabilityai/stable-diffusion-3.5-medium"),
    "instantir": ("models from https://huggingface.co/InstantX/InstantIR, with dinov2-large from "
                  "https://huggingface.co/facebook/dinov2-large in it",
                  "Stable Diffusion XL from https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0"),
}


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
        device: "cpu", "cuda", "cuda:1", "mps" or "xpu"; None = a GPU where there is one.
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
    check_model(method, model, base)
    place = find_device(device)
    key = (method, model, base, device, captioner)
    if key not in _loaded:
        _loaded.clear()  # before the next one is loaded: two full-size systems rarely fit
        describe = None if captioner == EMBEDDED else load_captioner(captioner, device=place)
        load = import_module(f".{method}.restore", __package__).load_system
        _loaded[key] = load(model, base=base, device=place, captioner=describe)
    return _loaded[key]


def check_model(method: str, model: str, base: str | None) -> None:
    """Looks, without loading anything, whether `model` and `base` can be what they should be.

    Raises: FileNotFoundError for a model that is neither "tiny" nor there; ValueError for a base beside tiny weights.
    """
    if is_tiny(model):
        if base is not None:
            raise ValueError(f"the base is {base}, but tiny weights (the model is {model!r}) bring their own VAE and "
                             "text encoder: leave the base out, or give the folder of full-size weights as model.")
    elif not Path(model).expanduser().exists():
        weights, base_model = FULL_SIZE[method]
        raise FileNotFoundError(
            f"the model is {model!r}, but there is no such file or folder. Give 'tiny', the weights that are shipped, "
            f"or for full size the folder of {weights}, and as base the folder of {base_model}. Nothing is downloaded "
            "by itself.")
