"""Puts freshly trained parts of the tiny family in their place.

    python -m fourfold.trainers.place_tiny --codec runs/tiny/codec.safetensors --dit4sr runs/tiny/dit4sr \\
        --vision runs/tiny/vision --instantir runs/tiny/aggregator --instancersr runs/tiny/instancersr
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ..nodes.common.checkpoints import atomic_path, require_family
from ..nodes.common.tiny import FILES, SHARED, checkpoints_dir
from ..nodes.common.weight_files import load_state, read_header
from ..nodes.dit4sr.model import WEIGHTS_NAME
from ..nodes.instancersr.model import WEIGHTS_NAME as INSTANCERSR
from .fit import option, parse
from .resume import checkpoints

log = logging.getLogger(__name__)
LARGEST = 64 * 2**20  # bytes, of the whole family
RUNS = {  # option -> part of the family -> where its file lies in the newest export of the training
    "dit4sr": {"dit4sr": f"transformer/{WEIGHTS_NAME}", "text": FILES["text"]},
    "vision": {"vision": FILES["vision"]},
    "instantir": {"instantir": FILES["instantir"]},
    "instancersr": {"instancersr": INSTANCERSR},
}


@dataclass(frozen=True)
class PlaceConfig:
    """Copies trained parts of the tiny family to where they are loaded from."""

    dit4sr: str | None = option(None, "output folder of DiT4SR's tiny training; None = left as it is")
    vision: str | None = option(None, "output folder of the vision encoder's training; None = left as it is")
    instantir: str | None = option(None, "output folder of InstantIR's last training, the Aggregator's; None = left")
    instancersr: str | None = option(None, "output folder of InstanceRSR's tiny training; None = left as it is")
    codec: str | None = option(None, "file that fit_codec wrote; None = left as it is")
    checkpoints: str = option(str(checkpoints_dir()), "the family's folder")


def find_parts(config: PlaceConfig) -> dict[str, Path]:
    """Part of the family -> the file that was trained.

    Raises: FileNotFoundError if a training has no complete checkpoint; ValueError if a network was trained with another
        codec or encoder than the one that is, or will be, beside it.
    """
    parts = {"codec": Path(config.codec)} if config.codec else {}
    exports = {}
    for run, files in RUNS.items():
        if folder := getattr(config, run):
            complete = checkpoints(folder)
            if not complete:
                raise FileNotFoundError(f"{folder} holds no complete checkpoint; is the training done?")
            exports[run] = complete[-1] / "export"
            parts |= {part: exports[run] / name for part, name in files.items()}
    for run, export in exports.items():
        for part in SHARED:
            own, beside = export / FILES[part], parts.get(part, Path(config.checkpoints) / FILES[part])
            if own.is_file() and beside.is_file() and not _same_weights(own, beside):
                raise ValueError(f"{run} was trained with another {part} ({own}) than {beside}. Place the {part} that "
                                 "it was trained with, or train it again.")
    return parts


def _same_weights(a: Path, b: Path) -> bool:
    first, second = load_state(a), load_state(b)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def place(parts: dict[str, Path], folder: str | Path) -> None:
    """Copies every part to its name in `folder`, each atomically.

    Raises: WrongFileError if a file is no such part; ValueError if its description names folders of the machine it was
        trained on, or if the family would outgrow 64 MB; nothing is copied then.
    """
    folder = Path(folder)
    for part, path in parts.items():
        header = read_header(path)
        require_family(header, part, path, "Give the file that the part's own trainer wrote.")
        paths = [f"{name} = {value}" for name, value in header.training.items() if Path(str(value)).is_absolute()]
        if paths:
            raise ValueError(f"{path} names folders of this machine in its description: {', '.join(paths)}. Export it "
                             "again: continue the training to one more checkpoint.")
    kept = {name: folder / name for name in FILES.values() if (folder / name).is_file()}
    size = sum(path.stat().st_size for path in (kept | {FILES[part]: path for part, path in parts.items()}).values())
    if size > LARGEST:
        raise ValueError(f"the tiny family would have {size / 2**20:.1f} MB; at most {LARGEST / 2**20:g} are allowed.")
    for part, path in parts.items():
        with atomic_path(folder / FILES[part]) as temporary:
            shutil.copyfile(path, temporary)
        header = read_header(folder / FILES[part])
        log.info("%s: %d steps, %s", folder / FILES[part], header.step, json.dumps(header.training)[:200])


def main(argv: list[str] | None = None) -> None:
    config = parse(PlaceConfig, argv)
    place(find_parts(config), config.checkpoints)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
