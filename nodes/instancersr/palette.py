"""Instance maps as pictures: every instance in one colour of a fixed palette, and back (InstanceRSR section 2.1).

not in the paper: the palette, which instance gets which colour, and how a decoded map is cleaned.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from .instances import absorb_small, compact, connected_components

REACH = 4  # pixels: instances this near to each other do not share a colour
CLEAR = 0.16  # pixels this near to a colour of the palette are no mixtures; noise of 5% rarely takes one further
_PIXELS = 2**18  # compared with the palette at a time


@lru_cache(maxsize=1)
def palette() -> Tensor:
    """35 colours in 0..1, (35, 3); the first one, black, is for pixels without an instance.

    The colour cube's body-centred lattice, {0, 1/2, 1}^3 and {1/4, 3/4}^3: no two are nearer than sqrt(3) / 4 = 0.43.
    Ordered so that each is as far as can be from those before it.
    """
    levels = [(r, g, b) for s in ((0, 2, 4), (1, 3)) for r in s for g in s for b in s]
    points = np.array(sorted(levels))  # in quarters, so that distances are whole numbers
    order, nearest = [0], np.full(len(points), 10**6)
    while len(order) < len(points):
        nearest = np.minimum(nearest, ((points - points[order[-1]]) ** 2).sum(axis=1))
        order.append(int(nearest.argmax()))
    with torch.inference_mode(False):
        return torch.tensor(points[order] / 4, dtype=torch.float32, device="cpu")


@lru_cache(maxsize=1)
def _sites() -> np.ndarray:
    """A place in the unit square for every colour but black, evenly spread: (34, 2), y and x."""
    steps = np.arange(1, len(palette()))[:, None] * np.array([0.7548776662, 0.5698402910])
    return (0.5 + steps) % 1


def colorize(labels: Tensor) -> Tensor:
    """Label maps -> pictures: (B, H, W) -> (B, 3, H, W) float32 in 0..1, on the labels' device.

    Each colour has a place in the picture. From the largest instance on, each takes the free colour whose place is
    nearest to its centre: what colour an instance has can then be told from where it is, and small changes of the map
    leave the other colours as they are. Once all colours are taken (34), those are free that no instance within 4 px
    has; a picture of more instances comes back whole because connected areas are told apart.
    """
    colors = palette().to(labels.device)
    return torch.stack([colors[_color_indices(each)] for each in labels]).permute(0, 3, 1, 2).contiguous()


def _color_indices(labels: Tensor) -> Tensor:
    """(H, W) labels -> (H, W) rows of the palette."""
    ranked = compact(labels).cpu().numpy()
    count, chosen = int(ranked.max()), [0]
    near = _near(ranked) if count >= len(palette()) else {}
    centres, used = _centres(ranked), np.zeros(len(_sites()), dtype=int)
    for instance in range(1, count + 1):
        taken = used.copy()
        if used.all():
            taken[:] = 0
            for other in near.get(instance, ()):
                if other < instance:
                    taken[chosen[other] - 1] += 1
        distance = ((_sites() - centres[instance]) ** 2).sum(axis=1)
        best = int(np.lexsort((distance, taken))[0])
        used[best] += 1
        chosen.append(best + 1)
    return torch.tensor(chosen, device=labels.device)[torch.from_numpy(ranked).to(labels.device)]


def _centres(ranked: np.ndarray) -> np.ndarray:
    """Mean place (y, x) of every label, in 0..1."""
    height, width = ranked.shape
    flat, areas = ranked.ravel(), np.maximum(np.bincount(ranked.ravel()), 1)
    rows, columns = np.indices(ranked.shape).reshape(2, -1)
    means = (np.bincount(flat, weights=place + 0.5) / areas for place in (rows, columns))
    return np.stack([mean / side for mean, side in zip(means, (height, width), strict=True)], axis=1)


def _near(ranked: np.ndarray) -> dict[int, set[int]]:
    """For each label those that come within REACH pixels of it in its rows and columns."""
    near: dict[int, set[int]] = {}
    for step in range(1, REACH + 1):
        for a, b in ((ranked[:, :-step], ranked[:, step:]), (ranked[:-step], ranked[step:])):
            for x, y in np.unique(np.stack([a[a != b], b[a != b]], axis=1), axis=0).tolist():
                near.setdefault(x, set()).add(y)
                near.setdefault(y, set()).add(x)
    return near


def labels_of_map(pictures: Tensor, min_area: int = 64) -> Tensor:
    """Decoded instance maps -> label maps: nearest colour, cleaned, then connected areas.

    The mixed colours along a border are the colour of no instance: they go to the areas on its sides, and spots to
    what they lie in.

    Args:
        pictures: (B, 3, H, W) in 0..1.
        min_area: pixels; smaller connected areas are noise.
    Returns: (B, H, W) int64 on the CPU, 0 = no instance, 1 = the largest instance, and so on.
    """
    return torch.stack([_labels(picture, min_area) for picture in pictures.float().cpu()])


def _labels(picture: Tensor, min_area: int) -> Tensor:
    colors = _without_borders(*_nearest(picture))
    areas = absorb_small(connected_components(colors), min_area)
    color_of_area = np.zeros(areas.max() + 1, dtype=np.int64)
    largest = np.zeros_like(color_of_area)
    pairs, sizes = np.unique(np.stack([areas.ravel(), colors.ravel()]), axis=1, return_counts=True)
    for area, color, size in zip(*pairs.tolist(), sizes.tolist(), strict=True):
        if size > largest[area]:
            color_of_area[area], largest[area] = color, size
    merged = connected_components(color_of_area[areas])  # a spot between two parts of an instance joins them
    return compact(torch.from_numpy(np.where(color_of_area[areas] > 0, merged + 1, 0)))


def _nearest(picture: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(3, H, W) -> rows of the palette, and whether the pixel is clearly of that colour, (H, W) each."""
    pixels, rows, clear = picture.flatten(1).T, [], []
    for part in pixels.split(_PIXELS):
        distance, row = torch.cdist(part, palette()).min(dim=1)
        rows.append(row)
        clear.append(distance < CLEAR)
    return tuple(torch.cat(parts).reshape(picture.shape[1:]).numpy() for parts in (rows, clear))


