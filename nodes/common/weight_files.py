"""Reading weight files safely: what a file is, what its header says, its tensors.

What a file is, is decided by its first bytes and never by its suffix. A safetensors header is checked against the size
of the file before anything is read. Pickles are only ever read with ``weights_only=True``, which refuses anything but
tensors and plain containers.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .errors import CorruptCheckpointError, WrongFileError

FORMAT_VERSION = 1
_MAX_HEADER = 100_000_000  # bytes; the safetensors format's own limit
_SHOWN_KEYS = 8  # keys listed in an error before "... and N more"
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
         "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
          torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}


@dataclass(frozen=True)
class Header:
    """What a checkpoint says about itself before any weight is read.

    Attributes:
        tensors: name -> (safetensors dtype such as ``"F16"``, shape).
        metadata: the file's string metadata; empty for pickles and for folders without any.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str | None:
        """``fourfold.method``, None in files of other projects."""
        return self.metadata.get("fourfold.method")

    @property
    def config(self) -> dict:
        """``fourfold.config`` as a dict, empty in files of other projects."""
        return json.loads(self.metadata.get("fourfold.config", "{}"))

    @property
    def training(self) -> dict:
        """``fourfold.training`` as a dict, empty if unknown."""
        return json.loads(self.metadata.get("fourfold.training", "{}"))

    @property
    def step(self) -> int:
        """``fourfold.step``, 0 in files of other projects."""
        return int(self.metadata.get("fourfold.step", "0"))


