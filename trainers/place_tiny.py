"""Puts freshly trained parts of the tiny family in their place.

    python -m fourfold.trainers.place_tiny --dit4sr runs/tiny/dit4sr --codec runs/tiny/codec.safetensors
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..nodes.common.checkpoints import atomic_path, require_family
from ..nodes.common.tiny import FILES, checkpoints_dir
from ..nodes.common.weight_files import read_header
from ..nodes.dit4sr.model import WEIGHTS_NAME
from .fit import option, parse
from .resume import checkpoints

log = logging.getLogger(__name__)
LARGEST = 64 * 2**20  # bytes, of the whole family


@dataclass(frozen=True)
class PlaceConfig:
    """Copies trained parts of the tiny family to where they are loaded from."""

    dit4sr: str | None = option(None, "output folder of DiT4SR's tiny training; None = left as it is")
    codec: str | None = option(None, "file that fit_codec wrote; None = left as it is")
    checkpoints: str = option(str(checkpoints_dir()), "the family's folder")


def find_parts(config: PlaceConfig) -> dict[str, Path]:
    """Part of the family -> the file that was trained.

    Raises: FileNotFoundError if a training has no complete checkpoint.
    """
    parts = {"codec": Path(config.codec)} if config.codec else {}
    if config.dit4sr:
        complete = checkpoints(config.dit4sr)
        if not complete:
            raise FileNotFoundError(f"{config.dit4sr} holds no complete checkpoint; is the training done?")
        export = complete[-1] / "export"
        parts |= {"dit4sr": export / "transformer" / WEIGHTS_NAME, "text": export / FILES["text"]}
    return parts


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
