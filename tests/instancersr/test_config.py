"""Configs: presets, what is refused, what is written and read."""

import json
from dataclasses import replace

import pytest
from fourfold.nodes.instancersr.config import PRESETS, InstanceRSRConfig, Sampling


def test_full_size_is_the_papers():
    full = PRESETS["full"]
    assert full.network == InstanceRSRConfig() and full.sampling == Sampling()
    assert (full.network.width, full.network.num_layers, full.network.joint_channels) == (1152, 28, 8)
    assert full.network.out_channels == 16 and full.network.null_class == 1000
    assert (full.sampling.steps, full.sampling.tile * 8, full.sampling.min_short_side) == (10, 512, 512)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_read_as_written_and_their_windows_are_what_they_were_trained_on(name):
    preset = PRESETS[name]
    assert InstanceRSRConfig.from_json(json.loads(json.dumps(preset.network.to_json()))) == preset.network
    assert preset.sampling.tile == preset.network.sample_size
    pixels = preset.sampling.multiple // preset.network.patch_size  # a latent
    assert preset.sampling.min_short_side == preset.sampling.tile * pixels


@pytest.mark.parametrize(("fields", "text"), [
    ({"control_blocks": 29}, r"control_blocks is 29, but must be in 1\.\.28"), ({"align_block": 0}, "align_block is 0"),
    ({"prediction": "flow"}, "prediction is 'flow'; 'epsilon' or 'v' or 'x0'"), ({"anchor": "hr"}, "anchor is 'hr'"),
    ({"anchor": "lr"}, "needs prediction 'x0'; it is 'epsilon'")])
def test_impossible_configs_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        replace(InstanceRSRConfig(), **fields)


def test_fields_of_another_version_and_other_transformers_are_refused():
    with pytest.raises(ValueError, match="does not know: width"):
        InstanceRSRConfig.from_json({"width": 3})
    with pytest.raises(ValueError, match="norm_type is 'layer_norm'"):
        InstanceRSRConfig.from_base({"norm_type": "layer_norm"})
    with pytest.raises(ValueError, match="emits 12 channels from 4"):
        InstanceRSRConfig.from_base({"in_channels": 4, "out_channels": 12})
