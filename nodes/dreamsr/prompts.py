"""The prompts of DreamSR: one for the whole picture, one for each patch; written by a captioner, edited as text.

    [global]
    A harbour town in the evening.

    [patch 1: row 1, column 1]
    A clear orange sky.

    [patch 2: row 1, column 2]
    ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.caption_cache import CaptionCache, content_key
from ..common.caption_cleaning import clean_caption
from ..common.embedded_captioner import eight_bit
from ..common.images import resize
from ..common.tiling import Box
from .patches import cut_patches

Captioner = Callable[[Tensor], list[str]]
CAPTIONED_AT_ONCE = 8  # patches a call of the captioner
LONGEST_SHORT_SIDE = 1024  # pixels; larger pictures are captioned as a whole at this size (as in training, section 4.1)
_HEADER = re.compile(
    r"^\[(?:picture (?P<picture>\d+), )?(?:(?P<whole>global)|patch (?P<patch>\d+))(?::[^\]]*)?\][ \t\r]*$",
    re.MULTILINE | re.IGNORECASE,
)


@dataclass(frozen=True)
class PatchPrompts:
    """The prompts of one picture.

    Attributes:
        whole: the global prompt, which FLUX reads.
        patches: the local ones, in the order of the plan, which the MM-ControlNet reads.
    """

    whole: str
    patches: tuple[str, ...]


def write_prompts(
    pixels: Tensor,
    plan: Sequence[Box],
    downscale: int,
    captioner: Captioner,
    *,
    clean: bool = False,
    cache: CaptionCache | None = None,
) -> list[PatchPrompts]:
    """Captions pictures and all their patches.

    Args:
        pixels: LR pictures enlarged to the target, (B, 3, H, W) in 0..1.
        plan: patches, in latents.
        downscale: pixels per latent.
        captioner: pictures in 0..1 -> a text each.
        clean: leave out the sentences that describe damage (`common.caption_cleaning`).
        cache: keeps captions by content, for captioners with an `identity`.
    Returns: the prompts of each of the B pictures.
    """
    batch, (height, width) = len(pixels), pixels.shape[-2:]
    shrink = min(1.0, LONGEST_SHORT_SIDE / min(height, width))
    pictures = resize(pixels, (round(height * shrink), round(width * shrink))) if shrink < 1 else pixels
    whole = _captions(pictures, captioner, cache)
    local: list[str] = []
    step = max(1, CAPTIONED_AT_ONCE // batch)
    for start in range(0, len(plan), step):
        local += _captions(cut_patches(pixels, plan[start : start + step], downscale), captioner, cache)
    if clean:
        whole, local = ([clean_caption(text) for text in texts] for texts in (whole, local))
    return [PatchPrompts(whole[b], tuple(local[b::batch])) for b in range(batch)]


def _captions(pictures: Tensor, captioner: Captioner, cache: CaptionCache | None) -> list[str]:
    identity = getattr(captioner, "identity", None)
    if cache is None or identity is None:
        return captioner(pictures)
    levels = eight_bit(pictures).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    keys = [content_key(picture, identity) for picture in levels]
    new = {key: row for row, key in enumerate(keys) if key not in cache}
    if new:
        cache.update(dict(zip(new, captioner(pictures[list(new.values())]), strict=True)))
    return [cache[key] for key in keys]


def format_prompts(prompts: Sequence[PatchPrompts], plan: Sequence[Box]) -> str:
    """The prompts as text to read and edit, a block each; `parse_prompts` reads it back."""
    tops, lefts = (sorted({getattr(box, side) for box in plan}) for side in ("top", "left"))
    blocks = []
    for number, picture in enumerate(prompts, 1):
        name = f"picture {number}, " if len(prompts) > 1 else ""
        blocks.append(f"[{name}global]\n{picture.whole.strip()}\n")
        for i, (box, text) in enumerate(zip(plan, picture.patches, strict=True), 1):
            place = f"row {tops.index(box.top) + 1}, column {lefts.index(box.left) + 1}"
            blocks.append(f"[{name}patch {i}: {place}]\n{text.strip()}\n")
    return "\n".join(blocks)


def parse_prompts(text: str, patches: int, pictures: int = 1) -> list[PatchPrompts]:
    """Reads prompts as `format_prompts` writes them, or without headers.

    Without headers, blocks are parted by empty lines: the global prompt and one for each patch; or a single one, which
    then is the global and every local prompt.

    Args:
        text: of all pictures.
        patches, pictures: how many there are.
    Returns: the prompts of each picture.
    Raises: ValueError that says which blocks are missing, surplus or double.
    """
    headers = list(_HEADER.finditer(text))
    if not headers:
        return _without_headers(text, patches, pictures)
    if astray := text[: headers[0].start()].strip():
        raise ValueError(
            f"the prompts begin with text that belongs to no block: {astray[:60]!r}. Put it below a line such as "
            "[global] or [patch 1]."
        )
    found: dict[tuple[int, int], str] = {}  # (picture, patch), patch 0 = global
    for header, after in zip(headers, [*headers[1:], None], strict=True):
        key = int(header["picture"] or 1), 0 if header["whole"] else int(header["patch"])
        if key in found:
            raise ValueError(f"the prompts hold {header[0].strip()} twice; once is expected.")
        found[key] = text[header.end() : after.start() if after else len(text)].strip()
    wanted = [(picture, patch) for picture in range(1, pictures + 1) for patch in range(patches + 1)]
    missing, surplus = [key for key in wanted if key not in found], [key for key in found if key not in wanted]
    if missing or surplus:
        wrong = "; ".join(f"{len(keys)} {kind}: {_names(keys, pictures)}" for kind, keys in
                          (("missing", missing), ("surplus", surplus)) if keys)
        raise ValueError(
            f"the prompts do not fit {pictures} picture(s) of {patches} patches: {wrong}. Each needs a block [global] "
            f"and the blocks [patch 1] to [patch {patches}]; run the Patch-Prompt Tiler again after a change of size, "
            "tile or overlap."
        )
    return [PatchPrompts(found[picture, 0], tuple(found[picture, patch] for patch in range(1, patches + 1)))
            for picture in range(1, pictures + 1)]


def _without_headers(text: str, patches: int, pictures: int) -> list[PatchPrompts]:
    blocks = [block.strip() for block in re.split(r"\n[ \t]*\n", text.strip())]
    if len(blocks) == 1:
        return [PatchPrompts(blocks[0], (blocks[0],) * patches)] * pictures
    if len(blocks) != patches + 1 or pictures != 1:
        raise ValueError(
            f"found {len(blocks)} blocks of text without headers for {pictures} picture(s) of {patches} patches; "
            f"expected {patches + 1} parted by empty lines (the global prompt, then one for each patch), or a single "
            "one for all, or headers such as [global] and [patch 1]."
        )
    return [PatchPrompts(blocks[0], tuple(blocks[1:]))]


def _names(keys: list[tuple[int, int]], pictures: int, shown: int = 6) -> str:
    names = [("" if pictures == 1 and picture == 1 else f"picture {picture}, ")
             + (f"patch {patch}" if patch else "global") for picture, patch in keys[:shown]]
    return ", ".join(f"[{name}]" for name in names) + (", ..." if len(keys) > shown else "")
