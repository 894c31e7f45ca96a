"""Exponential moving average of the trained parameters, kept in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def ema_decay_at(decay: float, step: int) -> float:
    """min(decay, (1 + step) / (10 + step)): short at first, so that the average forgets the initial weights."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """average <- d * average + (1 - d) * parameter after every step, d = `ema_decay_at` (decay, step).

    Args:
        parameters: (name, parameter) pairs; the average starts as a float32 copy on the same device.
        decay: in 0..1; 0 makes the average the parameters themselves.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float):
        self.decay = decay
        self.parameters = dict(parameters)
        self.average = {name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters after step `step` (0 for the first) into the average."""
        weight = 1.0 - ema_decay_at(self.decay, step)
        averages = list(self.average.values())
        torch._foreach_lerp_(averages, [p.detach().float() for p in self.parameters.values()], weight)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside the block the parameters hold the average (cast to their dtype); afterwards their own values."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._write(self.average)
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def load(self, average: Mapping[str, Tensor]) -> None:
        """Continue from a stored average (names and shapes as given to the constructor)."""
        for name, value in self.average.items():
            value.copy_(average[name])

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
