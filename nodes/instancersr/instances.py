"""Label maps: which instance a pixel belongs to.

A label map is (B, H, W) or (H, W) int64; 0 = no instance, 1, 2, ... = instances. Any whole numbers from 0 will do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate


def compact(labels: Tensor, min_area: int = 1) -> Tensor:
    """Renumbers the instances of each picture from 1 on, the largest first; 0 stays 0.

    Args:
        labels: (..., H, W).
        min_area: pixels; smaller instances become 0.
    """
    if labels.dim() > 2:
        return torch.stack([compact(each, min_area) for each in labels])
    values, inverse, areas = torch.unique(labels, return_inverse=True, return_counts=True)
    ranked = sorted((-area, value) for area, value in zip(areas.tolist(), values.tolist(), strict=True) if value)
    ranks = {value: rank for rank, (area, value) in enumerate(ranked, start=1) if -area >= min_area}
    return torch.tensor([ranks.get(value, 0) for value in values.tolist()], device=labels.device)[inverse]


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., H, W) -> (..., h, w): every pixel takes the label of the nearest one."""
    if tuple(labels.shape[-2:]) == tuple(size):
        return labels
    flat = labels.reshape(-1, 1, *labels.shape[-2:]).float()  # exact to 2^24
    return interpolate(flat, size=size, mode="nearest-exact").long().reshape(*labels.shape[:-2], *size)


def instance_masks(labels: Tensor) -> Tensor:
    """Masks of the instances, as ComfyUI's MASK batch: (H, W) -> (K, H, W) float32 of 0 and 1, by rising label.

    Without instances there is one empty mask: a batch of none would stop the nodes that follow.
    """
    values = torch.unique(labels)
    values = values[values != 0] if bool(labels.any()) else values - 1  # a label that nothing has
    return (labels == values[:, None, None]).float()


def labels_of_masks(masks: Sequence[np.ndarray] | Tensor, size: tuple[int, int], min_area: int = 1) -> Tensor:
    """Overlapping masks -> label map (H, W): smaller masks lie on top of larger ones, so that parts stay visible.

    Args:
        masks: (H, W) each, nonzero inside.
        size: (H, W), for pictures without masks.
        min_area: pixels; what shows less of itself is left out.
    """
    masks = [np.asarray(mask, dtype=bool) for mask in masks]
    labels = np.zeros(size, dtype=np.int64)
    for label, mask in enumerate(sorted(masks, key=lambda mask: -int(mask.sum())), start=1):
        labels[mask] = label
    return compact(torch.from_numpy(labels), min_area)


def patch_instances(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The instance that covers most of each patch; 0 counts as one instance, and the smaller label wins a tie.

    Args:
        labels: (B, H, W); where the sides are no multiples of the grid, they are stretched to some.
        grid: (h, w), patches.
    Returns: (B, h * w) int64, row by row: labels of the map.
    """
    height, width = grid
    sides = [max(1, round(side / patches)) for side, patches in zip(labels.shape[-2:], grid, strict=True)]
    labels = resize_labels(labels, (height * sides[0], width * sides[1]))
    assigned = []
    for each in labels:
        values, index = torch.unique(each, return_inverse=True)
        patches = index.reshape(height, sides[0], width, sides[1]).transpose(1, 2).reshape(height * width, -1)
        patches = patches + torch.arange(height * width, device=index.device)[:, None] * len(values)
        covers = torch.bincount(patches.flatten(), minlength=height * width * len(values)).reshape(-1, len(values))
        first = (covers == covers.max(dim=1, keepdim=True).values).int().argmax(dim=1)
        assigned.append(values[first])
    return torch.stack(assigned)


def connected_components(classes: np.ndarray) -> np.ndarray:
    """Numbers the 4-connected areas of equal class: (H, W) whole numbers -> (H, W) int64 from 0 on, without gaps.

    Runs of equal pixels are joined row by row; a forest of the joined runs is flattened until nothing changes.
    """
    height, width = classes.shape
    starts = np.ones((height, width), dtype=bool)
    starts[:, 1:] = classes[:, 1:] != classes[:, :-1]
    runs = np.cumsum(starts.ravel()).reshape(height, width) - 1
    joined = classes[1:] == classes[:-1]
    edges = np.unique(np.stack([runs[:-1][joined], runs[1:][joined]], axis=1), axis=0)
    parent = np.arange(runs[-1, -1] + 1)
    while len(edges):
        a, b = parent[edges[:, 0]], parent[edges[:, 1]]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        parent = _flattened(parent)
        edges = edges[parent[edges[:, 0]] != parent[edges[:, 1]]]
    return np.unique(parent, return_inverse=True)[1].reshape(-1)[runs]


def absorb_small(areas: np.ndarray, min_area: int) -> np.ndarray:
    """Gives every connected area below `min_area` pixels to the neighbour that it shares most of its border with,
    large neighbours before small ones.

    Args:
        areas: (H, W) numbers of connected areas.
    Returns: (H, W) int64: the numbers of the areas that are left.
    """
    areas = np.unique(areas, return_inverse=True)[1].reshape(areas.shape)
    while True:
        sizes = np.bincount(areas.ravel())
        small = sizes < min_area
        if not small.any() or len(sizes) == 1:
            return areas
        pairs, lengths = _borders(areas)
        a, b = pairs.T
        # a small area waits for smaller ones to join it; the others go to a large or a larger neighbour
        goes = small[a] & (~small[b] | (sizes[b] > sizes[a]) | ((sizes[b] == sizes[a]) & (b < a)))
        a, b, lengths = a[goes], b[goes], lengths[goes]
        last_is_best = np.lexsort((lengths, ~small[b], a))
        parent = np.arange(len(sizes))
        parent[a[last_is_best]] = b[last_is_best]
        areas = np.unique(_flattened(parent)[areas], return_inverse=True)[1].reshape(areas.shape)


def _flattened(parent: np.ndarray) -> np.ndarray:
    while True:
        above = parent[parent]
        if np.array_equal(above, parent):
            return parent
        parent = above


def _borders(areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of touching areas, each both ways round, (P, 2), and the length of their border in pixels, (P,)."""
    across = np.stack([areas[:, :-1].ravel(), areas[:, 1:].ravel()], axis=1)
    down = np.stack([areas[:-1].ravel(), areas[1:].ravel()], axis=1)
    pairs = np.concatenate([across, down])
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0, return_counts=True)