def _without_borders(colors: np.ndarray, clear: np.ndarray) -> np.ndarray:
    """Gives what a decoder smears over a border to the areas on its sides.

    Kept is what some square of 3 x 3 px of one colour covers, and thinner areas of a clear colour that is no mixture
    of those on both sides. The rest takes the colour of the nearest pixel kept.
    """
    classes = torch.from_numpy(colors)[None, None].float()
    uniform = max_pool2d(classes, 3, 1, 1) == -max_pool2d(-classes, 3, 1, 1)
    kept = max_pool2d(uniform.float(), 3, 1, 1)[0, 0].bool().numpy()
    if not kept.any():
        return colors
    solid = np.where(kept, colors, -1)
    across = _mixed(solid, colors)
    down = _mixed(solid.T, colors.T).T
    filled = np.where(kept | (clear & ~across & ~down), colors, -1)
    while (filled < 0).any():
        before = np.pad(filled, 1, constant_values=-1)
        for beside in (before[1:-1, :-2], before[1:-1, 2:], before[:-2, 1:-1], before[2:, 1:-1]):
            filled = np.where(filled < 0, beside, filled)
    return filled


def _mixed(solid: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Where a colour lies between those of the next solid pixels in its row: |a - c| + |c - b| = |a - b|, nearly."""
    left, right = _last_solid(solid), _last_solid(solid[:, ::-1])[:, ::-1]
    apart = torch.cdist(palette(), palette()).numpy()
    detour = apart[left, colors] + apart[colors, right]
    return (solid < 0) & (left >= 0) & (right >= 0) & (left != right) & (detour < 1.05 * apart[left, right])


def _last_solid(solid: np.ndarray) -> np.ndarray:
    """For each pixel the last value of its row up to it that is not -1; -1 where there is none."""
    places = np.where(solid >= 0, np.arange(solid.shape[1]), 0)
    return np.take_along_axis(solid, np.maximum.accumulate(places, axis=1), axis=1)
