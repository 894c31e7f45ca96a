"""Photographs as training pairs: clean crop, degraded crop, caption."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import get_worker_info

from ..nodes.common.captions import EmbeddedCaptioner
from ..nodes.common.degradation import DEGRADATIONS, DegradationSettings, degrade
from ..nodes.common.images import read_image
from .order import generator_of, seed_of

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def find_images(folder: str | Path) -> list[Path]:
    """Photographs under `folder`, recursively, sorted by their path in it; hidden files and folders are left out.

    A PNG with one channel that shares its name with a JPEG is that photograph's label map and is left out too.

    Raises: FileNotFoundError if the folder does not exist or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder of photographs {folder} does not exist.")
    inside = [p.relative_to(folder) for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
    visible = [p for p in inside if not any(part.startswith(".") for part in p.parts)]
    if not visible:
        raise FileNotFoundError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}), nor do its subfolders.")
    photographs = {p.stem for p in visible if p.suffix.lower() in (".jpg", ".jpeg")}
    maps = {p for p in visible if p.suffix.lower() == ".png" and p.stem in photographs and _is_map(folder / p)}
    if maps:
        log.info("%d of the %d images under %s are label maps and are left out", len(maps), len(visible), folder)
    return [folder / p for p in sorted(set(visible) - maps, key=lambda p: p.as_posix())]


class PictureCache:
    """Decoded pictures as (3, H, W) uint8, kept in memory up to a budget.

    What fits altogether is decoded at once, so that data processes that are forked later share it. Of a larger folder
    every data process keeps the first pictures that it meets, within its share of the budget; as pictures are drawn
    evenly, no other choice would be met more often.

    Args:
        paths: image files.
        budget: bytes.
    """

    def __init__(self, paths: list[Path], budget: int):
        self.paths, self.budget, self.used = paths, budget, 0
        self.sizes = [_size(path) for path in paths]  # (short, long) in px
        self._pictures: dict[int, Tensor] = {}
        if sum(3 * a * b for a, b in self.sizes) <= budget:
            for index in range(len(paths)):
                self[index]

    def __getitem__(self, index: int) -> Tensor:
        if index in self._pictures:
            return self._pictures[index]
        picture = self.read(self.paths[index])
        worker = get_worker_info()
        if self.used + picture.nbytes <= self.budget / (worker.num_workers if worker else 1):
            self._pictures[index] = picture
            self.used += picture.nbytes
        return picture

    def read(self, path: Path) -> Tensor:
        return (_rgb(read_image(path)[0]) * 255).round().to(torch.uint8)


class Cut(NamedTuple):
    """The part of a picture that a crop is: a square, in pixels, and how it is turned once it has its size."""

    top: int
    left: int
    side: int
    turns: int
    mirrored: bool

    @classmethod
    def draw(cls, height: int, width: int, crop: int, min_scale: float, draws: torch.Generator) -> Cut:
        """A square of crop / s pixels, s uniform in min_scale..1, anywhere in the picture, turned in any way."""
        u, v, w = torch.rand(3, generator=draws).tolist()
        side = min(round(crop / (min_scale + (1 - min_scale) * u)), height, width)
        turns, mirror = torch.randint(4, (2,), generator=draws).tolist()
        return cls(round(v * (height - side)), round(w * (width - side)), side, turns, mirror % 2 == 1)

    def window(self, picture: Tensor) -> Tensor:
        """(..., H, W) -> (..., side, side)."""
        return picture[..., self.top:self.top + self.side, self.left:self.left + self.side]

    def turned(self, square: Tensor) -> Tensor:
        square = torch.rot90(square, self.turns, (-2, -1))
        return (square.flip(-1) if self.mirrored else square).contiguous()


