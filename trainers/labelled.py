"""Photographs with label maps as training items: clean crop, degraded crop, coloured map, instance of every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nodes.instancersr.instances import patch_instances, resize_labels
from ..nodes.instancersr.label_files import read_labels
from ..nodes.instancersr.palette import colorize
from .data import Photographs, PictureCache


class LabelCache(PictureCache):
    """Label maps as (H, W), kept in memory up to a budget: 8 bits where they do."""

    def read(self, path: Path) -> Tensor:
        labels = read_labels(path)
        return labels.to(torch.uint8 if int(labels.max()) < 256 else torch.int32)


class LabelledPhotographs(Photographs):
    """`Photographs` with the instances that every crop shows; item i is a pure function of (files, settings, seed, i).

    Args:
        folder, crop, degradation, settings: see `Photographs`.
        grid: tokens of a crop, (h, w).
        instances: folder of the label maps, with the names and subfolders of the photographs (`make_instances`); None =
            they lie beside the photographs.
    Items: those of `Photographs`, and ``map`` (3, crop, crop) in 0..1, the instances in the palette's colours;
        ``instances`` (h * w,), the label of the instance that covers most of each token; ``picture``, whose it is.
    Raises: FileNotFoundError naming a map that is missing; ValueError naming one of another size than its photograph.
    """

    def __init__(self, folder: str | Path, crop: int, degradation: Any, grid: tuple[int, int],
                 instances: str | Path | None = None, **settings: Any):
        super().__init__(folder, crop, degradation, **settings)
        paths = self.pictures.paths
        maps = [Path(instances or folder) / path.relative_to(folder).with_suffix(".png") for path in paths]
        missing = [pair for pair in zip(maps, paths, strict=True) if not pair[0].is_file() or pair[0] == pair[1]]
        if missing:
            of, path = missing[0]
            raise FileNotFoundError(
                f"{len(missing)} of {len(paths)} photographs have no label map; the first is {path}, whose map "
                f"would be {'a PNG beside it' if of == path else of}. Make them with make_instances, name their folder "
                "with --instances, or take photographs without a map out of the folder.")
        self.grid, self.labels = grid, LabelCache(maps, self.pictures.budget // 3)
        for path, own, of in zip(maps, self.labels.sizes, self.pictures.sizes, strict=True):
            if own != of:
                raise _wrong_size(path, own, of)

    def labels_of(self, index: int) -> Tensor:
        """The label map of item `index`, (crop, crop) int64, with the numbers of its file."""
        which, cut = self.choose(index)
        labels, picture = self.labels[which], self.pictures[which]
        if labels.shape != picture.shape[1:]:
            raise _wrong_size(self.labels.paths[which], tuple(labels.shape), tuple(picture.shape[1:]))
        return cut.turned(resize_labels(cut.window(labels).long(), (self.crop, self.crop)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        labels = self.labels_of(index)[None]
        return {**super().__getitem__(index), "map": colorize(labels)[0], "picture": self.choose(index)[0],
                "instances": patch_instances(labels, self.grid)[0]}


def _wrong_size(path: Path, own: tuple[int, int], of: tuple[int, int]) -> ValueError:
    return ValueError(f"the label map {path} is {own[0]} x {own[1]} px, but its photograph {of[0]} x {of[1]} px: a map "
                      "has one label for each pixel. Make it again.")
