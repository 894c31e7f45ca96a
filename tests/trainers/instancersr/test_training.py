"""Whole trainings of a very small InstanceRSR: what is trained, resuming, exporting, ablations, sample pictures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fourfold.nodes.common.checkpoints import read_header
from fourfold.nodes.common.images import read_image
from fourfold.nodes.common.tiny import is_tiny, tiny_checkpoint
from fourfold.nodes.instancersr.losses import alignment_loss, denoising_loss, instance_scale_loss, total_loss
from fourfold.nodes.instancersr.model import InstanceRSR
from fourfold.nodes.instancersr.restore import load_system, restore_with_map
from fourfold.trainers import place_tiny
from fourfold.trainers.order import generator_of
from fourfold.trainers.resume import checkpoints
from fourfold.trainers.train_instancersr import HELD_OUT, build, train


def trained_names(study, batch):
    """Names of what trains, after checking that the loss reaches all of it and nothing else."""
    loss, _ = study(batch, generator_of("test"))
    loss.backward()
    trained = {name for name, p in study.named_parameters() if p.requires_grad}
    assert {name for name, p in study.named_parameters() if p.grad is not None} == trained
    return {name.removeprefix("network.") for name in trained}


def test_everything_of_the_tiny_network_trains(config, network, batch_of):
    study = build(config(edge=1.0, l1=0.3, map_weight=0.5), network)
    assert trained_names(study, batch_of(study)) == {name for name, _ in study.network.named_parameters()}


def test_on_a_frozen_base_the_added_parts_train(config, network, batch_of):
    study = build(config(train_base=False), network)
    names = trained_names(study, batch_of(study))
    assert {name.split(".")[0] for name in names} == {"control", "align", "head", "pos_embed", "proj_out_2"}


def test_loss_is_the_papers_sum(config, network, batch_of):
    study = build(config(alignment_weight=0.5, scale_weight=0.1, loss_weight="none"), network)
    torch.nn.init.normal_(study.network.proj_out_2.weight)
    batch, draws = batch_of(study), generator_of("test")
    loss, numbers = study(batch, generator_of("test"))
    inputs = study.encode(batch)
    noised = study.noised(inputs["latent"], torch.randint(1000, (2,), generator=draws), draws)
    eps, _, features = study.network(noised.x, inputs["lr_latent"], noised.t)
    alignment = alignment_loss(study.network.align(features), study.vision.patches(batch["hr"], (4, 4)))
    scale = instance_scale_loss(features, batch["instances"], study.targets(inputs))
    parts = denoising_loss(eps, noised.noise, noised.t), alignment, scale
    torch.testing.assert_close(loss, total_loss(*parts))
    assert numbers["alignment"] == pytest.approx(alignment.item())
    assert numbers["instance_scale"] == pytest.approx(scale.item())
    assert (numbers["picture"] + numbers["map"]) / 2 == pytest.approx(parts[0].item(), rel=1e-4)


def test_instances_keep_their_targets(config, network, batch_of):
    """The same instance of the same picture is drawn to the same norm in whatever crop it is seen."""
    study = build(config(), network)
    first, second = (study.targets({"picture": torch.tensor(which), "instances": torch.tensor([[top]])})
                     for which, top in (([0, 1], 3), ([1, 2], 9)))
    assert torch.equal(first[1], second[0, :4]) and not torch.equal(first[0], first[1])


@pytest.mark.parametrize("ablation", [{}, {"representation_learning": False}, {"mask_modelling": False}])
def test_trains_and_exports_a_system(config, network, ablation, photographs, tmp_path):
    result = train(config(**ablation, export_dtype="float16", sample_every=3, samples=1), network)
    assert {path.name for path in result.folder.iterdir()} == {"instancersr.safetensors", "codec.safetensors"}
    assert is_tiny(result.folder) and result.loss == result.loss
    header = read_header(result.folder / "instancersr.safetensors")
    assert header.step == 3 and header.training["photographs"] == photographs.name
    assert str(photographs.parent) not in json.dumps(header.metadata)
    system = load_system(result.folder, device="cpu")
    assert system.network.config.ablations == config(**ablation).ablations
    assert (system.network.align is None) == ("representation_learning" in ablation)
    system.sampling = replace(system.sampling, steps=2, min_short_side=32)
    drawn = restore_with_map(torch.rand(1, 3, 8, 10), system)
    assert drawn.picture.shape == (1, 3, 32, 40) and drawn.picture.isfinite().all()
    assert (drawn.map is None) == ("mask_modelling" in ablation)
    sheet = read_image(tmp_path / "run" / "samples" / "step-00000003-0.png")
    assert sheet.shape == (1, 3, 32 if "mask_modelling" in ablation else 64, 96)


def test_training_learns(config, network, batch_of):
    settings = config(max_steps=40, batch_size=4, save_every=0, learning_rate=3e-3, ema_decay=0.5, scale_weight=0.1)
    result = train(settings, network)
    before, after = build(settings, network), build(settings, network)
    after.network.load_state_dict(InstanceRSR.from_pretrained(result.folder, torch.float32).state_dict())
    batch = batch_of(before, 6)
    numbers = [study(batch, generator_of("test"))[1] for study in (before, after)]
    for part in ("map", "alignment", "instance_scale"):
        assert numbers[1][part] < numbers[0][part], part


def test_resumed_training_equals_an_uninterrupted_one(config, network, curve, tmp_path):
    whole, broken = config(max_steps=4), config(max_steps=2, output_dir=str(tmp_path / "broken"))
    train(whole, network)
    train(broken, network)
    train(replace(broken, max_steps=4, resume="latest"), network)
    assert curve(tmp_path / "broken") == curve(tmp_path / "run")
    states = [InstanceRSR.from_pretrained(checkpoints(folder)[-1] / "export").state_dict()
              for folder in (tmp_path / "run", tmp_path / "broken")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_start_goes_on_with_exported_weights(config, network, tmp_path):
    first = train(config(max_steps=1, export_dtype="float32"), network)
    study = build(config(start=str(first.folder)), network)
    for name, value in InstanceRSR.from_pretrained(first.folder).state_dict().items():
        assert torch.equal(study.network.state_dict()[name], value), name


def test_cached_training_computes_the_same(config, network, batch_of, curve, tmp_path):
    """The cache holds what the photographs become; a second training reads it instead of computing it."""
    settings = config(cache=str(tmp_path / "cache"), cached_crops=4, max_steps=2)
    train(settings, network)
    again = replace(settings, output_dir=str(tmp_path / "again"))
    files = sorted(path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors"))
    train(again, network)
    assert files == sorted(path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert curve(tmp_path / "again") == curve(tmp_path / "run")
    study = build(settings, network)
    batch = batch_of(study)
    torch.testing.assert_close(study(batch, generator_of("test"))[0],
                               study(study.encode(batch), generator_of("test"))[0])
    with pytest.raises(ValueError, match=r"made with another configuration: .*map was True, now False"):
        train(replace(again, mask_modelling=False), network)


def test_samples_are_held_out(config, network, crops, tmp_path):
    train(config(max_steps=1, sample_every=1, samples=1), network)
    sheet = read_image(tmp_path / "run" / "samples" / "step-00000001-0.png")
    item = crops(config())[HELD_OUT]
    torch.testing.assert_close(sheet[0, :, :32, 64:], item["hr"], atol=0.5 / 255 + 1e-6, rtol=0)
    torch.testing.assert_close(sheet[0, :, 32:, 64:], item["map"], atol=0.5 / 255 + 1e-6, rtol=0)
    lines = [json.loads(line) for line in (Path(tmp_path) / "run" / "log.jsonl").read_text().splitlines()]
    assert any(3 < line.get("sample_psnr", 0) < 60 for line in lines)


def test_export_is_placed_beside_its_codec_only(config, network, tmp_path):
    train(config(max_steps=1, export_dtype="float16"), network)
    family = tmp_path / "family"
    both = ["--instancersr", str(tmp_path / "run"), "--codec", str(tiny_checkpoint("codec")), "--checkpoints"]
    place_tiny.main([*both, str(family)])
    assert {path.name for path in family.iterdir()} == {"instancersr_tiny.safetensors", "codec.safetensors"}
    assert InstanceRSR.from_pretrained(family / "instancersr_tiny.safetensors").config.num_layers == 3
