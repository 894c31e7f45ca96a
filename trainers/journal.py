"""What a training writes down: log.jsonl always, TensorBoard where it is installed."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Window:
    """Values since the last log line: name -> list; means are exactly rounded, whatever the order they came in."""

    def __init__(self, values: dict[str, list[float]] | None = None):
        self.values = values or {}

    def add(self, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self.values.setdefault(name, []).append(float(value))

    def merge(self, others: list[dict[str, list[float]]]) -> None:
        """Append the windows of other processes."""
        for other in others:
            for name, values in other.items():
                self.values.setdefault(name, []).extend(values)

    def means(self) -> dict[str, float]:
        return {name: math.fsum(values) / len(values) for name, values in self.values.items()}


class Journal:
    """Writes one line of numbers a log interval.

    Args:
        output_dir: ``log.jsonl`` and ``tensorboard/`` are made in it.
        start: the step the training starts at; lines of an earlier run beyond it are dropped.
        tensorboard: write TensorBoard events too; without the package a warning says how to install it.
    """

    def __init__(self, output_dir: Path, start: int, tensorboard: bool):
        output_dir.mkdir(parents=True, exist_ok=True)
        self._path = output_dir / "log.jsonl"
        self._keep(self._path, start)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115  closed in close()
        self._writer = self._tensorboard(output_dir, start) if tensorboard else None

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

    def finish(self, numbers: dict[str, Any]) -> None:
        """Write ``metrics.json``: steps, seconds of training over all runs, means of the last log interval."""
        self._path.with_name("metrics.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    @staticmethod
    def _keep(path: Path, start: int) -> None:
        """Drop lines after step `start`, and a last line that a killed process left unfinished."""
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError):
                log.warning("dropped an unfinished line of %s: %s", path, line[:80])
                continue
            if step <= start:
                kept.append(line + "\n")
        temporary = path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)

    @staticmethod
    def _tensorboard(output_dir: Path, start: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.warning("TensorBoard is not installed: numbers go to %s only. Install it with "
                        "`pip install tensorboard`, or pass --no_tensorboard.", output_dir / "log.jsonl")
            return None
        return SummaryWriter(output_dir / "tensorboard", purge_step=start + 1 if start else None)


class Clock:
    """Samples a second and time left, over the steps since the last reading."""

    def __init__(self) -> None:
        self.since, self.samples, self.steps = time.monotonic(), 0, 0

    def count(self, samples: int) -> None:
        self.samples += samples
        self.steps += 1

    def read(self, steps_left: int) -> tuple[float, float]:
        seconds = max(time.monotonic() - self.since, 1e-9)
        rate, left = self.samples / seconds, steps_left * seconds / max(self.steps, 1)
        self.since, self.samples, self.steps = time.monotonic(), 0, 0
        return rate, left
