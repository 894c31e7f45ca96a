"""The patches that a picture is drawn in, and the encoded prompt that each of them is drawn with (section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.text import TextEmbedding
from ..common.tiling import Box, plan_tiles, whole

ENCODED_AT_ONCE = 8  # prompts a call of the text encoder


def plan_patches(height: int, width: int, tile: int = 64, overlap: int = 16) -> list[Box]:
    """The patches of a latent, row by row; a picture of at most one patch is a single one, whatever its shape.

    Args:
        height, width: of the latent.
        tile: latents, side of a patch, even (paper: 512 px, 64 latents).
        overlap: latents, of neighbouring patches.
    Raises: ValueError for numbers that do not fit.
    """
    if tile % 2:
        raise ValueError(f"the tile is {tile} latents; it must be even: a token is 2 x 2 latents.")
    if height % 2 or width % 2:
        raise ValueError(f"the latent is {height} x {width}; both must be even: pad the picture (LR Prepare does).")
    if max(height, width) <= tile:
        return whole(height, width)
    return plan_tiles(height, width, tile, overlap)


def cut_patches(pixels: Tensor, plan: Sequence[Box], downscale: int) -> Tensor:
    """Pictures (B, C, H, W) -> their patches, (n * B, C, p, p), patch by patch: rows [i*B : (i+1)*B] are plan[i].

    Args:
        downscale: pixels per latent.
    """
    return torch.cat([pixel_box(box, downscale).crop(pixels) for box in plan])


def pixel_box(box: Box, downscale: int) -> Box:
    """A box of latents in pixels."""
    return Box(*(side * downscale for side in (box.top, box.left, box.height, box.width)))


@dataclass(frozen=True)
class PatchText:
    """The encoded prompt of every patch of every picture; equal prompts are held once.

    Attributes:
        plan: the patches, n of them.
        texts: the different prompts, one row each.
        index: index[i][b] is the place in `texts` of the prompt of plan[i] in picture b.
    """

    plan: tuple[Box, ...]
    texts: tuple[TextEmbedding, ...]
    index: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.index) != len(self.plan) or len({len(row) for row in self.index}) != 1:
            raise ValueError(
                f"prompts of {len(self.index)} patches for a plan of {len(self.plan)}; one for each patch of each "
                "picture is expected. Make plan and prompts from the same picture with the same tile and overlap."
            )

    @classmethod
    def encode(
        cls,
        prompts: Sequence[Sequence[str]],
        plan: Sequence[Box],
        encoder: Callable[[list[str]], TextEmbedding],
        dtype: torch.dtype | None = None,
    ) -> PatchText:
        """Encodes the patches' prompts, each different one once; they are kept on the CPU.

        Args:
            prompts: of each picture the n prompts of its patches.
            encoder: list of B texts -> TextEmbedding of B rows.
            dtype: that they are kept in; None = the encoder's.
        """
        places = {text: place for place, text in enumerate(dict.fromkeys(t for texts in prompts for t in texts))}
        different, rows = list(places), []
        for start in range(0, len(different), ENCODED_AT_ONCE):
            rows += split_rows(encoder(different[start : start + ENCODED_AT_ONCE]).to("cpu", dtype))
        for texts in prompts:
            if len(texts) != len(plan):
                raise ValueError(f"{len(texts)} prompts for {len(plan)} patches; one for each is expected.")
        index = tuple(tuple(places[texts[i]] for texts in prompts) for i in range(len(plan)))
        return cls(tuple(plan), tuple(rows), index)

    @classmethod
    def of(cls, embeddings: Sequence[TextEmbedding], plan: Sequence[Box]) -> PatchText:
        """Prompts that are encoded already: an embedding for each patch (or one for all), of 1 row or one a picture.

        Raises: ValueError if there are neither 1 nor as many embeddings as patches, or their numbers of rows differ.
        """
        if len(embeddings) == 1:
            embeddings = [embeddings[0]] * len(plan)
        batch = max(len(embedding) for embedding in embeddings) if embeddings else 0
        if len(embeddings) != len(plan) or any(len(embedding) not in (1, batch) for embedding in embeddings):
            raise ValueError(
                f"{len(embeddings)} encoded prompts of {sorted({len(e) for e in embeddings})} rows for {len(plan)} "
                "patches; expected one for each patch (or one for all), with 1 row or one for each picture."
            )
        texts: dict[int, tuple[int, TextEmbedding]] = {}  # of the embedding objects, each once
        rows: list[TextEmbedding] = []
        for embedding in embeddings:
            if id(embedding) not in texts:
                texts[id(embedding)] = (len(rows), embedding)
                rows += split_rows(embedding)
        starts = [texts[id(embedding)][0] for embedding in embeddings]
        index = tuple(tuple(start + (b if len(embedding) > 1 else 0) for b in range(batch))
                      for start, embedding in zip(starts, embeddings, strict=True))
        return cls(tuple(plan), tuple(rows), index)

    def rows(self, boxes: Sequence[Box], batch: int) -> list[TextEmbedding]:
        """The prompts of some patches, one row each, patch by patch: [i*batch : (i+1)*batch] are those of boxes[i].

        Raises: ValueError for a box that is not in the plan, or prompts of another number of pictures (1 fits all).
        """
        numbers = {box: i for i, box in enumerate(self.plan)}
        rows = []
        for box in boxes:
            if box not in numbers:
                raise ValueError(f"{box} is no patch of the plan of {len(self.plan)}.")
            of_box = self.index[numbers[box]]
            if len(of_box) not in (1, batch):
                raise ValueError(f"prompts for {len(of_box)} pictures, but {batch} are drawn.")
            rows += [self.texts[place] for place in (of_box * batch if len(of_box) == 1 else of_box)]
        return rows


def split_rows(text: TextEmbedding) -> list[TextEmbedding]:
    """A TextEmbedding of B rows as B of one row."""
    return [TextEmbedding(text.prompt_embeds[b : b + 1], text.pooled[b : b + 1]) for b in range(len(text))]


def join_rows(rows: Sequence[TextEmbedding]) -> TextEmbedding:
    """The inverse of `split_rows`; all must have one number of tokens."""
    return TextEmbedding(torch.cat([row.prompt_embeds for row in rows]), torch.cat([row.pooled for row in rows]))
