"""The disk cache of latents and prompt embeddings."""

import multiprocessing

import pytest
import torch
from fourfold.nodes.common.errors import CorruptCheckpointError
from fourfold.trainers.cache import CachedItems, TensorCache, fill, fingerprint, identity_of
from torch import nn


class Squares:
    def __getitem__(self, index):
        return {"x": torch.tensor([float(index)])}


def encode(batch):
    return [{"square": x.square(), "half": (x / 2).half()} for x in batch["x"]]


KEYS = [f"item{i}" for i in range(10)]


def test_items_come_back_bit_for_bit_from_another_process_start(tmp_path):
    cache = TensorCache(tmp_path, "id", shard_items=4)
    assert fill(cache, Squares(), KEYS, encode, batch_size=3) == 10
    again = TensorCache(tmp_path, "id")
    assert len(again) == 10 and "item9" in again and "item10" not in again
    for i, key in enumerate(KEYS):
        item = again[key]
        assert torch.equal(item["square"], torch.tensor([float(i * i)])) and item["half"].dtype == torch.float16
    assert 3 <= len(list((tmp_path / "id").glob("*.safetensors"))) <= 4


def test_only_what_is_missing_is_encoded(tmp_path):
    fill(TensorCache(tmp_path, "id"), Squares(), KEYS[:6], encode)
    seen = []
    cache = TensorCache(tmp_path, "id")
    assert fill(cache, Squares(), KEYS, lambda batch: seen.extend(batch["x"].flatten().tolist()) or encode(batch)) == 4
    assert seen == [6, 7, 8, 9]


def test_processes_share_the_work_and_see_all_of_it_after_reload(tmp_path):
    caches = [TensorCache(tmp_path, "id") for _ in range(2)]
    done = [fill(cache, Squares(), KEYS, encode, rank=rank, world=2) for rank, cache in enumerate(caches)]
    assert done == [5, 5] and len(caches[0]) == 5
    caches[0].reload()
    assert len(caches[0]) == 10 and caches[0]["item7"]["square"].item() == 49


def test_another_identity_is_another_cache(tmp_path):
    fill(TensorCache(tmp_path, "one"), Squares(), KEYS, encode)
    assert len(TensorCache(tmp_path, "two")) == 0


def test_a_killed_writer_loses_an_unfinished_shard_only(tmp_path, monkeypatch):
    cache = TensorCache(tmp_path, "id", shard_items=2)
    for key in KEYS[:3]:
        cache.put(key, {"x": torch.ones(1)})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cache.flush()
    monkeypatch.undo()
    assert sorted(k for k in KEYS if k in TensorCache(tmp_path, "id")) == KEYS[:2]


def test_a_truncated_shard_is_named(tmp_path):
    fill(TensorCache(tmp_path, "id"), Squares(), KEYS, encode)
    (shard,) = (tmp_path / "id").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(CorruptCheckpointError, match=shard.name):
        TensorCache(tmp_path, "id")


def test_a_pending_item_is_readable_and_a_missing_one_is_an_error(tmp_path):
    cache = TensorCache(tmp_path, "id")
    source = torch.ones(2)
    cache.put("a", {"x": source})
    source.zero_()
    assert cache["a"]["x"].tolist() == [1, 1]
    with pytest.raises(KeyError, match="fill it first"):
        cache["b"]
    with pytest.raises(ValueError, match="slash"):
        cache.put("a/b", {})
    with pytest.raises(ValueError, match="1 of 2 items are not in the cache"):
        CachedItems(cache, ["a", "b"])


def _read(cache, queue):
    queue.put(cache["item3"]["square"].item())


def test_a_forked_process_reads_through_handles_of_its_own(tmp_path):
    cache = TensorCache(tmp_path, "id")
    fill(cache, Squares(), KEYS, encode)
    assert cache["item3"]["square"].item() == 9
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_read, args=(cache, queue))
    process.start()
    assert queue.get(timeout=60) == 9
    process.join()
    items = CachedItems(cache, KEYS)
    assert len(items) == 10 and items[4]["index"] == 4 and items[4]["square"].item() == 16


def test_fingerprint_follows_the_weights():
    torch.manual_seed(0)
    layer = nn.Linear(50, 40)
    before = fingerprint(layer)
    assert before == fingerprint(layer)
    with torch.no_grad():
        layer.weight.mul_(1.001)
    assert fingerprint(layer) != before
    assert identity_of("a", "bc") != identity_of("ab", "c") and len(identity_of(1)) == 16