def read_header(path: str | Path) -> Header:
    """Names, dtypes, shapes and metadata of a checkpoint, without reading its weights.

    Takes a .safetensors file, a .pt/.pth/.bin file (its tensors are mapped, not read), or a diffusers or transformers
    folder (single or sharded).

    Raises:
        FileNotFoundError: nothing there, or a shard is missing (named).
        CorruptCheckpointError: truncated, empty, not a checkpoint at all; the message says which.
        WrongFileError: a format that is not read here (GGUF), or written by a newer Fourfold.
    """
    path = Path(path)
    if path.is_dir():
        tensors, metadata = {}, {}
        for file in folder_files(path):
            part = read_header(file)
            tensors.update(part.tensors)
            metadata.update(part.metadata)
        return Header(tensors, metadata)
    if _sniff(path) == "pickle":
        state = _load_pickle(path, "meta")
        return Header({name: (_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in state.items()})
    return _safetensors_header(path)


def load_state(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint on the CPU, in their stored dtype: flat names, nested dicts joined by dots.

    Takes what `read_header` takes and raises what it raises. Values of a pickle that are no tensors (a step, a
    learning rate) are left out.
    """
    path = Path(path)
    if path.is_dir():
        state: dict[str, Tensor] = {}
        for file in folder_files(path):
            state.update(load_state(file))
        return state
    if _sniff(path) == "pickle":
        return _load_pickle(path, "cpu")
    _safetensors_header(path)  # names a truncated file before safetensors maps it
    return load_file(path, device="cpu")


def folder_files(folder: Path) -> list[Path]:
    """The weight files of a diffusers or transformers folder: one, or every shard that its index names.

    safetensors go before .bin, and a full-precision file before a variant such as ``*.fp16.safetensors``.

    Raises: FileNotFoundError if there is no weight file or a shard is missing; WrongFileError if several files
        could be meant.
    """
    for suffix in (".safetensors", ".bin"):
        for index in sorted(folder.glob(f"*{suffix}.index*.json"), key=lambda p: (len(p.name), p.name))[:1]:
            return _shards(index)
        files = [p for p in sorted(folder.glob(f"*{suffix}")) if not p.name.startswith(".")]
        usual = [p for p in files if p.name in (f"diffusion_pytorch_model{suffix}", f"model{suffix}",
                                                f"pytorch_model{suffix}")]
        files = usual or files
        if len(files) > 1:
            raise WrongFileError(f"{folder} holds {len(files)} weight files ({shorten([p.name for p in files])}) and "
                                 "no index that joins them. Choose one of the files instead of the folder.")
        if files:
            return files
    raise FileNotFoundError(f"{folder} holds no weights: expected diffusion_pytorch_model.safetensors, "
                            "model.safetensors, or shards with their *.index.json.")


def shorten(names: list[str], shown: int = _SHOWN_KEYS) -> str:
    """`names` joined by commas, after `shown` of them "... and N more"."""
    rest = f", ... and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise CorruptCheckpointError(f"{index} is not an index of shards ({error!r}). Download it again.") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks {len(missing)} of {len(names)} shards named in {index.name}: "
                                f"{shorten(missing)}. Download them into this folder.")
    return [index.parent / name for name in names]


def _sniff(path: Path) -> str:
    """ "safetensors" or "pickle", from the first bytes; what is neither is named in a CorruptCheckpointError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    with open(path, "rb") as file:
        head = file.read(512)
    start = head.lstrip().lower()
    if not head:
        raise CorruptCheckpointError(f"{path} is empty (0 bytes). Download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise CorruptCheckpointError(f"{path} is a git-lfs pointer, not the weights themselves. Run `git lfs pull` in "
                                     "its repository, or download the file from its page.")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CorruptCheckpointError(f"{path} is a web page, not a checkpoint: a download was answered with HTML (a "
                                     "login or licence page?). Open the page in a browser and download the file there.")
    if head.startswith(b"GGUF"):
        raise WrongFileError(f"{path} is a GGUF file, which is not read here. Use the .safetensors file.")
    if len(head) > 8 and head[8:9] == b"{":
        return "safetensors"
    if head.startswith((b"PK", b"\x80")):
        return "pickle"
    if all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head[:64]):
        raise CorruptCheckpointError(f"{path} is a text file (it starts with {head[:32].decode('ascii')!r}), not a "
                                     "checkpoint. Download the weights themselves.")
    raise CorruptCheckpointError(f"{path} is neither a safetensors file nor a PyTorch checkpoint, or it is damaged "
                                 f"(it starts with {head[:8]!r}). Download it again.")


def _safetensors_header(path: Path) -> Header:
    """Parse and check the header: 8 bytes length, JSON, then data up to exactly the end of the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise CorruptCheckpointError(f"{path} is damaged: its header claims {length} bytes (at most {_MAX_HEADER} "
                                         "are allowed). Download it again.")
        if 8 + length > size:
            raise CorruptCheckpointError(f"{path} is truncated: its header alone takes {8 + length} bytes, the file "
                                         f"has {size}. Download it again.")
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", None) or {}
        tensors, end = {}, 0
        for name, entry in entries.items():
            begin, stop = entry["data_offsets"]
            tensors[name] = (entry["dtype"], tuple(entry["shape"]))
            count = 1
            for extent in entry["shape"]:
                count *= extent
            bits = _BITS.get(entry["dtype"])
            if bits is not None and (stop - begin) * 8 != count * bits:
                raise ValueError(f"{name}: {stop - begin} bytes for {entry['dtype']} {entry['shape']}")
            end = max(end, stop)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{path} is damaged: its header cannot be read ({error}). "
                                     "Download it again.") from error
    if 8 + length + end != size:
        state = "truncated" if 8 + length + end > size else "damaged (there are bytes behind its last tensor)"
        raise CorruptCheckpointError(f"{path} is {state}: its header promises {8 + length + end} bytes, the file has "
                                     f"{size}. Download it again.")
    version = metadata.get("fourfold.format", "0")
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise WrongFileError(f"{path} has Fourfold format {version}; this version reads up to {FORMAT_VERSION}. "
                             "Update Fourfold.")
    return Header(tensors, metadata)


def _load_pickle(path: Path, device: str) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip and not zipfile.is_zipfile(path):
        raise CorruptCheckpointError(f"{path} is truncated: the end of its archive is missing. Download it again.")
    try:
        if path.suffix == ".safetensors":  # misnamed; given a path, torch would believe the suffix
            with open(path, "rb") as file:
                loaded = torch.load(file, map_location=device, weights_only=True)
        else:
            loaded = torch.load(path, map_location=device, weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise WrongFileError(f"{path} holds more than tensors, or is damaged, and was refused: such a file can run any "
                             "program. Use a .safetensors file.") from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CorruptCheckpointError(f"{path} is damaged ({str(error).splitlines()[0] if str(error) else error!r}). "
                                     "Download it again.") from error
    state = _flatten(loaded)
    if not state:
        raise WrongFileError(f"{path} holds no tensors by name (found {type(loaded).__name__}).")
    return state


def _flatten(value: object, prefix: str = "") -> dict[str, Tensor]:
    """Nested dicts to flat names; a lone wrapper such as ``state_dict`` is dropped."""
    if not isinstance(value, Mapping):
        return {}
    if not prefix:
        for wrapper in ("state_dict", "params_ema", "params"):
            if isinstance(value.get(wrapper), Mapping):
                value = value[wrapper]
    state: dict[str, Tensor] = {}
    for name, item in value.items():
        if isinstance(item, Tensor):
            state[f"{prefix}{name}"] = item.data
        else:
            state.update(_flatten(item, f"{prefix}{name}."))
    return state
