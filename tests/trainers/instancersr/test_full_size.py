"""InstanceRSR's training at full size, on a small DiT with a small VAE and a small DINOv2."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from fourfold.nodes.common.checkpoints import load_state, read_header
from fourfold.nodes.instancersr.restore import load_system, restore
from fourfold.trainers import instancersr_study
from fourfold.trainers.train_instancersr import build, train
from transformers import Dinov2Config, Dinov2Model

OWN = {"control_blocks": 2, "align_block": 2, "align_hidden": 12}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A diffusers folder with a small DiT and a small VAE."""
    folder = tmp_path_factory.mktemp("models") / "DiT"
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8,
                                num_layers=3, sample_size=8, num_embeds_ada_norm=5)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    dit.save_pretrained(folder / "transformer")
    AutoencoderKL(
        block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def dino(base):
    folder = base.parent / "dinov2"
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14,
                             image_size=28)).save_pretrained(folder)
    content = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def full(config, base, dino, monkeypatch):
    """`full(**fields)`: settings at full size; sample pictures in one step."""
    preset = instancersr_study.PRESETS["full"]
    quick = replace(preset, sampling=replace(preset.sampling, steps=1, min_short_side=32))
    monkeypatch.setitem(instancersr_study.PRESETS, "full", quick)
    paths = {"base": str(base), "dino": str(dino), "vision": None}
    return lambda **fields: config(preset="full", loss_weight="none", weight_decay=0.0, **{**paths, **fields})


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_added_parts_train_on_a_base_that_stays(full, base, precision):
    result = train(full(mixed_precision=precision, gradient_checkpointing=True, sample_every=3, samples=1,
                        export_dtype="float32"), **OWN)
    assert [path.name for path in result.folder.iterdir()] == ["instancersr.safetensors"]
    path = result.folder / "instancersr.safetensors"
    assert "DiT-XL/2" in read_header(path).metadata["fourfold.licence"]
    after, before = load_state(path), load_state(base / "transformer")
    kept = [name for name in before if name.startswith(("transformer_blocks.", "proj_out_1."))]
    rounded = torch.bfloat16 if precision == "bf16" else torch.float32
    assert kept and all(torch.equal(after[name], before[name].to(rounded).float()) for name in kept)
    assert all(bool(after[f"control.projections.{i}.weight"].any()) for i in range(2))

    system = load_system(result.folder, base=base, device="cpu")
    system.sampling = replace(system.sampling, steps=1, min_short_side=32)
    assert restore(torch.rand(1, 3, 8, 8), system).shape == (1, 3, 32, 32)


def test_variance_is_kept_and_not_trained_on(full):
    """Of the output layer's rows [eps_x, eps_m, var_x, var_m] the last half stays as the base has it."""
    before = build(full(), **OWN).network
    result = train(full(export_dtype="float32"), **OWN)
    after = load_state(result.folder / "instancersr.safetensors")["proj_out_2.weight"]
    eps, variance = (after - before.proj_out_2.weight).unflatten(0, (4, 16)).chunk(2, dim=1)
    assert bool(eps.any()) and not bool(variance.any())


def test_gradients_reach_the_added_parts_and_nothing_else(full, batch_of):
    """Every added weight but those behind the branch's silent projections, which get theirs one step later."""
    study = build(full(), **OWN)
    torch.nn.init.normal_(study.network.control.projections[0].weight)
    torch.nn.init.normal_(study.network.control.projections[1].weight)
    loss, _ = study(batch_of(study), torch.Generator().manual_seed(0))
    loss.backward()
    reached = {name.split(".")[1] for name, p in study.named_parameters() if p.grad is not None}
    assert reached == {"control", "align", "pos_embed", "proj_out_2"}
    blocks = [p.grad.abs().max() for name, p in study.named_parameters() if name.endswith("to_q.weight") and
              "control" in name]
    assert len(blocks) == 2 and all(float(grad) > 0 for grad in blocks)


def test_features_of_dinov2_lie_on_the_token_grid(full, batch_of):
    study = build(full(), **OWN)
    batch = study.encode(batch_of(study))
    assert study.grid == (2, 2) and batch["features"].shape == (2, 2, 2, 16)
    assert batch["instances"].shape == (2, 4) and batch["latent"].shape == (2, 8, 4, 4)
