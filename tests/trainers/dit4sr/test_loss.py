"""DiT4SR's loss by hand, which weights it trains, and that every switch does."""

import math
from dataclasses import replace

import pytest
import torch
from fourfold.nodes.common.images import resize
from fourfold.nodes.dit4sr.model import DiT4SRTransformer
from fourfold.trainers.order import generator_of
from fourfold.trainers.train_dit4sr import build, train


def trained(study):
    return {name: p for name, p in study.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("weight", ["none", "sigma2"])
def test_loss_by_hand(config, weight, program, batch_of):
    """The same draws in the same order, each formula written out."""
    config = replace(config, loss_weight=weight, l1=0.0, null_prompt=0.5, sigma_mean=0.2, sigma_std=0.7)
    study = build(config, program.NETWORK)
    torch.nn.init.normal_(study.transformer.proj_out.weight, std=0.1)
    batch = batch_of(study, config, 4)
    draws = generator_of("draws")
    u = torch.sigmoid(0.2 + 0.7 * torch.randn(4, generator=draws))
    sigma = 3 * u / (1 + 2 * u)
    codec, config_of = study.autoencoder, study.transformer.config
    z, z_lr = ((codec.encode(x) - config_of.latent_shift) * config_of.latent_scale
               for x in (batch["hr"], resize(batch["lr"], (32, 32))))
    noise = torch.randn(z.shape, generator=draws)
    null = torch.rand(4, generator=draws) < 0.5
    assert 0 < null.sum() < 4
    text = study.text.encode(["" if n else caption for n, caption in zip(null, batch["caption"], strict=True)])
    s = sigma[:, None, None, None]
    velocity = study.transformer((1 - s) * z + s * noise, z_lr, 1000 * sigma, text.prompt_embeds, text.pooled, 1.0)
    error = (velocity - (noise - z)) * (s if weight == "sigma2" else 1)
    torch.testing.assert_close(study(batch, generator_of("draws")), error.square().mean())


def test_every_prompt_is_null_at_probability_one(config, program, batch_of):
    study = build(replace(config, null_prompt=0.999999), program.NETWORK)
    told = []
    study.text.register_forward_pre_hook(lambda _, arguments: told.append(arguments[1].sum(dim=1).tolist()))
    study(batch_of(study, config), generator_of(0))
    assert told == [[1, 1]], "the end-of-text token alone"


@pytest.mark.parametrize("switch", [{}, {"lr_integration": False}, {"lr_residual": False}, {"lr_injection": False},
                                    {"injection_layer": "linear"}, {"train_base": False}],
                         ids=["full method", "A", "B", "C", "D", "control only"])
def test_every_trained_parameter_has_a_gradient(config, switch, program, batch_of):
    study = build(replace(config, **switch), program.NETWORK)
    study(batch_of(study, config), generator_of(0)).backward()
    assert [name for name, p in trained(study).items() if p.grad is None] == []
    names = set(trained(study))
    assert any("to_q_control" in name for name in names)
    if "train_base" in switch:
        assert all("control" in name for name in names)
    else:
        assert any(name.startswith("text.") for name in names)


@pytest.mark.parametrize("switch", [{"lr_integration": False}, {"lr_residual": False}, {"lr_injection": False},
                                    {"injection_layer": "linear"}, {"loss_weight": "none"}], ids=[*"ABCD", "none"])
def test_every_switch_trains_and_is_exported(config, switch, program):
    result = train(replace(config, max_steps=1, **switch), program.NETWORK)
    exported = DiT4SRTransformer.from_pretrained(result.folder / "transformer")
    assert math.isfinite(result.loss)
    for name, value in switch.items():
        assert name == "loss_weight" or getattr(exported.config.ablations, name) == value


def test_gradient_checkpointing_gives_the_same_losses(config, curve, program):
    train(config, program.NETWORK)
    other = replace(config, output_dir=config.output_dir + "2", gradient_checkpointing=True)
    train(other, program.NETWORK)
    plain, saving = curve(config.output_dir), curve(other.output_dir)
    assert [plain[i]["loss"] for i in range(1, 7)] == pytest.approx([saving[i]["loss"] for i in range(1, 7)], rel=1e-5)
