"""What DiT4SR's training reads instead of photographs: latents and prompt embeddings, computed once and kept on disk.

A cache belongs to one set of photographs, settings and encoders; another set is refused, not mixed in. An interrupted
computation continues where it stopped. Afterwards the text encoders are not needed: the empty prompt and the prompts of
the sample pictures are in the cache as well (`StoredPrompts`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from ..nodes.common.checkpoints import atomic_path
from ..nodes.common.text import TextEmbedding
from .cache import CachedItems, TensorCache, fill, identity_of
from .order import to_device

log = logging.getLogger(__name__)
Encode = Callable[[dict[str, Any]], dict[str, Tensor]]
SHARD_ITEMS = 256  # crops a file; an interruption loses at most so many
_SETTINGS = "settings.json"


def open_cache(folder: str | Path, settings: dict[str, str]) -> TensorCache:
    """The cache of these settings in `folder`.

    Args:
        settings: all that the tensors depend on, by name.
    Raises: ValueError that names the settings that differ, if the folder holds a cache made with others.
    """
    folder, identity = Path(folder), identity_of(*sorted(settings.items()))
    if not (folder / identity / _SETTINGS).is_file():
        for other in sorted(folder.glob(f"*/{_SETTINGS}")):
            made = json.loads(other.read_text(encoding="utf-8"))
            names = sorted(name for name in {*made, *settings} if made.get(name) != settings.get(name))
            changes = "; ".join(f"{name} was {made.get(name)}, now {settings.get(name)}" for name in names)
            raise ValueError(f"--cache {folder} holds a cache made with another configuration: {changes}. Train with "
                             "the settings it was made with, choose another folder, or delete this one.")
        with atomic_path(folder / identity / _SETTINGS) as temporary:
            temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return TensorCache(folder, identity, SHARD_ITEMS)


def fill_crops(cache: TensorCache, photographs: Any, crops: int, encode: Encode, state: PartialState, *,
               batch_size: int = 8, num_workers: int = 0) -> CachedItems:
    """Computes what is missing of the first `crops` crops, each process its share, and waits for the others.

    Processes wait by looking at the folder, which all machines must see: a share may take hours, and what libraries
    offer for waiting gives up after minutes.

    Args:
        encode: collated batch on the device -> name -> (B, ...).
    Returns: the crops as a dataset.
    """
    def rows(batch: Any) -> list[dict[str, Tensor]]:
        encoded = encode(to_device(batch, state.device))
        return [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]

    keys = [f"crop-{index}" for index in range(crops)]
    fill(cache, photographs, keys, rows, batch_size=batch_size, num_workers=num_workers,
         rank=state.process_index, world=state.num_processes)
    _wait_for(cache, keys)
    return CachedItems(cache, keys)


class StoredPrompts(nn.Module):
    """Takes the place of the text encoders for prompts that are known beforehand.

    Args:
        cache: where they are kept.
        prompts: (prompt, number of T5's tokens) each.
        load_encoders: gives the text encoders, called only if a prompt is missing; `state`'s first process encodes.
    """

    def __init__(self, cache: TensorCache, prompts: Iterable[tuple[str, int]], load_encoders: Callable[[], Any],
                 state: PartialState):
        super().__init__()
        self._cache, wanted = cache, dict.fromkeys(prompts)
        missing = [prompt for prompt in wanted if _key(*prompt) not in cache]
        if missing and state.is_main_process:
            encoders = load_encoders()
            for prompt, length in missing:
                text = encoders.encode([prompt], t5_length=length)
                cache.put(_key(prompt, length), {"prompt_embeds": text.prompt_embeds, "pooled": text.pooled})
            cache.flush()
        _wait_for(cache, [_key(*prompt) for prompt in wanted])

    def encode(self, prompts: list[str], t5_length: int = 256) -> TextEmbedding:
        """As `SD3TextEncoder.encode`, on the CPU. Raises: KeyError for a prompt that was not named before."""
        items = [self._cache[_key(prompt, t5_length)] for prompt in prompts]
        return TextEmbedding(*(torch.cat([item[name] for item in items]) for name in ("prompt_embeds", "pooled")))


def files_identity(folders: Iterable[Path]) -> str:
    """Identity of the files in folders from their names, sizes, first and last 64 KB: weights need not be loaded."""
    digest = hashlib.blake2b(digest_size=8)
    for path in (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.parent.name}/{path.name} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(65536))
            file.seek(max(size - 65536, 0))
            digest.update(file.read())
    return digest.hexdigest()


def _key(prompt: str, length: int) -> str:
    return f"prompt-{length}-{hashlib.blake2b(prompt.encode(), digest_size=12).hexdigest()}"


def _wait_for(cache: TensorCache, keys: list[str]) -> None:
    """Until other processes have written all of `keys`."""
    cache.reload()
    waited = 0
    while missing := sum(key not in cache for key in keys):
        if waited % 60 == 0:
            log.info("waiting for other processes to write %d items of %s", missing, cache.folder)
        time.sleep(1)
        waited += 1
        cache.reload()
