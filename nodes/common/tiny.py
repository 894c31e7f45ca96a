"""The tiny family: where its checkpoints lie and how its shared parts are loaded."""

from __future__ import annotations

from pathlib import Path

from .checkpoints import require_file
from .codec import LinearCodec
from .tiny_text import TinyTextEncoder

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
FILES = {
    "codec": "codec.safetensors",
    "text": "text.safetensors",
    "vision": "vision.safetensors",
    "dit4sr": "dit4sr_tiny.safetensors",
    "instantir": "instantir_tiny.safetensors",
    "dreamsr": "dreamsr_tiny.safetensors",
    "instancersr": "instancersr_tiny.safetensors",
}
SHARED = ("codec", "text", "vision")  # parts of FILES that several methods use; the others are the methods
METHODS = tuple(name for name in FILES if name not in SHARED)


def checkpoints_dir() -> Path:
    """The folder of the suite that holds the tiny checkpoints."""
    return CHECKPOINTS


def tiny_checkpoint(name: str) -> Path:
    """Path of a part of the family ("codec", "text", or a method's name).

    Raises: ValueError for an unknown name; FileNotFoundError if the file is not there.
    """
    if name not in FILES:
        raise ValueError(f"the tiny family has no part {name!r}; there are {', '.join(FILES)}.")
    return require_file(
        CHECKPOINTS / FILES[name],
        what=f"the tiny family's {name} checkpoint",
        where=str(CHECKPOINTS),
        page="the repository itself: clone it whole, or rebuild the family with trainers/train_tiny.sh",
    )


def is_tiny(model: str | Path) -> bool:
    """Whether `model` means tiny weights: "tiny", the shipped ones, or a folder that a tiny training has exported,
    which always holds the codec."""
    return str(model) == "tiny" or (Path(model) / FILES["codec"]).is_file()


def available_methods() -> list[str]:
    """Methods whose tiny checkpoint is there."""
    return [name for name in METHODS if (CHECKPOINTS / FILES[name]).is_file()]


def load_codec() -> LinearCodec:
    return LinearCodec.load(tiny_checkpoint("codec"))


def load_text_encoder() -> TinyTextEncoder:
    return TinyTextEncoder.load(tiny_checkpoint("text"))
