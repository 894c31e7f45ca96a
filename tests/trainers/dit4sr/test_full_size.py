"""DiT4SR's trainer at full size, with a small Stable Diffusion 3.5."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from fourfold.nodes.common.checkpoints import read_header
from fourfold.nodes.dit4sr.restore import load_system, restore
from fourfold.trainers import train_dit4sr
from fourfold.trainers.data import Photographs
from fourfold.trainers.order import generator_of
from fourfold.trainers.train_dit4sr import build, train
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def sd3(small_text_encoders):
    """The whole diffusers folder of a small Stable Diffusion 3.5."""
    folder = small_text_encoders.folder
    torch.manual_seed(0)
    SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=small_text_encoders.width,
        pooled_projection_dim=small_text_encoders.pooled, pos_embed_max_size=64, dual_attention_layers=(0,),
        qk_norm="rms_norm").save_pretrained(folder / "transformer")
    AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1, shift_factor=0.0609,
        scaling_factor=1.5305, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False).save_pretrained(folder / "vae")
    return folder


@pytest.fixture
def full(config, sd3, monkeypatch):
    """Training at full size; its sample pictures would take minutes at the paper's 40 steps and 512 px."""
    preset = train_dit4sr.PRESETS["full"]
    quick = replace(preset, sampling=replace(preset.sampling, steps=1, min_short_side=16, tile=16, overlap=4))
    monkeypatch.setitem(train_dit4sr.PRESETS, "full", quick)
    return replace(config, preset="full", sd3=str(sd3), export_dtype="bfloat16", l1=0.0, max_steps=2)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_full_size_trains_the_lr_stream_alone(full, sd3, precision):
    full = replace(full, mixed_precision=precision, export_dtype="float32", sample_every=2, samples=1)
    result = train(full)
    exported = load_file(result.folder / "transformer" / "diffusion_pytorch_model.safetensors")
    base = load_file(sd3 / "transformer" / "diffusion_pytorch_model.safetensors")
    as_trained = torch.float32 if precision == "no" else torch.bfloat16
    assert all(torch.equal(exported[name], value.to(as_trained).float()) for name, value in base.items())
    added = set(exported) - set(base)
    moved = {name for name in added if "control" in name and exported[name].any()}
    assert all("control" in name or ".attn2." in name for name in added)
    assert {"transformer_blocks.1.attn.to_v_control.weight", "transformer_blocks.0.ff.control_conv.weight"} <= moved
    config = json.loads((result.folder / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "SD3Transformer2DModel" and config["fourfold"]["variant"] == "r1"
    assert sorted(p.name for p in result.folder.iterdir()) == ["transformer"], "the published folder, nothing else"
    assert "Stability AI" in read_header(result.folder / "transformer").metadata["fourfold.licence"]
    assert (Path(full.output_dir) / "samples" / "step-00000002-0.png").is_file()
    system = load_system(result.folder, base=sd3, device="cpu")
    sr = restore(torch.rand(1, 3, 4, 5), system, steps=1)
    assert sr.shape == (1, 3, 16, 20)


def test_frozen_encoders_stay_in_evaluation_mode(full):
    """T5 has dropout: in training mode a prompt would not be the same twice."""
    study = build(full).train()
    assert study.transformer.training and not study.autoencoder.training and not study.text.t5.training
    assert torch.equal(study.encode_text(["a bridge"]).prompt_embeds, study.encode_text(["a bridge"]).prompt_embeds)
    assert study.encode_text(["a bridge"]).prompt_embeds.shape[1] == 77 + 77


def test_cached_full_size_needs_no_text_encoders_afterwards(full, tmp_path, monkeypatch, curve, batch_of):
    loads = []
    load = train_dit4sr.load_text_encoders
    monkeypatch.setattr(train_dit4sr, "load_text_encoders", lambda config: loads.append(1) or load(config))
    full = replace(full, cache=str(tmp_path / "cache"), cached_crops=4, sample_every=2, samples=1, null_prompt=0.5)
    train(full)
    again = replace(full, output_dir=full.output_dir + "2")
    train(again)
    assert len(loads) == 1 and curve(again.output_dir) == curve(full.output_dir)

    study = build(replace(full, cache=None))
    batch = batch_of(study, full, 4)
    cached = study.encode(batch)
    assert cached["prompt_embeds"].shape == (4, 154, 64)
    on_the_fly = study(batch, generator_of(5))
    torch.testing.assert_close(study(cached, generator_of(5)), on_the_fly)
    study.text = None
    train_dit4sr.cached(full, study, Photographs(full.photographs, full.crop, full.degradation, full.seed))
    torch.testing.assert_close(study(cached, generator_of(5)), on_the_fly)
    with pytest.raises(KeyError, match="not in the cache"):
        study.text.encode(["never asked for"])


def test_a_cache_of_other_text_encoders_is_refused(full, sd3, tmp_path):
    full = replace(full, cache=str(tmp_path / "cache"), cached_crops=2, max_steps=1)
    train(full)
    with pytest.raises(ValueError, match=r"t5_length was 77, now 40"):
        train(replace(full, t5_length=40, output_dir=full.output_dir + "2"))
    (sd3 / "text_encoder" / "note.txt").write_text("other files")
    try:
        with pytest.raises(ValueError, match=r"text encoders was \w+, now \w+"):
            train(replace(full, output_dir=full.output_dir + "2"))
    finally:
        (sd3 / "text_encoder" / "note.txt").unlink()
