"""Instance maps as pictures, and back."""

import numpy as np
import pytest
import torch
from fourfold.nodes.common.codec import LinearCodec
from fourfold.nodes.common.tiny import load_codec
from fourfold.nodes.instancersr.instances import compact, connected_components
from fourfold.nodes.instancersr.palette import colorize, labels_of_map, palette


def cells(count, height=96, width=128, seed=0):
    """A label map of `count` instances: the pixels nearest to random points."""
    draw = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 2, generator=draw) * torch.tensor([height, width])
    pixels = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)
    return compact(torch.cdist(pixels.reshape(-1, 2).float(), points).argmin(dim=1).reshape(height, width) + 1)


def connected(labels):
    """Every connected area an instance."""
    return compact(torch.from_numpy(connected_components(labels.numpy())) + 1)


def recovered(found, labels):
    """Share of pixels whose instance came back: instances are matched one to one, the best overlaps first."""
    overlaps = torch.zeros(int(found.max()) + 1, int(labels.max()) + 1)
    overlaps.index_put_((found.flatten(), labels.flatten()), torch.ones(labels.numel()), accumulate=True)
    hits = overlaps[0, 0].item()
    overlaps[0], overlaps[:, 0] = 0, 0
    while overlaps.any():
        a, b = np.unravel_index(overlaps.argmax().item(), overlaps.shape)
        hits += overlaps[a, b].item()
        overlaps[a], overlaps[:, b] = 0, 0
    return hits / labels.numel()


def test_the_palette_is_fixed_and_well_separated():
    colors = palette()
    distances = torch.cdist(colors, colors) + torch.eye(35)
    assert colors.shape == (35, 3) and distances.min() > 0.433 and colors.min() == 0 and colors.max() == 1
    assert (colors[:4] * 4).int().tolist() == [[0, 0, 0], [4, 4, 4], [0, 2, 4], [2, 4, 0]], "checkpoints depend on it"
    assert (colors * 4 * torch.arange(1, 36)[:, None]).sum(0).tolist() == [1432, 1314, 1272]


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_a_noisy_map_comes_back(count):
    labels = cells(count, seed=count)
    labels[10:30, 20:50] = 0  # without an instance
    picture = colorize(labels[None])
    noise = 0.05 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
    found = labels_of_map(picture + noise, min_area=16)[0]
    assert recovered(found, compact(labels)) >= 0.99
    assert (found[12:28, 22:48] == 0).all()


def test_more_instances_than_colours_come_back():
    labels = cells(120, 256, 320)
    found = labels_of_map(colorize(labels[None]), min_area=16)[0]
    assert found.max() == 120 and recovered(found, labels) >= 0.995


def test_up_to_34_instances_have_colours_of_their_own():
    labels = cells(34)
    picture = colorize(torch.stack([labels, labels * 0]))
    assert len(picture[0].flatten(1).unique(dim=1).T) == 34
    for label in range(1, 35):
        assert len(picture[0][:, labels == label].unique(dim=1).T) == 1
    assert not picture[1].any(), "no instance is black"


def test_beyond_the_palette_near_instances_do_not_share_a_colour():
    labels = cells(150, 128, 160)
    picture = colorize(labels[None])[0]
    for step in (1, 4):
        for a, b, x, y in ((labels[:, step:], labels[:, :-step], picture[..., step:], picture[..., :-step]),
                           (labels[step:], labels[:-step], picture[:, step:], picture[:, :-step])):
            assert ((x != y).any(0) == (a != b)).all()


def test_colours_depend_on_place_and_not_on_numbers():
    labels = cells(9)
    assert torch.equal(colorize(labels[None]), colorize((labels * 37 % 11 + (labels > 0) * 100)[None]))
    without = torch.where(labels == 9, 0, labels)  # the smallest instance goes; the others keep their colours
    kept = labels != 9
    assert torch.equal(colorize(without[None])[0][:, kept], colorize(labels[None])[0][:, kept])


def test_borders_in_mixed_colours_are_no_instances():
    """What a decoder smears over a border: the mean of two colours may be a third one of the palette."""
    labels = torch.ones(40, 60, dtype=torch.long)
    labels[:, 30:] = 2
    picture = torch.where(labels == 1, palette()[1][:, None, None], palette()[0][:, None, None])
    picture[:, :, 29:31] = 0.5  # grey, between white and black
    found = labels_of_map(picture[None])[0]
    assert found.unique().tolist() == [0, 1] and recovered(found, 2 - labels) > 0.98


def test_thin_instances_stay():
    labels = torch.ones(40, 60, dtype=torch.long)
    labels[:, 30:], labels[10:12], labels[:, 50] = 2, 3, 4
    picture = colorize(labels[None])
    noise = 0.05 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
    assert recovered(labels_of_map(picture + noise, min_area=16)[0], connected(labels)) >= 0.99


def test_an_instance_in_two_pieces_becomes_two_and_a_spot_none():
    labels = torch.zeros(40, 40, dtype=torch.long)
    labels[5:15, 5:15], labels[5:15, 25:37], labels[30:34, 30:34] = 1, 1, 2
    found = labels_of_map(colorize(labels[None]), min_area=17)[0]
    assert found[10, 10] == 2 and found[10, 30] == 1 and found[31, 31] == 0 and found.max() == 2


def test_maps_too_small_for_a_square_are_read_pixel_by_pixel():
    assert labels_of_map(palette()[1:3].T[None, :, None], min_area=1)[0].tolist() == [[1, 2]]
    assert labels_of_map(torch.ones(1, 3, 1, 1))[0].tolist() == [[1]]


def test_maps_survive_the_tiny_familys_codec():
    codec: LinearCodec = load_codec()
    labels = cells(12, 128, 128)
    found = labels_of_map(codec.decode(codec.encode(colorize(labels[None]))), min_area=24)[0]
    assert recovered(found, labels) > 0.97
