"""The network at full size, without its memory: it is Stable Diffusion 3.5 medium with the added layers."""

from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from fourfold.nodes.dit4sr.config import PRESETS, DiT4SRConfig
from fourfold.nodes.dit4sr.model import DiT4SRTransformer


@pytest.fixture(scope="module")
def full():
    with torch.device("meta"):
        return DiT4SRTransformer(PRESETS["full"].network)


def test_full_size_is_sd35_medium_with_the_added_layers(full):
    """Position embeddings of 384 x 384 take diffusers a minute to compute: the base is built with smaller ones."""
    config = {name: value for name, value in PRESETS["full"].network.to_json().items() if not isinstance(value, dict)}
    with torch.device("meta"):
        base = SD3Transformer2DModel.from_config(config | {"pos_embed_max_size": 8, "sample_size": 8})
    ours = {name: tuple(value.shape) for name, value in full.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in base.state_dict().items()}
    theirs["pos_embed.pos_embed"] = (1, 384 * 384, 1536)
    assert {name: ours[name] for name in theirs} == theirs

    added = {}
    for block in range(24):
        for attention in ("attn", "attn2")[: 2 if block <= 12 else 1]:
            for layer in ("to_q_control", "to_k_control", "to_v_control", "to_out_control"):
                added[f"transformer_blocks.{block}.{attention}.{layer}"] = (1536, 1536)
        if block <= 12:
            for layer in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
                added[f"transformer_blocks.{block}.attn2.{layer}"] = (1536, 1536)
        added[f"transformer_blocks.{block}.ff.control_conv"] = (6144, 1, 3, 3)
    expected = {f"{name}.weight": shape for name, shape in added.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in added.items()}
    norms = [f"transformer_blocks.{b}.attn2.norm_added_{n}.weight" for b in range(13) for n in "qk"]
    expected |= dict.fromkeys(norms, (64,))
    assert {name: shape for name, shape in ours.items() if name not in theirs} == expected


def test_full_size_in_numbers(full):
    def count(parameters):
        return sum(p.numel() for p in parameters)

    linear_layer = 1536 * 1536 + 1536
    assert count(full.control_parameters()) == (24 + 13) * 4 * linear_layer + 24 * 6144 * 10 == 350_877_696
    assert count(full.unused_parameters()) == 13 * (4 * linear_layer + 2 * 64) == 122_764_928
    assert count(full.parameters()) == 2_716_814_144
    assert full.transformer_blocks[-1].last and not hasattr(full.transformer_blocks[-1].attn, "to_add_out")
    assert [block.attn2 is not None for block in full.transformer_blocks] == [True] * 13 + [False] * 11


def test_full_size_header_is_read_as_the_full_preset(full):
    shapes = {name: tuple(value.shape) for name, value in full.state_dict().items()}
    assert DiT4SRConfig.from_shapes(shapes) == PRESETS["full"].network == replace(full.config)
