"""DINOv2's config from shapes alone: what transformers' own networks have."""

import pytest
import torch
from fourfold.nodes.common.dinov2_shapes import config_from_shapes
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

PUBLISHED = {
    "small": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
    "giant": dict(hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, use_swiglu_ffn=True),
}


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("sizes", PUBLISHED.values(), ids=PUBLISHED)
def test_published_networks_are_read_off_their_weights(sizes, registers):
    sizes = dict(sizes, image_size=518, patch_size=14)
    with torch.device("meta"):
        network = (Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers))
                   if registers else Dinov2Model(Dinov2Config(**sizes)))
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    config = config_from_shapes(shapes)
    assert {name: getattr(config, name) for name in sizes} == sizes
    assert getattr(config, "num_register_tokens", 0) == registers
    with torch.device("meta"):
        again = type(network)(config)
    assert {name: tuple(value.shape) for name, value in again.state_dict().items()} == shapes


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"expected a DINOv2 in the names that transformers uses"):
        config_from_shapes({"patch_embed.proj.weight": (384, 3, 14, 14)})
