"""Label maps: numbering, masks, patches, connected areas, files."""

import numpy as np
import pytest
import torch
from fourfold.nodes.instancersr.instances import (
    absorb_small,
    compact,
    connected_components,
    instance_masks,
    labels_of_masks,
    patch_instances,
    resize_labels,
)
from fourfold.nodes.instancersr.label_files import read_labels, write_labels
from PIL import Image


def test_compact_numbers_by_area_and_leaves_zero():
    labels = torch.tensor([[0, 7, 7, 7], [9, 9, 2, 7]])
    assert compact(labels).tolist() == [[0, 1, 1, 1], [2, 2, 3, 1]]
    assert compact(labels, min_area=2).tolist() == [[0, 1, 1, 1], [2, 2, 0, 1]]
    assert compact(torch.stack([labels, labels * 0])).tolist() == [[[0, 1, 1, 1], [2, 2, 3, 1]], [[0] * 4] * 2]
    assert compact(torch.tensor([[5, 3]])).tolist() == [[2, 1]], "equal areas: by their label"


def test_masks_are_those_of_the_labels():
    masks = instance_masks(torch.tensor([[0, 4], [4, 2]]))
    assert masks.tolist() == [[[0, 0], [0, 1]], [[0, 1], [1, 0]]] and masks.dtype == torch.float32
    assert instance_masks(torch.zeros(2, 3, dtype=torch.long)).tolist() == [[[0.0] * 3] * 2]


def test_small_masks_lie_on_top_of_large_ones():
    body, head, hidden = np.zeros((3, 4, 4), dtype=bool)
    body[:, :3], head[:2, 1:3], hidden[:2, 1:3] = True, True, True
    for masks in ([body, head], [head, body], [hidden, body, head]):
        labels = labels_of_masks(masks, (4, 4))
        assert labels.tolist() == [[1, 2, 2, 0]] * 2 + [[1, 1, 1, 0]] * 2
    assert labels_of_masks([body, head], (4, 4), min_area=5).tolist() == [[1, 0, 0, 0]] * 2 + [[1, 1, 1, 0]] * 2
    assert labels_of_masks([], (2, 3)).tolist() == [[0] * 3] * 2


def test_resizing_keeps_labels():
    labels = torch.tensor([[[1, 60000], [0, 3]]])
    assert resize_labels(labels, (4, 2))[0].tolist() == [[1, 60000]] * 2 + [[0, 3]] * 2
    assert resize_labels(resize_labels(labels, (6, 10)), (2, 2)).tolist() == labels.tolist()
    assert resize_labels(labels[0], (2, 2)) is not None and resize_labels(labels[0], (4, 4)).shape == (4, 4)


# patches ----------------------------------------------------------------------------------------------------------

def test_a_patch_belongs_to_what_covers_most_of_it():
    labels = torch.tensor([[
        [8, 8, 0, 0, 5, 5],
        [8, 3, 0, 2, 6, 6],
        [8, 8, 1, 2, 0, 0],
        [8, 8, 3, 4, 0, 9]]])
    assert patch_instances(labels, (2, 3)).tolist() == [[8, 0, 5, 8, 1, 0]]  # ties: the smaller label
    assert patch_instances(torch.cat([labels, labels.flip(-1)]), (1, 1)).tolist() == [[8], [8]]


def test_one_pixel_instances_and_empty_maps_have_patches():
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    labels[0, 3, 3] = 1
    assert patch_instances(labels, (4, 4)).tolist() == [[0] * 16] * 2
    assert patch_instances(labels, (8, 8))[0].nonzero().tolist() == [[27]], "a patch of one pixel is the instance's"


def test_a_grid_that_does_not_divide_the_map_stretches_it():
    labels = torch.arange(1, 8).repeat_interleave(3)[None, None].repeat(1, 5, 1)  # 5 x 21 px
    assert patch_instances(labels, (2, 7)).tolist() == [[*range(1, 8)] * 2]
    assert patch_instances(torch.full((1, 3, 3), 4), (8, 8)).tolist() == [[4] * 64], "more patches than pixels"


# areas ------------------------------------------------------------------------------------------------------------

