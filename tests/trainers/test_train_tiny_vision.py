"""Training of the tiny vision encoder, and the pieces of its loss."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fourfold.nodes.common.checkpoints import load_state, read_header
from fourfold.nodes.common.images import read_image, resize, write_image
from fourfold.nodes.common.vision import VisionEncoder
from fourfold.trainers.order import generator_of
from fourfold.trainers.resume import read_checkpoint
from fourfold.trainers.self_distillation import PrototypeHead, block_mask, cross_entropy, koleo, sinkhorn
from fourfold.trainers.train_tiny_vision import TinyVisionTraining, Views, VisionStudy, train

CLEAN = Path(__file__).parents[2] / "photographs" / "clean"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("cat", "coffee", "astronaut"):
        write_image(folder / f"{name}.png", resize(read_image(CLEAN / f"{name}.jpg")[:, :3], (60, 90)))
    return folder


@pytest.fixture
def config(photographs, tmp_path):
    return TinyVisionTraining(
        photographs=str(photographs), output_dir=str(tmp_path / "run"), crop=32, width=16, layers=1, heads=2,
        prototypes=8, batch_size=4, max_steps=4, save_every=2, log_every=1, warmup_steps=0, num_workers=0, samples=3,
        tensorboard=False, mixed_precision="no", learning_rate=1e-3)


def batch_of(config, count=4):
    views = Views(config)
    return torch.utils.data.default_collate([views[i] for i in range(count)])


# the pieces -------------------------------------------------------------------------------------------------------

def test_sinkhorn_uses_all_prototypes_alike():
    scores = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) / 10
    scores[:, 0] += 1  # the favourite of all samples
    assert ((scores / 0.05).softmax(dim=1)[:, 0] > 0.99).all()
    q = sinkhorn(scores, 0.05, rounds=20)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(q.sum(dim=0), torch.full((8,), 8.0), rtol=0.05, atol=0)
    assert q.amax(dim=1).mean() > 0.5, "sharp all the same"


def test_cross_entropy_by_hand():
    target, scores = torch.tensor([[0.25, 0.75]]), torch.tensor([[0.3, 0.1]])
    weights = [math.exp(0.3 / 0.1), math.exp(0.1 / 0.1)]
    expected = -sum(q * math.log(w / sum(weights)) for q, w in zip((0.25, 0.75), weights, strict=True))
    assert cross_entropy(target, scores, 0.1).item() == pytest.approx(expected, rel=1e-5)


def test_koleo_is_the_log_distance_to_the_nearest():
    points = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    assert koleo(points).item() == pytest.approx(-math.log(math.sqrt(2)), rel=1e-5), "lengths do not count"
    assert koleo(torch.tensor([[1.0, 0.0], [1.0, 0.01]])) > koleo(points) + 4


def test_head_gives_cosines():
    head = PrototypeHead(16, 8)
    scores = head(torch.randn(3, 5, 16))
    assert scores.shape == (3, 5, 8) and scores.abs().max() <= 1.0001 and scores.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.randn(3, 16)).dtype == torch.float32


def test_masks_are_rectangles_of_the_asked_area():
    mask = block_mask(500, (16, 16), 0.6, 0.1, 0.5, torch.Generator().manual_seed(0)).view(-1, 16, 16)
    hidden = mask.flatten(1).any(dim=1)
    assert hidden.float().mean().item() == pytest.approx(0.6, abs=0.06)
    areas = mask[hidden].float().mean(dim=(1, 2))
    assert areas.min() > 0.07 and areas.max() < 0.53 and areas.mean().item() == pytest.approx(0.3, abs=0.02)
    for one in mask[hidden][:50]:
        rows, columns = one.any(dim=1).sum(), one.any(dim=0).sum()
        assert one.sum() == rows * columns


# the training -----------------------------------------------------------------------------------------------------

def test_views_are_the_clean_crop_made_poor(config):
    views = Views(replace(config, clean=0.3))
    items = [views[i] for i in range(24)]
    errors = torch.stack([(item["hr"] - item["view"]).square().mean() for item in items])
    assert 0 < (errors == 0).sum() < 16 and errors.max() > 1e-4
    assert all(item["view"].shape == (3, 32, 32) for item in items)
    assert torch.equal(views[5]["view"], items[5]["view"]), "a pure function of the index"


def test_the_student_trains_and_the_teacher_follows(config):
    study = VisionStudy(replace(config, momentum=0.9))
    loss, numbers = study(batch_of(config), generator_of(0), 0)
    loss.backward()
    trained = {name for name, p in study.named_parameters() if p.requires_grad}
    assert {name for name, p in study.named_parameters() if p.grad is not None} == trained
    assert all(name.startswith("student.") for name in trained)
    assert {"class_spread", "class_entropy", "patch_spread", "patch_entropy", "agreement"} < set(numbers)
    before = [p.clone() for p in study.teacher.parameters()]
    with torch.no_grad():
        for parameter in study.student.parameters():
            parameter.add_(1)
    for _ in range(2):  # two micro steps of one step move it once
        study(batch_of(config), generator_of(0), 1)
    for old, new in zip(before, study.teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)


def test_loss_tells_a_poor_view_from_the_clean_one(config):
    """With the teacher's own weights, and nothing hidden, the clean view agrees best."""
    study, batch = VisionStudy(replace(config, masked=0.0, koleo=0.0)), batch_of(config, 16)
    poor, numbers = study(batch, generator_of(0), 0)
    clean, same = study({**batch, "view": batch["hr"]}, generator_of(0), 0)
    assert clean < poor and same["agreement"] == pytest.approx(1, abs=1e-5) and numbers["agreement"] < 0.999


