"""The order of the data and every random draw as a pure function of (seed, step, micro step, process).

Training that is killed and resumed sees the same samples and draws the same noise as one that was never killed: nothing
is kept in the state of a sampler, a worker or a global generator. Sample ``i`` of an endless stream is made from a
generator seeded by ``(seed, i)``; step ``s`` takes samples ``s * global_batch`` to ``(s + 1) * global_batch - 1``.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader


class Samples(Protocol):
    """A dataset: ``[i]`` gives a dict of tensors, numbers and strings for any i >= 0 (endless), or below ``len()``."""

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def seed_of(*parts: int | str) -> int:
    """A seed in 0 .. 2**63 - 1 that depends on all `parts` and on their order (BLAKE2 of their text)."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_of(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `seed_of` (parts)."""
    return torch.Generator().manual_seed(seed_of(*parts))


class Shuffled:
    """An endless stream over a finite dataset: every epoch goes through all of it in an order drawn from (seed, epoch).

    Args:
        dataset: has ``len() > 0`` and ``[i]``.
        seed: of the orders.
    """

    def __init__(self, dataset: Any, seed: int):
        if len(dataset) == 0:
            raise ValueError("The dataset is empty: nothing to train on.")
        self.dataset, self.seed = dataset, seed
        self._epoch, self._order = -1, torch.empty(0)
        self.collate = getattr(dataset, "collate", None)

    def __getitem__(self, index: int) -> Any:
        epoch, position = divmod(index, len(self.dataset))
        if epoch != self._epoch:
            order = torch.randperm(len(self.dataset), generator=generator_of(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, order
        return self.dataset[int(self._order[position])]


class BatchOrder:
    """Lists of sample indices, one a micro step, for one process; starts at any step.

    Args:
        start, stop: first step and the step to stop before.
        batch_size: samples a process and micro step.
        accumulation: micro steps a step.
        rank, world: this process and how many there are.
    """

    def __init__(self, start: int, stop: int, batch_size: int, accumulation: int = 1, rank: int = 0, world: int = 1):
        self.start, self.stop, self.batch_size, self.accumulation = start, stop, batch_size, accumulation
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for micro in range(self.start * self.accumulation, self.stop * self.accumulation):
            first = (micro * self.world + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


def loader(dataset: Samples, order: BatchOrder, seed: int, num_workers: int = 0,
           pin_memory: bool = False) -> DataLoader:
    """A DataLoader over `order`; a dataset with a length is shuffled endlessly (`Shuffled`).

    A dataset may bring its own ``collate(list of items) -> batch``.
    """
    stream = Shuffled(dataset, seed) if hasattr(dataset, "__len__") else dataset
    # the loader draws a base seed for its workers, which nothing here uses: a generator of its own keeps the global one
    return DataLoader(stream, batch_sampler=order, num_workers=num_workers, pin_memory=pin_memory,
                      collate_fn=getattr(stream, "collate", None), worker_init_fn=start_worker,
                      generator=torch.Generator().manual_seed(0), prefetch_factor=4 if num_workers else None)


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors in a (nested) batch moved to `device`; strings and numbers as they are."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def start_worker(_: int) -> None:
    """One thread a worker; Ctrl-C and SIGTERM are the training process's to answer (the loader ends its workers)."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