def flood(classes):
    """Connected areas the slow way."""
    areas, number = np.full(classes.shape, -1), 0
    for start in zip(*np.indices(classes.shape).reshape(2, -1), strict=True):
        stack = [start] if areas[start] < 0 else []
        while stack:
            y, x = stack.pop()
            if areas[y, x] >= 0:
                continue
            areas[y, x] = number
            for ny, nx in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                inside = 0 <= ny < classes.shape[0] and 0 <= nx < classes.shape[1]
                if inside and classes[ny, nx] == classes[y, x]:
                    stack.append((ny, nx))
        number += areas[start] == number
    return areas


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_connected_areas_are_those_of_a_flood_fill(classes):
    picture = np.random.default_rng(classes).integers(0, classes, (23, 31))
    ours, theirs = connected_components(picture), flood(picture)
    pairs = np.unique(np.stack([ours.ravel(), theirs.ravel()]), axis=1)
    assert pairs.shape[1] == len(np.unique(theirs)) == ours.max() + 1 == len(np.unique(ours))


def test_a_spiral_is_one_area():
    spiral = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 1], [1, 0, 0, 1, 0, 1],
                       [1, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]])
    assert connected_components(spiral).max() == 1
    assert connected_components(np.array([[4]])).tolist() == [[0]]


def test_spots_go_to_the_neighbour_with_the_longest_border():
    areas = connected_components(np.array([[1, 1, 1, 3, 3], [1, 1, 2, 3, 3], [1, 1, 2, 3, 3], [1, 1, 4, 4, 4]]))
    cleaned = absorb_small(areas, 3)
    assert len(np.unique(cleaned)) == 3 and cleaned[1, 2] == cleaned[2, 2] == cleaned[1, 1]
    assert len(np.unique(absorb_small(areas, 4))) == 2 and len(np.unique(absorb_small(areas, 1))) == 4


@pytest.mark.parametrize("min_area", [5, 10**6])
def test_no_spot_is_left_and_what_is_large_stays(min_area):
    noise = np.random.default_rng(0).integers(0, 3, (40, 40))
    noise[:20, :20] = 7
    areas = connected_components(noise)
    cleaned = absorb_small(areas, min_area)
    sizes = np.bincount(cleaned.ravel())
    assert (sizes >= min_area).all() or len(sizes) == 1
    assert len(np.unique(cleaned[:20, :20])) == 1


# files ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("top", [1, 255, 256, 65535])
def test_written_labels_are_read_back(tmp_path, top):
    labels = torch.tensor([[0, 1, top], [top, 0, 3]])
    write_labels(tmp_path / "map.png", labels, {"made by": "a test"})
    assert torch.equal(read_labels(tmp_path / "map.png"), labels)
    with Image.open(tmp_path / "map.png") as image:
        assert image.text["made by"] == "a test" and (image.mode == "L") == (top < 256)
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]


def test_palette_images_are_read_by_index(tmp_path):
    image = Image.fromarray(np.array([[2, 0], [1, 1]], dtype=np.uint8), mode="L")
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    assert image.mode == "P"
    image.save(tmp_path / "map.png")
    assert read_labels(tmp_path / "map.png").tolist() == [[2, 0], [1, 1]]


def test_what_is_no_label_map_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no label map .*map\.png"):
        read_labels(tmp_path / "map.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "colours.png")
    with pytest.raises(ValueError, match=r"colours\.png has pixels of mode RGB; a label map has one channel"):
        read_labels(tmp_path / "colours.png")
    write_labels(tmp_path / "cut.png", torch.randint(0, 256, (50, 50)))
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.png is damaged or cut off"):
        read_labels(tmp_path / "cut.png")
    (tmp_path / "text.png").write_text("labels")
    with pytest.raises(ValueError, match=r"text\.png is not a picture"):
        read_labels(tmp_path / "text.png")
    for wrong in (torch.tensor([[-1]]), torch.tensor([[65536]]), torch.zeros(1, 2, 2), torch.zeros(0, 2)):
        with pytest.raises(ValueError, match=r"expected \(H, W\) with whole numbers in 0..65535"):
            write_labels(tmp_path / "wrong.png", wrong)
