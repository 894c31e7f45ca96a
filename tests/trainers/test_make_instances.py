"""Label maps of a folder: names, resuming, what is left out."""

import json
import logging

import pytest
import torch
from fourfold.nodes.common.images import write_image
from fourfold.nodes.instancersr.label_files import read_labels, write_labels
from fourfold.trainers import make_instances as script
from fourfold.trainers.make_instances import InstancesConfig, main, make_instances, plan
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture
def photographs(tmp_path):
    """Three photographs, one in a subfolder, of different sizes."""
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    for seed, (name, size) in enumerate({"b.png": (20, 24), "a.jpg": (16, 30), "more/a.webp": (25, 17)}.items()):
        write_image(folder / name, torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed)))
    return folder


@pytest.fixture
def segment():
    """Notes what it is shown; the left half of a picture is instance 1."""

    def left_half(picture):
        left_half.seen.append(tuple(picture.shape))
        labels = torch.zeros(picture.shape[-2:], dtype=torch.long)
        labels[:, : picture.shape[-1] // 2] = 1
        return [labels]

    left_half.seen = []
    return left_half


def test_every_photograph_has_a_map_of_its_name_and_size(photographs, segment, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pairs = plan(photographs, tmp_path / "maps")
    assert make_instances(pairs, segment, {"fourfold.instances": "{}"}) == 3
    for name, size in (("b", (20, 24)), ("a", (16, 30)), ("more/a", (25, 17))):
        path = tmp_path / "maps" / f"{name}.png"
        labels = read_labels(path)
        assert tuple(labels.shape) == size and labels[:, 0].eq(1).all() and labels[:, -1].eq(0).all()
        assert Image.open(path).text == {"fourfold.instances": "{}"}
    assert "0 of 3 label maps are there already" in caplog.text and "3 of 3: a.webp, 1 instances" in caplog.text


def test_a_stopped_run_goes_on_where_it_was(photographs, segment, tmp_path):
    pairs = plan(photographs, tmp_path / "maps")

    def stopped(picture):
        if len(segment.seen) == 2:
            raise KeyboardInterrupt
        return segment(picture)

    with pytest.raises(KeyboardInterrupt):
        make_instances(pairs, stopped)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "maps").rglob("*") if path.is_file()}
    assert len(first) == 2, "whole maps and no temporary files"
    assert make_instances(pairs, segment) == 1 and len(segment.seen) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    assert make_instances(pairs, segment) == 0
    assert make_instances(pairs, segment, overwrite=True) == 3


def test_maps_may_lie_among_the_photographs(photographs, segment):
    output = photographs / "instances"
    make_instances(plan(photographs, output), segment)
    assert len(plan(photographs, output)) == 3, "maps are not taken for photographs"
    assert [target.parent.name for _, target in plan(photographs / "more", photographs)] == ["photographs"]
    with pytest.raises(ValueError, match=r"map of .*b\.png would replace it"):
        plan(photographs, photographs)


def test_two_photographs_of_one_name_are_refused(photographs, tmp_path):
    write_image(photographs / "a.webp", torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"a\.jpg and .*a\.webp would share the map"):
        plan(photographs, tmp_path / "maps")


def test_a_damaged_photograph_is_named_and_does_not_stop_the_others(photographs, segment, tmp_path):
    (photographs / "b.png").write_bytes((photographs / "b.png").read_bytes()[:60])
    pairs = plan(photographs, tmp_path / "maps")
    with pytest.raises(ValueError, match=r"1 of 3 photographs could not be read.*b\.png"):
        make_instances(pairs, segment)
    assert len(segment.seen) == 2 and (tmp_path / "maps" / "more" / "a.png").is_file()


def test_the_command_line_runs_sam(photographs, small_sam, small_sam_builder, tmp_path, monkeypatch):
    from segment_anything import sam_model_registry

    monkeypatch.setattr("fourfold.nodes.instancersr.sam._WIDTHS", {32: "vit_b"})
    monkeypatch.setitem(sam_model_registry, "vit_b", small_sam_builder)
    save_file(small_sam.state_dict(), tmp_path / "sam.safetensors")
    write_labels(tmp_path / "maps" / "b.png", torch.ones(20, 24, dtype=torch.long))
    arguments = ["--photographs", photographs, "--sam", tmp_path / "sam.safetensors", "--output", tmp_path / "maps",
                 "--points_per_side", 3, "--pred_iou_thresh", -1e9, "--stability_score_thresh", -1,
                 "--box_nms_thresh", 1, "--min_area", 2, "--device", "cpu"]
    assert main([str(argument) for argument in arguments]) == 2
    labels = read_labels(tmp_path / "maps" / "a.png")
    assert labels.shape == (16, 30) and labels.max() >= 1
    described = json.loads(Image.open(tmp_path / "maps" / "a.png").text["fourfold.instances"])
    assert described["sam"] == "sam.safetensors" and described["points_per_side"] == 3
    assert read_labels(tmp_path / "maps" / "b.png").eq(1).all(), "what was there is kept"


def test_settings_default_to_sams():
    assert InstancesConfig().settings == script.SamSettings()
