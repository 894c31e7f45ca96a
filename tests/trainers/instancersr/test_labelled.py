"""Photographs with label maps: both are cut and turned alike, and what is missing or does not fit is named."""

import shutil

import pytest
import torch
from fourfold.nodes.common.images import write_image
from fourfold.nodes.instancersr.instances import patch_instances
from fourfold.nodes.instancersr.label_files import read_labels, write_labels
from fourfold.nodes.instancersr.palette import labels_of_map, palette
from fourfold.trainers.labelled import LabelledPhotographs


@pytest.fixture
def same(tmp_path):
    """Photographs whose pixels, times 255, are their labels: 6 x 9 fields of 8 px, another number each."""
    (tmp_path / "pictures" / "inside").mkdir(parents=True)
    for name, shift in (("a", 0), ("b", 60)):
        labels = (torch.arange(54).reshape(6, 9) * 2 + shift).repeat_interleave(8, 0).repeat_interleave(8, 1)
        write_image(tmp_path / "pictures" / "inside" / f"{name}.png", labels.expand(1, 3, -1, -1) / 255, {})
        write_labels(tmp_path / "maps" / "inside" / f"{name}.png", labels)
    return tmp_path


def test_labels_are_cut_and_turned_as_the_picture(same):
    crops = LabelledPhotographs(same / "pictures", 24, None, (6, 6), same / "maps", captions=False, min_scale=1)
    turned = set()
    for index in range(40):
        item, labels = crops[index], crops.labels_of(index)
        assert torch.equal((item["hr"][0] * 255).round().long(), labels)
        which, cut = crops.choose(index)
        assert item["picture"] == which and torch.equal(item["instances"], patch_instances(labels[None], (6, 6))[0])
        turned.add((cut.turns, cut.mirrored))
    assert len(turned) == 8


def test_labels_are_shrunk_with_the_picture(same):
    """Inside a field, away from its borders, the shrunk picture still is the shrunk map."""
    crops = LabelledPhotographs(same / "pictures", 24, None, (6, 6), same / "maps", captions=False, min_scale=0.5)
    shrunk = 0
    for index in range(20):
        _, cut = crops.choose(index)
        picture, labels = crops[index]["hr"][0] * 255, crops.labels_of(index)
        wide = torch.nn.functional.max_pool2d(labels[None].float(), 5, 1, 2)[0]
        narrow = -torch.nn.functional.max_pool2d(-labels[None].float(), 5, 1, 2)[0]
        inside = wide == narrow
        shrunk += cut.side > 32 and bool(inside.any())
        assert (picture - labels)[inside].abs().max() < 1.5 if inside.any() else True
    assert shrunk > 3


def test_maps_are_drawn_in_the_palettes_colours(config, crops):
    items = crops(config())
    item, labels = items[0], items.labels_of(0)
    assert item["map"].shape == (3, 32, 32) and item["lr"].shape == (3, 8, 8)
    used = torch.cdist(item["map"].flatten(1).T, palette()).min(dim=1).values
    assert float(used.max()) < 1e-6
    found = labels_of_map(item["map"][None], min_area=1)[0]
    pairs = torch.stack([found.flatten(), labels.flatten()]).unique(dim=1)
    assert pairs.shape[1] == len(labels.unique()), "an instance is one colour, another instance another one"


def test_same_index_same_item(config, crops):
    first, again = crops(config()), crops(config())
    for name, value in first[5].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(again[5][name])) if name != "caption" else True
    assert not torch.equal(first[5]["map"], first[6]["map"])


def test_maps_beside_the_photographs(photographs, instances, tmp_path):
    for path in photographs.iterdir():
        picture = torch.rand(1, 3, 40, 56)
        write_image(tmp_path / f"{path.stem}.jpg", picture, {})
        shutil.copy(instances / path.name, tmp_path)
    crops = LabelledPhotographs(tmp_path, 32, None, (4, 4), captions=False)
    assert [path.name for path in crops.labels.paths] == ["astronaut.png", "cat.png", "coffee.png"]
    assert int(crops.labels_of(0).max()) <= 9


def test_large_labels_are_kept(photographs, instances, tmp_path):
    shutil.copytree(instances, tmp_path / "maps")
    write_labels(tmp_path / "maps" / "cat.png", read_labels(instances / "cat.png") + 60_000)
    crops = LabelledPhotographs(photographs, 32, None, (4, 4), tmp_path / "maps", captions=False)
    which = [path.stem for path in crops.pictures.paths].index("cat")
    index = next(i for i in range(99) if crops.choose(i)[0] == which)
    assert int(crops.labels_of(index).min()) >= 60_000


def test_a_missing_map_is_named(photographs, instances, tmp_path):
    shutil.copytree(instances, tmp_path / "maps")
    (tmp_path / "maps" / "coffee.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 .*coffee\.png, whose map would be .*maps/coffee\.png"):
        LabelledPhotographs(photographs, 32, None, (4, 4), tmp_path / "maps")
    with pytest.raises(FileNotFoundError, match=r"3 of 3 .*astronaut\.png, whose map would be a PNG beside it"):
        LabelledPhotographs(photographs, 32, None, (4, 4))


def test_a_map_of_another_size_is_named(photographs, instances, tmp_path):
    shutil.copytree(instances, tmp_path / "maps")
    write_labels(tmp_path / "maps" / "cat.png", torch.ones(40, 54, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"cat\.png is 40 x 54 px, but its photograph 40 x 56 px"):
        LabelledPhotographs(photographs, 32, None, (4, 4), tmp_path / "maps")
    write_labels(tmp_path / "maps" / "cat.png", torch.ones(56, 40, dtype=torch.int64))
    crops = LabelledPhotographs(photographs, 32, None, (4, 4), tmp_path / "maps", captions=False)
    with pytest.raises(ValueError, match=r"cat\.png is 56 x 40 px, but its photograph 40 x 56 px"):
        [crops.labels_of(i) for i in range(20)]
