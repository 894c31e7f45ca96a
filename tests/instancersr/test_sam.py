"""Instances by a small random SAM."""

import pytest
import torch
from fourfold.nodes.common.errors import CorruptCheckpointError, MismatchedKeysError, WrongFileError
from fourfold.nodes.instancersr import sam
from fourfold.nodes.instancersr.sam import SamInstances, SamSettings, load_sam
from safetensors.torch import save_file

EVERY = dict(points_per_side=4, pred_iou_thresh=-1e9, stability_score_thresh=-1.0, box_nms_thresh=1.0)  # all it finds
ALL = SamSettings(**EVERY, min_area=1)


def image(batch=1, channels=3, height=40, width=56, seed=0):
    blocks = torch.rand(batch, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(blocks, (height, width), mode="nearest")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_label_maps_have_the_pictures_size_and_rising_labels(small_sam, channels):
    done = []
    found = SamInstances(small_sam, ALL)(image(2, channels), lambda i, n: done.append((i, n)))
    assert done == [(1, 2), (2, 2)] and len(found) == 2
    for labels in found:
        assert labels.shape == (40, 56) and labels.dtype == torch.int64
        areas = torch.bincount(labels.flatten())[1:]
        assert len(areas) > 1 and areas.min() >= 1 and areas.tolist() == sorted(areas.tolist(), reverse=True)


def test_it_is_what_segment_anything_finds_painted_from_large_to_small(small_sam):
    from segment_anything import SamAutomaticMaskGenerator

    picture = image()
    pixels = (picture[0].permute(1, 2, 0) * 255).round().byte().numpy()
    masks = SamAutomaticMaskGenerator(small_sam, **EVERY).generate(pixels)
    smallest = min(masks, key=lambda mask: mask["area"])["segmentation"]
    labels = SamInstances(small_sam, ALL)(picture)[0]
    assert len(masks) > 1 and len(labels[torch.from_numpy(smallest)].unique()) == 1
    covered = torch.from_numpy(sum(mask["segmentation"].astype(int) for mask in masks)) > 0
    assert torch.equal(labels > 0, covered)


def test_settings_reach_segment_anything(small_sam):
    assert not SamInstances(small_sam, SamSettings(points_per_side=4, pred_iou_thresh=1e9))(image())[0].any()
    assert not SamInstances(small_sam, SamSettings(**EVERY, min_area=10**6))(image())[0].any()


# checkpoints ------------------------------------------------------------------------------------------------------

@pytest.fixture
def sizes(small_sam_builder, monkeypatch):
    """Makes the small SAM one of the registry's sizes."""
    from segment_anything import sam_model_registry

    monkeypatch.setattr(sam, "_WIDTHS", {32: "vit_b"})
    monkeypatch.setitem(sam_model_registry, "vit_b", small_sam_builder)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_gives_the_network_it_was_saved_from(small_sam, sizes, tmp_path, suffix):
    path = tmp_path / f"sam{suffix}"
    state = small_sam.state_dict()
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    loaded = load_sam(path)
    assert not loaded.training and not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(SamInstances(loaded, ALL)(image())[0], SamInstances(small_sam, ALL)(image())[0])


def test_wrong_missing_and_broken_checkpoints_are_named(small_sam, sizes, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"Segment Anything checkpoint is missing.*segment-anything"):
        load_sam(tmp_path / "sam_vit_h_4b8939.pth")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WrongFileError, match=r"other\.safetensors.*Segment Anything checkpoint is needed.*sam_vit_b"):
        load_sam(tmp_path / "other.safetensors")
    state = small_sam.state_dict()
    torch.save({name: value for name, value in state.items() if "iou_prediction" not in name}, tmp_path / "part.pth")
    with pytest.raises(MismatchedKeysError, match=r"part\.pth does not fit Sam: 4 missing"):
        load_sam(tmp_path / "part.pth")
    torch.save(state, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:2000])
    with pytest.raises(CorruptCheckpointError, match=r"cut\.pth is truncated"):
        load_sam(tmp_path / "cut.pth")
    monkeypatch.setattr(sam, "_WIDTHS", {768: "vit_b"})
    save_file(state, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=r"image encoder of shape \(1, 4, 4, 32\), which is no SAM of known size"):
        load_sam(tmp_path / "small.safetensors")


def test_the_published_sizes_are_told_apart_by_their_widths():
    segment_anything = pytest.importorskip("segment_anything", reason="needs segment-anything and torchvision")
    for width, name in sam._WIDTHS.items():
        with torch.device("meta"):
            model = segment_anything.sam_model_registry[name](checkpoint=None)
        assert model.state_dict()["image_encoder.pos_embed"].shape == (1, 64, 64, width)
        assert model.pixel_mean.flatten().tolist() == pytest.approx(sam._MEAN)
