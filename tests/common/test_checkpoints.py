"""Writing, reading and matching of checkpoints; every kind of damaged file has its own message."""

import json
import os
import pickle
import stat

import pytest
import torch
from fourfold.nodes.common import checkpoints as ck
from fourfold.nodes.common.errors import CorruptCheckpointError, MismatchedKeysError, WrongFileError
from safetensors.torch import save_file
from torch import nn

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "folder" / "net.safetensors"
    ck.save_checkpoint(path, STATE, method="codec", config={"width": 3}, step=7, licence="CC0-1.0",
                       training={"loss": 0.5})
    return path


def test_a_file_describes_itself(file):
    header = ck.read_header(file)
    assert (header.method, header.config, header.step, header.training) == ("codec", {"width": 3}, 7, {"loss": 0.5})
    assert header.metadata["fourfold.licence"] == "CC0-1.0"
    assert header.metadata["fourfold.format"] == str(ck.FORMAT_VERSION)
    assert header.tensors == {"a.weight": ("F32", (2, 3)), "b": ("I64", (2,))}
    loaded = ck.load_state(file)
    assert loaded.keys() == STATE.keys() and all(torch.equal(loaded[k], STATE[k]) for k in STATE)
    assert ck.detect_family(file) == "codec" and os.listdir(file.parent) == ["net.safetensors"]


def test_others_may_read_the_file(file):
    plain = file.parent / "plain"
    plain.touch()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_dtype_shared_and_strided_tensors(tmp_path):
    w = torch.randn(4, 4)
    ck.save_checkpoint(tmp_path / "x.safetensors", {"w": w, "tied": w, "t": w.T, "n": torch.tensor(3)}, method="codec",
                       config={}, dtype=torch.float16)
    state = ck.load_state(tmp_path / "x.safetensors")
    assert torch.equal(state["t"], w.T.half()) and torch.equal(state["tied"], w.half())
    assert state["n"].dtype == torch.int64


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"layer\.w holds NaN or infinity as torch.float16"):
        ck.save_checkpoint(path, {"layer.w": torch.tensor([1e6])}, method="codec", config={}, dtype=torch.float16)
    assert not path.exists()


