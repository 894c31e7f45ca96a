"""The network's config: reading the published file, writing it, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from fourfold.nodes.dit4sr.config import PRESETS, Ablations, DiT4SRConfig
from fourfold.nodes.dit4sr.model import DiT4SRTransformer, guess_variant

PUBLISHED = {  # config.json of acceptee/DiT4SR
    "_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.30.3", "attention_head_dim": 64,
    "caption_projection_dim": 1536, "dual_attention_layers": list(range(13)), "in_channels": 16,
    "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16, "patch_size": 2,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "sample_size": 128}


def test_published_config_is_the_full_preset():
    assert DiT4SRConfig.from_json(PUBLISHED) == PRESETS["full"].network
    assert DiT4SRConfig.from_json(PUBLISHED).inner_dim == 1536


def test_recorded_config_is_read(recorded):
    folder, _ = recorded("v1")
    config = DiT4SRConfig.from_json(json.loads((folder / "transformer" / "config.json").read_text()), variant="v1")
    assert (config.inner_dim, config.num_layers, config.dual_attention_layers) == (32, 3, (0, 1))
    assert (config.variant, config.injection_scale, config.latent_shift) == ("v1", 1.2, 0.0609)


@pytest.mark.parametrize("config", [
    PRESETS["full"].network, PRESETS["tiny"].network,
    DiT4SRConfig(variant="v1", qk_norm=None, ablations=Ablations(False, False, True, "linear"))],
    ids=["full", "tiny", "ablated"])
def test_config_comes_back_from_json(config):
    content = json.loads(json.dumps(config.to_json()))
    assert DiT4SRConfig.from_json(content) == config
    assert set(content) - {"fourfold", "_class_name"} <= set(PUBLISHED), "diffusers must still read our file"
    assert content["_class_name"] == "SD3Transformer2DModel"


def test_out_channels_default_to_in_channels():
    assert DiT4SRConfig.from_json(PUBLISHED | {"in_channels": 8, "out_channels": None}).out_channels == 8


def test_sizes_are_read_off_the_weights(network):
    for fields in ({}, {"dual_attention_layers": ()}, {"num_layers": 4, "patch_size": 1}):
        model = network(**fields)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        # the side that position scales refer to is not in the shapes; loaded positions do not need it
        assert DiT4SRConfig.from_shapes(shapes, variant="r1") == replace(model.config, sample_size=128)
    assert DiT4SRConfig.from_shapes(shapes, variant="v1").variant == "v1"
    with pytest.raises(ValueError, match=r"lack pos_embed\.proj\.weight.*diffusers' layout"):
        DiT4SRConfig.from_shapes({"joint_blocks.0.x_block.attn.qkv.weight": (3, 1)})


def test_networks_without_norms_of_queries_are_read_off_the_weights():
    shapes = {"pos_embed.proj.weight": (128, 16, 2, 2), "pos_embed.pos_embed": (1, 36, 128),
              "proj_out.weight": (64, 128), "context_embedder.weight": (128, 7),
              "time_text_embed.text_embedder.linear_1.weight": (128, 9), "transformer_blocks.0.attn.to_q.weight": (1,)}
    config = DiT4SRConfig.from_shapes(shapes)
    assert (config.qk_norm, config.num_attention_heads, config.num_layers, config.pos_embed_max_size) == (None, 2, 1, 6)


@pytest.mark.parametrize(("fields", "text"), [
    ({"variant": "v2"}, r"variant is 'v2'; 'v1' or 'r1' is expected"),
    ({"anchor": "hr"}, r"anchor is 'hr'; 'none' or 'lr'"),
    ({"qk_norm": "layer_norm"}, r"qk_norm is 'layer_norm'; 'rms_norm' or None"),
    ({"caption_projection_dim": 64}, r"caption_projection_dim is 64.* = 24 \* 64 = 1536"),
    ({"dual_attention_layers": (0, 24)}, r"dual_attention_layers is \(0, 24\).*0 to 23"),
    ({"ablations": {"injection_layer": "dense"}}, r"injection_layer is 'dense'; 'conv' or 'linear'")])
def test_impossible_values_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        DiT4SRConfig.from_json(PUBLISHED | {"fourfold": fields})


@pytest.mark.parametrize(("path", "variant"), [
    ("dit4sr_f/transformer", "v1"), ("DiT4SR_Q", "v1"), ("models/dit4sr-q/diffusion_pytorch_model.safetensors", "v1"),
    ("dit4sr_q_bf16.safetensors", "v1"), ("dit4sr_r1/transformer", "r1"), ("dit4sr_q/new/dit4sr_r1", "r1"),
    ("dit4sr_fine", "r1"), ("runs/step-00000100/export/transformer", "r1"), ("dit4sr_q/a/b/transformer", "r1")])
def test_variant_is_guessed_from_names(tmp_path, path, variant):
    assert guess_variant(tmp_path / path) == variant


def test_tiny_preset_is_small_and_full_has_the_papers_settings():
    full, tiny = PRESETS["full"].sampling, PRESETS["tiny"].sampling
    assert (full.steps, full.guidance, full.tile, full.overlap, full.start_sigma) == (40, 8, 64, 24, 1)
    assert (full.multiple, full.min_short_side, full.color_fix) == (16, 512, "adain")
    assert tiny.tile % PRESETS["tiny"].network.patch_size == 0
    with torch.device("meta"):
        assert sum(p.numel() for p in DiT4SRTransformer(PRESETS["tiny"].network).parameters()) < 8e6
