"""Latents and prompt embeddings computed once, kept on disk.

A cache lies in ``<folder>/<identity>/``: a folder of its own for every encoder and every set of settings, so that
nothing made by another encoder is ever read. It is a set of safetensors shards, each written atomically and complete in
itself. Their headers are the index: several processes can fill one cache, and a killed one loses an unfinished shard.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..nodes.common.checkpoints import atomic_path, read_header
from .order import start_worker

log = logging.getLogger(__name__)
_OPEN_SHARDS = 64  # shards a process keeps open
_SAMPLED = 64  # values of a tensor that count towards a fingerprint


def identity_of(*parts: Any) -> str:
    """16 hexadecimal digits that depend on all `parts` (by their text) and on their order."""
    return hashlib.blake2b(json.dumps([str(part) for part in parts]).encode(), digest_size=8).hexdigest()


def fingerprint(module: nn.Module) -> str:
    """Identity of a network's weights: names, shapes and up to 64 evenly spread values of every tensor."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().flatten()
        chosen = flat[torch.linspace(0, max(len(flat) - 1, 0), min(_SAMPLED, len(flat))).long().to(flat.device)]
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(chosen.double().cpu().numpy().tobytes())
    return digest.hexdigest()


class TensorCache:
    """Key -> dict of tensors, on disk.

    Args:
        folder: of all caches.
        identity: of what made the tensors (`identity_of` encoder fingerprints and settings); a folder's name.
        shard_items: items a file.
    """

    def __init__(self, folder: str | Path, identity: str, shard_items: int = 256):
        self.folder, self.shard_items = Path(folder) / identity, shard_items
        self._index: dict[str, Path] = {}
        self._names: dict[str, list[str]] = {}
        self._known: set[Path] = set()
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._open: OrderedDict[tuple[int, Path], Any] = OrderedDict()
        self.reload()

    def __contains__(self, key: str) -> bool:
        return key in self._index or key in self._pending

    def __len__(self) -> int:
        return len(self._index) + len(self._pending)

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        """Tensors of `key` on the CPU, in the dtype they were put in. Raises KeyError if it is not there."""
        if key in self._pending:
            return dict(self._pending[key])
        if key not in self._index:
            raise KeyError(f"{key} is not in the cache {self.folder}; fill it first (or reload() after others did).")
        shard = self._shard(self._index[key])
        return {name: shard.get_tensor(f"{key}/{name}") for name in self._names[key]}

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Add an item (copied to the CPU); it reaches the disk with its shard, at the latest at `flush`."""
        if "/" in key:
            raise ValueError(f"A key must not contain a slash: {key!r}.")
        if key not in self:
            self._pending[key] = {name: value.detach().to("cpu", copy=True).contiguous()
                                  for name, value in tensors.items()}
        if len(self._pending) >= self.shard_items:
            self.flush()

    def flush(self) -> None:
        """Write the pending items as one shard, atomically."""
        if not self._pending:
            return
        named = hashlib.blake2b("".join(self._pending).encode(), digest_size=8).hexdigest()
        path = self.folder / f"{named}.safetensors"
        with atomic_path(path) as temporary:
            save_file({f"{key}/{name}": value for key, item in self._pending.items() for name, value in item.items()},
                      temporary)
        self._pending.clear()
        self.reload()

    def reload(self) -> None:
        """Take note of shards that other processes have written since."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._known or path.name.startswith("."):
                continue
            for full in read_header(path).tensors:
                key, name = full.split("/", 1)
                if self._index.setdefault(key, path) == path:
                    self._names.setdefault(key, []).append(name)
            self._known.add(path)

    def _shard(self, path: Path) -> Any:
        handle = (os.getpid(), path)  # a forked data process opens its own
        if handle not in self._open:
            self._open[handle] = safe_open(path, framework="pt")
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(handle)
        return self._open[handle]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


class CachedItems:
    """A dataset with a length over a cache: item i is the item of keys[i], with ``index`` in addition."""

    def __init__(self, cache: TensorCache, keys: Sequence[str]):
        missing = [key for key in keys if key not in cache]
        if missing:
            raise ValueError(f"{len(missing)} of {len(keys)} items are not in the cache {cache.folder}, the first is "
                             f"{missing[0]}. Fill it first.")
        self.cache, self.keys = cache, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.cache[self.keys[index]], "index": index}


def fill(cache: TensorCache, dataset: Any, keys: Sequence[str], encode: Callable[[Any], list[dict[str, Tensor]]], *,
         batch_size: int = 8, num_workers: int = 0, rank: int = 0, world: int = 1) -> int:
    """Encode what is missing: item i of `dataset` becomes the item keys[i] of `cache`.

    Args:
        cache: filled in place and flushed. On several processes call `reload` once all are done.
        dataset: ``[i]`` for every i below ``len(keys)``.
        keys: one an item, e.g. from the item's content or from its index and the dataset's identity.
        encode: a collated batch -> one dict of tensors a sample; runs without gradients.
        batch_size, num_workers: of the loader.
        rank, world: this process takes every `world`-th of the missing items.
    Returns: how many items this process encoded.
    """
    missing = [i for i, key in enumerate(keys) if key not in cache][rank::world]
    batches = [missing[i:i + batch_size] for i in range(0, len(missing), batch_size)]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, worker_init_fn=start_worker,
                        collate_fn=getattr(dataset, "collate", None), generator=torch.Generator().manual_seed(0))
    for done, (indices, batch) in enumerate(zip(batches, loader, strict=True)):
        with torch.no_grad():
            items = encode(batch)
        for index, item in zip(indices, items, strict=True):
            cache.put(keys[index], item)
        if done % 50 == 0:
            log.info("cached %d of %d items in %s", (done + 1) * batch_size, len(missing), cache.folder)
    cache.flush()
    return len(missing)