@pytest.mark.parametrize("moment", ["os.fsync", "os.replace"])
def test_a_kill_while_writing_leaves_the_old_file(file, monkeypatch, moment):
    before = file.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(moment, killed)
    with pytest.raises(KeyboardInterrupt):
        ck.save_checkpoint(file, {"a": torch.zeros(9)}, method="codec", config={})
    monkeypatch.undo()
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize(("make", "text"), [
    (lambda good: good[:-1], r"is truncated: its header promises \d+ bytes, the file has \d+"),
    (lambda good: good[:40], "is truncated: its header alone takes"),
    (lambda good: good + b"more", "bytes behind its last tensor"),
    (lambda good: b"", "is empty"),
    (lambda good: b"\xff" * 7 + b"\x00{" + good[9:], "its header claims"),
    (lambda good: good[:8] + good[8:].replace(b'"shape":[2,3]', b'"shape":[2,9]'), "is damaged: its header cannot be"),
    (lambda good: good[:8] + good[8:].replace(b'"shape"', b'"shapf"'), "is damaged: its header cannot be read"),
    (lambda good: good[:8] + b"{" * 20 + good[28:], "is damaged: its header cannot be read"),
    (lambda good: b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page"),
    (lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer"),
    (lambda good: b"Access to this model is restricted.", "is a text file .*Access to this model"),
    (lambda good: bytes(range(1, 100)), "is neither a safetensors file nor a PyTorch checkpoint"),
])
def test_every_kind_of_damage_is_named(file, make, text):
    file.write_bytes(make(file.read_bytes()))
    for read in (ck.read_header, ck.load_state, ck.detect_family):
        with pytest.raises(CorruptCheckpointError, match=text) as error:
            read(file)
        assert str(file) in str(error.value)


def test_missing_gguf_and_newer_files(file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors does not exist"):
        ck.read_header(tmp_path / "nowhere.safetensors")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(WrongFileError, match="GGUF"):
        ck.read_header(tmp_path / "x.gguf")
    save_file(STATE, file, metadata={"fourfold.format": "99"})
    with pytest.raises(WrongFileError, match=r"Fourfold format 99.*Update Fourfold"):
        ck.read_header(file)


# pickles ----------------------------------------------------------------------------------------------------------

def test_nested_pickles_become_flat_names(tmp_path):
    torch.save({"image_proj": {"latents": torch.ones(1, 2)}, "ip_adapter": {"1.to_k_ip.weight": torch.zeros(3)},
                "step": 4}, tmp_path / "adapter.pt")
    assert list(ck.load_state(tmp_path / "adapter.pt")) == ["image_proj.latents", "ip_adapter.1.to_k_ip.weight"]
    assert ck.read_header(tmp_path / "adapter.pt").tensors["image_proj.latents"] == ("F32", (1, 2))
    assert ck.detect_family(tmp_path / "adapter.pt") == "ip_adapter"


def test_a_wrapper_is_dropped_and_the_old_format_read(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "old.bin",
               _use_new_zipfile_serialization=False)
    assert list(ck.load_state(tmp_path / "old.bin")) == ["w"]


def test_what_a_file_is_does_not_depend_on_its_suffix(file, tmp_path):
    os.rename(file, tmp_path / "net.pt")
    torch.save(STATE, tmp_path / "net.safetensors")
    assert ck.load_state(tmp_path / "net.pt").keys() == ck.load_state(tmp_path / "net.safetensors").keys()


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_programs_in_pickles_are_refused_and_not_run(tmp_path):
    marker = str(tmp_path / "ran")
    torch.save({"w": Evil(marker)}, tmp_path / "evil.pt")
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(Evil(marker), protocol=2))
    for name in ("evil.pt", "raw.bin"):
        with pytest.raises(WrongFileError, match="can run any program"):
            ck.load_state(tmp_path / name)
    assert not os.path.exists(marker)


def test_a_truncated_pickle_is_named(tmp_path):
    torch.save({"w": torch.ones(1000)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptCheckpointError, match=r"x\.pt is truncated"):
        ck.load_state(tmp_path / "x.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WrongFileError, match="holds no tensors by name"):
        ck.load_state(tmp_path / "list.pt")


# folders ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def sharded(tmp_path):
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for i, (key, name) in enumerate(names.items()):
        save_file({key: torch.full((2,), float(i))}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return tmp_path


def test_shards_are_joined(sharded):
    assert {k: v[0].item() for k, v in ck.load_state(sharded).items()} == {"a": 0.0, "b": 1.0}
    assert set(ck.read_header(sharded).tensors) == {"a", "b"}


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 2 shards .*model-00002-of-00002.safetensors"):
        ck.load_state(sharded)


def test_a_broken_index_is_named(sharded):
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors\.index\.json is not an index"):
        ck.read_header(sharded)


def test_the_full_precision_file_goes_before_a_variant(tmp_path):
    save_file({"full": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"half": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert list(ck.load_state(tmp_path)) == ["full"]
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    assert list(ck.load_state(tmp_path)) == ["half"]


def test_folders_without_or_with_too_many_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        ck.load_state(tmp_path)
    for name in "xy":
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(WrongFileError, match=r"2 weight files \(x\.safetensors, y\.safetensors\)"):
        ck.load_state(tmp_path)


# matching ---------------------------------------------------------------------------------------------------------

def test_strict_loading_lists_what_differs():
    with pytest.raises(MismatchedKeysError) as error:
        ck.load_strict(nn.Linear(3, 4), {"weight": torch.zeros(4, 2), "extra": torch.zeros(1)}, "net.safetensors")
    text = str(error.value)
    assert text.startswith("net.safetensors does not fit Linear: 1 missing: bias; 1 unexpected: extra; "
                           "1 of another shape: weight (file (4, 2), model (4, 3))")


def test_long_lists_are_shortened():
    state = {f"k{i}": torch.zeros(1) for i in range(100)}
    with pytest.raises(MismatchedKeysError, match=r"100 unexpected: k0, k1, .*k7, \.\.\. and 92 more") as error:
        ck.load_strict(nn.Identity(), state, "x")
    assert len(str(error.value)) < 400


def test_strict_loading_keeps_dtypes_and_fills_meta_modules():
    state = {"weight": torch.randn(4, 3).half(), "bias": torch.randn(4).half()}
    layer = nn.Linear(3, 4)
    ck.load_strict(layer, state, "x")
    assert layer.weight.dtype == torch.float32 and torch.equal(layer.weight, state["weight"].float())
    with torch.device("meta"):
        empty = nn.Linear(3, 4)
    ck.load_strict(empty, state, "x")
    assert not empty.weight.is_meta and empty.weight.dtype == torch.float16


def test_require_file_says_folder_name_and_page(file, tmp_path):
    assert ck.require_file(file, "the codec", "checkpoints", "https://example.org") == file
    with pytest.raises(FileNotFoundError, match=r"the DiT4SR transformer is missing: .*dit4sr_q does not exist\. "
                       r"Download dit4sr_q from https://huggingface\.co/x and put it into models/diffusion_models"):
        ck.require_file(tmp_path / "dit4sr_q", "the DiT4SR transformer", "models/diffusion_models",
                        "https://huggingface.co/x")