class Photographs:
    """Endless stream of random crops; item i is a pure function of (files, settings, seed, i).

    A picture is drawn, and of it a square of crop / s pixels, s uniform in min_scale..1 (shrunk to crop by bicubic
    interpolation with antialiasing: sharp even where the source is not), mirrored and turned by quarters at random.

    Args:
        folder: searched recursively (`find_images`). Pictures with a side below `crop` are left out.
        crop: side of the clean crop, px; a multiple of `scale`.
        degradation: how the low-resolution crop is made, settings or a name of `DEGRADATIONS`; None leaves ``lr`` out.
        seed: of everything random.
        captions: True = a .txt file next to the picture, else `EmbeddedCaptioner` on the clean crop; False = "" ;
            or a captioner (bchw in 0..1 -> list of str).
        min_scale: smallest s, in 0..1; 1 = never shrink.
        scale: clean side / degraded side.
        cache_bytes: memory for decoded pictures (`PictureCache`).
    Items: ``hr`` (3, crop, crop), ``lr`` (3, crop / scale, crop / scale), float32 in 0..1; ``caption`` str; ``index``.
    """

    def __init__(self, folder: str | Path, crop: int, degradation: DegradationSettings | str | None, seed: int = 0,
                 captions: bool | Callable[[Tensor], list[str]] = True, min_scale: float = 0.5, scale: int = 4,
                 cache_bytes: int = 2 * 1024**3):
        if crop % scale or crop <= 0:
            raise ValueError(f"The crop is {crop} px, but must be a positive multiple of the scale {scale}.")
        if not 0 < min_scale <= 1:
            raise ValueError(f"min_scale is {min_scale}, but must be above 0 and at most 1.")
        paths = find_images(folder)
        large = [path for path in paths if min(_size(path)) >= crop]
        if not large:
            raise ValueError(f"All {len(paths)} pictures of {folder} have a side below the crop of {crop} px. Choose a "
                             "smaller crop or larger pictures.")
        if len(large) < len(paths):
            log.warning("%d of %d pictures have a side below %d px and are left out", len(paths) - len(large),
                        len(paths), crop)
        self.pictures = PictureCache(large, cache_bytes)
        self.degradation = _settings(degradation)
        self.crop, self.seed, self.min_scale, self.scale = crop, seed, min_scale, scale
        self.captioner = _captioner(captions)
        self.captioner_name = type(self.captioner).__name__ if captions else "none"
        self.captions = [_caption_file(path) if captions else None for path in large]

    def identity(self) -> str:
        """16 hexadecimal digits that name the stream: files (size, first and last 64 KB, caption) and settings."""
        digest = hashlib.blake2b(digest_size=8)
        settings = (self.crop, self.degradation, self.seed, self.min_scale, self.scale, self.captioner_name)
        digest.update(repr(settings).encode())
        for path, caption in zip(self.pictures.paths, self.captions, strict=True):
            with open(path, "rb") as file:
                digest.update(f"{path.stat().st_size} {caption}".encode() + file.read(65536))
                file.seek(max(path.stat().st_size - 65536, 0))
                digest.update(file.read())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> dict[str, Any]:
        which, cut = self.choose(index)
        hr = self._crop(self.pictures[which], cut)
        item = {"hr": hr, "caption": self.captions[which] or self.captioner(hr[None])[0], "index": index}
        if self.degradation is not None:
            item["lr"] = degrade(hr[None], self.degradation, seed_of(self.seed, "degradation", index), self.scale)[0]
        return item

    def choose(self, index: int) -> tuple[int, Cut]:
        """Which picture item `index` is cut out of, and where."""
        draws = generator_of(self.seed, "photograph", index)
        which = int(torch.randint(len(self.pictures.paths), (), generator=draws))
        return which, Cut.draw(*self.pictures[which].shape[-2:], self.crop, self.min_scale, draws)

    def _crop(self, picture: Tensor, cut: Cut) -> Tensor:
        hr, size = cut.window(picture).float() / 255, (self.crop, self.crop)
        if cut.side != self.crop:
            hr = interpolate(hr[None], size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
        return cut.turned(hr)


def _settings(degradation: DegradationSettings | str | None) -> DegradationSettings | None:
    if not isinstance(degradation, str):
        return degradation
    if degradation not in DEGRADATIONS:
        raise ValueError(f"There is no degradation {degradation!r}; choose one of {', '.join(DEGRADATIONS)}.")
    return DEGRADATIONS[degradation]


def _captioner(captions: bool | Callable[[Tensor], list[str]]) -> Callable[[Tensor], list[str]]:
    if callable(captions):
        return captions
    return EmbeddedCaptioner() if captions else lambda images: [""] * len(images)


def _caption_file(path: Path) -> str | None:
    """What the .txt file next to a picture says; None without one."""
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.is_file() else None


def _is_map(path: Path) -> bool:
    with Image.open(path) as image:
        return len(image.getbands()) == 1


def _size(path: Path) -> tuple[int, int]:
    """Shorter and longer side in px, from the file's head."""
    try:
        with Image.open(path) as image:
            return min(image.size), max(image.size)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that can be read. Remove it from the folder.") from error


def _rgb(picture: Tensor) -> Tensor:
    """(C, H, W) with C = 1 (grey), 2 (grey, alpha), 3 or 4 (RGB, alpha) -> (3, H, W); alpha is dropped."""
    return picture[:1].expand(3, -1, -1) if len(picture) < 3 else picture[:3]
