"""Finds the instances of every photograph of a folder with SAM, once, for the training of InstanceRSR.

    python -m fourfold.trainers.make_instances --photographs DIV2K --sam sam_vit_h_4b8939.pth --output DIV2K_instances

Writes one label map a photograph, a PNG of the same name and size with one label per pixel: 0 = no instance, 1 = the
largest instance, and so on. Maps that are there already are kept, so a stopped run goes on where it was. On several
GPUs: accelerate launch -m fourfold.trainers.make_instances ...
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import PartialState
from torch import Tensor

from ..nodes.common.devices import best_device
from ..nodes.common.images import read_image
from ..nodes.instancersr.label_files import write_labels
from ..nodes.instancersr.sam import SamInstances, SamSettings, load_sam
from .config import option, parse
from .data import find_images

log = logging.getLogger(__name__)
REPORT_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class InstancesConfig:
    """Finds the instances of photographs with the Segment Anything Model."""

    photographs: str = option("photographs", "folder of photographs, searched recursively")
    sam: str = option("sam_vit_h_4b8939.pth", "SAM checkpoint (ViT-B, ViT-L or ViT-H), a local file")
    output: str = option("instances", "folder of the label maps, with the subfolders of the photographs'")
    overwrite: bool = option(False, "make maps anew that are there already")
    points_per_side: int = option(32, "side of the grid of prompts, >= 1 (SAM 32)")
    points_per_batch: int = option(64, "prompts at a time, >= 1; fewer need less memory")
    pred_iou_thresh: float = option(0.88, "masks that SAM thinks worse of are dropped (SAM 0.88)")
    stability_score_thresh: float = option(0.95, "so are masks that change with the threshold (SAM 0.95)")
    box_nms_thresh: float = option(0.7, "overlap of boxes from which two masks are the same one (SAM 0.7)")
    crop_n_layers: int = option(0, "also look at 4, 16, ... crops of the picture, for small instances (SAM 0)")
    min_area: int = option(64, "pixels, instances that show less are left out")
    device: str | None = option(None, '"cpu", "cuda", "cuda:1", ...; None = a GPU where there is one')

    @property
    def settings(self) -> SamSettings:
        return SamSettings(**{name: getattr(self, name) for name in asdict(SamSettings())})


def plan(photographs: str | Path, output: str | Path) -> list[tuple[Path, Path]]:
    """Photographs and where their maps go; if `output` lies among the photographs, what it holds are none.

    Raises: FileNotFoundError without photographs; ValueError if two of them would share a map.
    """
    photographs, output = Path(photographs).resolve(), Path(output).resolve()
    files = find_images(photographs)
    if photographs in output.parents:
        files = [path for path in files if output not in path.parents]
    pairs = [(path, output / path.relative_to(photographs).with_suffix(".png")) for path in files]
    taken: dict[Path, Path] = {}
    for path, target in pairs:
        if target in taken:
            raise ValueError(f"{taken[target]} and {path} would share the map {target}. Rename one of them.")
        if target == path:
            raise ValueError(f"the map of {path} would replace it: choose another folder for --output.")
        taken[target] = path
    return pairs


def make_instances(
    pairs: list[tuple[Path, Path]],
    segment: Callable[[Tensor], list[Tensor]],
    metadata: dict[str, str] | None = None,
    overwrite: bool = False,
) -> int:
    """Writes the maps that are missing, each whole or not at all, and says every few seconds how far it is.

    Args:
        pairs: photograph and map each (`plan`).
        segment: (1, C, H, W) in 0..1 -> [(H, W) labels], such as `SamInstances`.
        metadata: text chunks of every PNG.
        overwrite: write those that are there as well.
    Returns: how many maps were written.
    Raises: ValueError at the end, naming the photographs that could not be read; the others have their maps.
    """
    missing = [pair for pair in pairs if overwrite or not pair[1].is_file()]
    log.info("%d of %d label maps are there already", len(pairs) - len(missing), len(pairs))
    unreadable: list[str] = []
    began = told = time.monotonic()
    for done, (path, target) in enumerate(missing, start=1):
        try:
            picture = read_image(path)
        except ValueError as error:
            log.warning("left out: %s", error)
            unreadable.append(str(path))
            continue
        labels = segment(picture)[0]
        write_labels(target, labels, metadata)
        now = time.monotonic()
        if now - told > REPORT_EVERY or done == len(missing):
            told, left = now, (now - began) / done * (len(missing) - done)
            log.info("%d of %d: %s, %d instances; about %.0f minutes left", done, len(missing), path.name,
                     int(labels.max()), left / 60)
    if unreadable:
        raise ValueError(f"{len(unreadable)} of {len(missing)} photographs could not be read and have no map: "
                         f"{', '.join(unreadable[:8])}. Remove or replace them, and start again.")
    return len(missing)


def main(argv: list[str] | None = None) -> int:
    config, state = parse(InstancesConfig, argv), PartialState()
    pairs = plan(config.photographs, config.output)[state.process_index::state.num_processes]
    device = config.device or (state.device if state.num_processes > 1 else best_device())
    segment = SamInstances(load_sam(config.sam, device), config.settings)
    described = {"sam": Path(config.sam).name, **asdict(config.settings)}
    return make_instances(pairs, segment, {"fourfold.instances": json.dumps(described)}, config.overwrite)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
