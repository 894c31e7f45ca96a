"""A method with its weights loaded, as one function from picture to picture."""

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .options import sampling_settings

if TYPE_CHECKING:
    from torch import Tensor

    OnStep = Callable[[int, int, Tensor, Tensor], None]


class Method:
    """Weights of one method and how it is to sample.

    Args:
        name: one of `METHODS`; its folder under nodes/ has `load_system` and `restore`.
        options: parsed command line with model and, if the command has them, captioner and sampling options.
    Attributes:
        used: of the last pictures, everything that they depend on beside weights and seed; see the method's `restore`.
    Raises: what loading raises: FileNotFoundError, ValueError or RuntimeError, naming the file.
    """

    def __init__(self, name: str, options: argparse.Namespace):
        from ..nodes.restoration import EMBEDDED, load_system

        self.name = name
        self.used: dict[str, Any] = {}
        self.settings: dict[str, Any] = sampling_settings(options)
        self._restore = import_module(f"..nodes.{name}.restore", __package__).restore
        captioner = getattr(options, "captioner", EMBEDDED)
        self._system = load_system(name, options.model, options.base, options.device, captioner)

    def __call__(self, lr: "Tensor", seed: int, scale: float = 4, size: tuple[int, int] | None = None,
                 on_step: "OnStep | None" = None) -> "Tensor":
        """Restores (B, C, h, w) in 0..1 to `scale` times its sides, or to exactly `size` (height, width).

        Picture b of the batch uses seed + b. Returns float32 in 0..1, on the CPU.
        """
        return self._restore(lr, self._system, scale=scale, size=size, seed=seed, on_step=on_step,
                             on_settings=self._note, **self.settings)

    def _note(self, used: dict[str, Any]) -> None:
        self.used = used