def test_collapse_shows_in_the_numbers(config):
    study, batch = VisionStudy(config), batch_of(config, 8)
    _, healthy = study(batch, generator_of(0), 0)
    torch.nn.init.zeros_(study.teacher["encoder"].network.layernorm.weight)
    torch.nn.init.ones_(study.teacher["encoder"].network.layernorm.bias)
    _, collapsed = study(batch, generator_of(0), 0)
    for name in ("class_spread", "patch_spread"):
        assert collapsed[name] < 1e-3 < 0.01 < healthy[name], (healthy, collapsed)


def test_training_learns_and_exports_the_encoder(config, photographs):
    config = replace(config, max_steps=40, sample_every=40, batch_size=8, learning_rate=3e-3, mixed_precision="bf16")
    result = train(config)
    first, last = (VisionStudy(config), VisionStudy(config))
    last.student.load_state_dict(  # the weights themselves: the average of 40 steps lags behind
        {name.removeprefix("student."): value
         for name, value in read_checkpoint(result.folder.parent)["trained"].items()})
    last.teacher.load_state_dict(last.student.state_dict())
    losses = [study(batch_of(config, 16), generator_of("test"), 0)[0].item() for study in (first, last)]
    assert losses[1] < losses[0] - 0.05
    encoder = VisionEncoder.from_pretrained(result.folder / "vision.safetensors")
    assert encoder.encode(torch.rand(2, 3, 50, 40)).shape == (2, 17, 16) and encoder.preprocessing.crop == 32
    header = read_header(result.folder / "vision.safetensors")
    assert header.step == 40 and header.training["photographs"] == photographs.name
    assert [p.suffix for p in (Path(config.output_dir) / "samples").iterdir()] == [".png"]


def test_resumed_training_equals_an_uninterrupted_one(config, curve):
    """The teacher, too, goes on where it was."""
    constant = replace(config, schedule="constant", momentum=0.5, learning_rate=1e-2)
    whole = train(constant)
    divided = replace(constant, output_dir=config.output_dir + "2")
    train(replace(divided, max_steps=2))
    parts = train(replace(divided, resume="latest"))
    assert curve(divided.output_dir) == curve(constant.output_dir)
    a, b = (load_state(result.folder / "vision.safetensors") for result in (whole, parts))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
