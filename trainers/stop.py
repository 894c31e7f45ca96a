"""Stopping between two steps: SIGTERM and Ctrl-C, on one process or on several."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C are noted in the list instead of striking in the middle of a step; a second one strikes."""
    stop: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _: Any) -> None:
        stop.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def agreed(stop: list[int], accelerator: Accelerator) -> bool:
    """Whether any process was told to stop; all of them answer alike, at the cost of one number exchanged."""
    if accelerator.num_processes > 1:
        told = int(accelerator.gather(torch.tensor([max(stop, default=0)], device=accelerator.device)).max())
        if told and not stop:
            stop.append(told)
    return bool(stop)
