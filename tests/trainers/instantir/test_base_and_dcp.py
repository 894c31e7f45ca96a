"""Training of the tiny base, and of InstantIR's DCP."""

import math
from pathlib import Path

import pytest
import torch
from fourfold.nodes.common.checkpoints import load_state, read_header
from fourfold.nodes.common.images import resize
from fourfold.nodes.common.tiny_text import TinyTextEncoder
from fourfold.nodes.instantir.model import InstantIR
from fourfold.trainers import train_instantir_dcp as dcp
from fourfold.trainers import train_tiny_sdxl as base
from fourfold.trainers.order import generator_of


@pytest.fixture
def dcp_study(config, program):
    return lambda **fields: dcp.build(config("dcp", **fields), program.NETWORK.resampler)


def test_base_trains_the_unet_alone_and_is_exported(config, program, batch_of, trained_names, family):
    settings = config("base", sample_every=3, samples=2)
    study = base.build(settings, program.NETWORK)
    assert trained_names(study, batch_of(settings), generator_of(0)) == {f"unet.{n}" for n, _ in
                                                                         study.model.unet.named_parameters()}
    result = base.train(settings, program.NETWORK)
    model = InstantIR.from_pretrained(result.folder / "base.safetensors")
    assert tuple(model.config.unet["block_out_channels"]) == (8, 16)
    assert (model.config.prediction, model.config.anchor) == (program.NETWORK.prediction, program.NETWORK.anchor)
    assert model.config.latent_scale == study.autoencoder.scale and model.resampler is None
    assert (result.folder / "text.safetensors").read_bytes() == Path(family["text"]).read_bytes()
    assert len(list((result.folder.parents[2] / "samples").iterdir())) == 2
    header = read_header(result.folder / "base.safetensors")
    assert header.step == 3 and header.training["text"] == "text.safetensors"


def test_base_goes_on_from_an_earlier_one_and_may_train_the_text_encoder(config, program, batch_of, trained_names,
                                                                        starts, family):
    settings = config("base", start=starts["dcp"], train_text=True)
    study = base.build(settings, program.NETWORK)
    given = load_state(starts["dcp"])
    assert torch.equal(study.model.unet.conv_in.weight, given["unet.conv_in.weight"])
    assert any(name.startswith("text.") for name in trained_names(study, batch_of(settings), generator_of(0)))
    result = base.train(settings, program.NETWORK)
    before, after = (TinyTextEncoder.load(file) for file in (family["text"], result.folder / "text.safetensors"))
    assert not torch.equal(before.encoder.shared.weight, after.encoder.shared.weight)


def test_null_prompts(config, program, batch_of):
    settings = config("base", null_prompt=0.999999)
    study = base.build(settings, program.NETWORK)
    told = []
    study.text.register_forward_pre_hook(lambda _, arguments: told.append(arguments[1].sum(dim=1).tolist()))
    study(batch_of(settings), generator_of(0))
    assert told == [[1] * 4], "the end-of-text token alone"


@pytest.mark.parametrize("train_base", [False, True])
def test_dcp_trains_adapter_and_on_demand_the_base(dcp_study, config, batch_of, trained_names, train_base):
    study = dcp_study(train_base=train_base)
    names = trained_names(study, batch_of(config("dcp")), generator_of(0))
    adapter, unet = (set(study.model.part_parameters(part)) for part in ("adapter", "unet"))
    assert names == (adapter | unet if train_base else adapter)
    assert any("ln_v_ip" in name for name in adapter) and "resampler.latents" in adapter


def test_dcp_leaves_a_frozen_base_bit_by_bit(config, program, starts):
    result = dcp.train(config("dcp", export_dtype="float32", sample_every=3, samples=1), program.NETWORK.resampler)
    exported, base_weights = load_state(result.folder / "instantir_tiny.safetensors"), load_state(starts["dcp"])
    assert all(torch.equal(exported[name], value) for name, value in base_weights.items())
    assert math.isfinite(result.loss)
    model = InstantIR.from_pretrained(result.folder / "instantir_tiny.safetensors")
    assert model.config.resampler == program.NETWORK.resampler and model.switch is None
    assert {p.name for p in result.folder.iterdir()} >= {"codec.safetensors", "text.safetensors", "vision.safetensors"}


def test_dcp_loss_by_hand(dcp_study, config, batch_of):
    """The same draws in the same order, each formula written out."""
    study = dcp_study(drop_image=0.3, drop_text=0.3, drop_both=0.2)
    batch = batch_of(config("dcp"), 16)
    draws = generator_of("draws")
    u = torch.rand(16, generator=draws)
    null_image, null_text = (u < 0.3) | ((u >= 0.6) & (u < 0.8)), (u >= 0.3) & (u < 0.8)
    assert len({(a, b) for a, b in zip(null_image.tolist(), null_text.tolist(), strict=True)}) == 4
    t = (torch.rand(16, generator=draws) * 1000).long()
    model, codec = study.model, study.autoencoder
    z = codec.encode(batch["hr"]) * codec.scale
    noise = torch.randn(z.shape, generator=draws)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[t].float()[:, None, None, None]
    x = kept.sqrt() * z + (1 - kept).sqrt() * noise
    text = study.text.encode(["" if n else c for c, n in zip(batch["caption"], null_text, strict=True)])
    features = study.vision(resize(batch["lr"], (32, 32)))
    features[null_image] = study.vision.null_features()
    sizes = torch.tensor([32.0, 32, 0, 0, 32, 32]).expand(16, 6)
    eps = model.denoise(x, t, text.prompt_embeds, text.pooled, sizes, model.resample(features))
    x0 = (x - (1 - kept).sqrt() * eps) / kept.sqrt()
    assert model.config.prediction == "sample"
    loss, _ = study(batch, generator_of("draws"))
    torch.testing.assert_close(loss, (x0 - z).square().mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("training", ["base", "dcp", "previewer", "aggregator"])
def test_resumed_training_equals_an_uninterrupted_one(config, program, curve, training, tmp_path):
    train = program.TRAININGS[training][1]
    whole = train(config(training, max_steps=4))
    settings = config(training, max_steps=2, output_dir=str(tmp_path / "parts"))
    train(settings)
    parts = train(config(training, max_steps=4, output_dir=str(tmp_path / "parts"), resume="latest"))
    assert curve(tmp_path / "parts") == curve(tmp_path / training)
    name = "base.safetensors" if training == "base" else "instantir_tiny.safetensors"
    a, b = (load_state(result.folder / name) for result in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())
