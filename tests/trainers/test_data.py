"""Photographs to crops: every item a function of its index alone."""

import json

import pytest
import torch
from fourfold.nodes.common.degradation import LIGHT, degrade
from fourfold.trainers import data
from fourfold.trainers.data import Photographs, PictureCache, find_images
from fourfold.trainers.order import BatchOrder, Shuffled, generator_of, loader, seed_of, to_device
from PIL import Image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four photographs (48x64 and 80x56, one grey), a label map, a small one, a hidden one and a caption."""
    root = tmp_path_factory.mktemp("photographs")
    (root / "sub").mkdir()
    (root / "maps").mkdir()
    for name, size, seed in (("b.jpg", (64, 48), 1), ("a.png", (64, 48), 2), ("sub/c.jpg", (56, 80), 3)):
        noise = torch.randint(256, (size[1] // 8, size[0] // 8, 3), generator=torch.Generator().manual_seed(seed))
        Image.fromarray(noise.to(torch.uint8).numpy()).resize(size, Image.Resampling.BICUBIC).save(root / name)
    Image.linear_gradient("L").resize((64, 48)).save(root / "grey.png")
    Image.new("L", (64, 48), 3).save(root / "maps" / "b.png")
    Image.new("RGB", (20, 40)).save(root / "small.png")
    Image.new("RGB", (64, 48)).save(root / ".hidden.png")
    (root / "a.txt").write_text("a painted wall\n")
    return root


def equal(a, b):
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in (a | b))


def test_images_are_found_sorted_without_label_maps_and_hidden_files(folder):
    assert [p.relative_to(folder).as_posix() for p in find_images(folder)] == [
        "a.png", "b.jpg", "grey.png", "small.png", "sub/c.jpg"]


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(FileNotFoundError, match="holds no images"):
        find_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_images(tmp_path / "nowhere")


def test_items_depend_on_seed_and_index_alone(folder):
    first, second = (Photographs(folder, 32, LIGHT, seed=5) for _ in range(2))
    forwards = [first[i] for i in range(12)]
    torch.manual_seed(99)
    backwards = [second[i] for i in reversed(range(12))][::-1]
    assert all(map(equal, forwards, backwards))
    assert not torch.equal(forwards[0]["hr"], forwards[1]["hr"])
    assert not equal(forwards[3], Photographs(folder, 32, LIGHT, seed=6)[3])
    assert Photographs(folder, 32, LIGHT, seed=5)[10**9]["index"] == 10**9


def test_items_are_what_they_say(folder):
    photographs = Photographs(folder, 32, LIGHT, min_scale=0.5)
    captions = set()
    for i in range(30):
        item = photographs[i]
        assert item["hr"].shape == (3, 32, 32) and item["lr"].shape == (3, 8, 8)
        assert item["hr"].dtype == torch.float32 and item["hr"].min() >= 0 and item["hr"].max() <= 1
        expected = degrade(item["hr"][None], LIGHT, seed_of(0, "degradation", i))[0]
        assert torch.equal(item["lr"], expected)
        captions.add(item["caption"])
    assert "a painted wall" in captions and "" not in captions and len(captions) > 2


def test_without_shrinking_a_crop_is_a_part_of_the_picture(folder, tmp_path):
    Image.open(folder / "a.png").save(tmp_path / "only.png")
    picture = PictureCache([tmp_path / "only.png"], 0)[0].float() / 255
    photographs = Photographs(tmp_path, 32, None, min_scale=1.0)
    turned = 0
    for i in range(12):
        hr = photographs[i]["hr"]
        windows = picture.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, rows, columns, 32, 32)
        ways = [torch.rot90(m, k, (1, 2)) for m in (hr, hr.flip(2)) for k in range(4)]
        found = [bool((windows == w[:, None, None]).all(dim=(0, 3, 4)).any()) for w in ways]
        assert any(found)
        turned += not found[0]
    assert turned > 6  # an eighth stays as it is


def test_shrinking_takes_in_more_of_the_picture(folder, tmp_path):
    ramp = torch.linspace(0, 255, 128).round().to(torch.uint8).expand(128, 128)
    Image.fromarray(ramp.numpy().copy()).convert("RGB").save(tmp_path / "ramp.png")
    spans = [float(hr.max() - hr.min()) for hr in (Photographs(tmp_path, 32, None, min_scale=0.25)[i]["hr"]
                                                   for i in range(40))]
    assert min(spans) < 0.35 and max(spans) > 0.8  # 32 px of the ramp are 0.24 of it, 128 px all


def test_pictures_are_decoded_once(folder, monkeypatch):
    count = []
    monkeypatch.setattr(data, "read_image", lambda path, real=data.read_image: count.append(path) or real(path))
    photographs = Photographs(folder, 32, None)
    assert len(count) == 4
    for i in range(20):
        photographs[i]
    assert len(count) == 4 and photographs.pictures.used == 3 * (3 * 64 * 48 + 80 * 56)


def test_a_small_budget_gives_the_same_items(folder):
    rich, poor = Photographs(folder, 32, LIGHT), Photographs(folder, 32, LIGHT, cache_bytes=10_000)
    assert all(equal(rich[i], poor[i]) for i in range(8)) and poor.pictures.used <= 10_000


def test_small_pictures_are_left_out_and_reported(folder, caplog):
    assert len(Photographs(folder, 32, None).pictures.paths) == 4
    assert "1 of 5 pictures have a side below 32 px" in caplog.text
    with pytest.raises(ValueError, match="All 5 pictures"):
        Photographs(folder, 200, None)


def test_settings_out_of_range_are_named(folder):
    with pytest.raises(ValueError, match="crop is 30 px"):
        Photographs(folder, 30, None)
    with pytest.raises(ValueError, match="min_scale is 0"):
        Photographs(folder, 32, None, min_scale=0.0)
    with pytest.raises(ValueError, match="no degradation 'sunshine'; choose one of"):
        Photographs(folder, 32, "sunshine")


def test_captions_can_be_off_or_of_another_captioner(folder):
    assert {Photographs(folder, 32, None, captions=False)[i]["caption"] for i in range(5)} == {""}
    mine = Photographs(folder, 32, None, captions=lambda images: [f"{images.shape[-1]} px"] * len(images))
    assert {mine[i]["caption"] for i in range(20)} == {"32 px", "a painted wall"}


def test_identity_follows_files_and_settings(folder, tmp_path):
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    identity = Photographs(tmp_path, 32, LIGHT).identity()
    assert Photographs(tmp_path, 32, "light").identity() == identity
    assert Photographs(tmp_path, 32, LIGHT, seed=1).identity() != identity
    (tmp_path / "a.txt").write_text("another caption")
    assert Photographs(tmp_path, 32, LIGHT).identity() != identity


# order ------------------------------------------------------------------------------------------------------------

def test_processes_and_micro_steps_share_out_the_stream_without_gap():
    orders = [list(BatchOrder(3, 5, batch_size=2, accumulation=2, rank=rank, world=3)) for rank in range(3)]
    assert len(orders[0]) == len(BatchOrder(3, 5, 2, 2, 0, 3)) == 4
    seen = [i for micro in zip(*orders, strict=True) for batch in micro for i in batch]
    assert seen == list(range(3 * 12, 5 * 12))


def test_every_epoch_goes_through_the_whole_dataset_in_another_order():
    stream = Shuffled(list("abcdefgh"), seed=1)
    epochs = ["".join(stream[e * 8 + i] for i in range(8)) for e in range(3)]
    assert all(sorted(e) == list("abcdefgh") for e in epochs) and len(set(epochs)) == 3
    assert stream[3] == epochs[0][3]  # back in an earlier epoch
    with pytest.raises(ValueError, match="empty"):
        Shuffled([], 0)


def test_seeds_differ_by_every_part_and_stay_what_they_are():
    assert seed_of(1, "step", 2) == seed_of(1, "step", 2)
    assert len({seed_of(a, b) for a in range(50) for b in range(50)} | {seed_of(12, 3), seed_of(1, 23)}) == 2500
    assert seed_of(0) == 4246866556266386882  # a changed formula would break every resumed training
    assert torch.equal(torch.rand(3, generator=generator_of(4)), torch.rand(3, generator=generator_of(4)))


def test_data_processes_give_the_same_batches(folder):
    photographs = Photographs(folder, 32, LIGHT)
    order = BatchOrder(2, 5, 3)
    for plain, worked in zip(loader(photographs, order, 0), loader(photographs, order, 0, num_workers=2), strict=True):
        assert equal(plain, worked)


def test_only_tensors_move_to_the_device():
    batch = to_device({"x": torch.ones(2), "names": ["a", "b"], "deep": [torch.zeros(1)]}, torch.device("meta"))
    assert batch["x"].is_meta and batch["deep"][0].is_meta and json.dumps(batch["names"]) == '["a", "b"]'
