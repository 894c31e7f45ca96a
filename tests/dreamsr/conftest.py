"""Small random DreamSR networks and what they take."""

from dataclasses import replace

import pytest
import torch
from fourfold.nodes.common.text import TextEmbedding
from fourfold.nodes.dreamsr.config import DreamSRConfig
from fourfold.nodes.dreamsr.model import DreamSR

SMALL = DreamSRConfig(
    in_channels=16, num_layers=3, num_single_layers=2, attention_head_dim=8, num_attention_heads=3,
    joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4), control_layers=(0, 2), lora_rank=4)


@pytest.fixture
def small():
    """`small(**fields)`: the config of a small network."""
    return lambda **fields: replace(SMALL, **fields)


@pytest.fixture
def network():
    """`network(**fields)`: a small network with random weights everywhere, as after a training."""

    def make(seed=0, **fields):
        torch.manual_seed(seed)
        model = DreamSR(replace(SMALL, **fields))
        for name, parameter in model.named_parameters():
            if "norm_" not in name:
                torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture
def texts():
    """`texts(batch, tokens, seed)`: encoded prompts."""

    def make(batch=2, tokens=5, seed=1):
        draw = torch.Generator().manual_seed(seed)
        return TextEmbedding(torch.randn(batch, tokens, 12, generator=draw), torch.randn(batch, 10, generator=draw))

    return make


@pytest.fixture
def latents():
    """`latents(batch, height, width)`: noisy latent and LR latent."""

    def make(batch=2, height=8, width=12, seed=1):
        draw = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(batch, 4, height, width, generator=draw) for _ in range(2))

    return make


@pytest.fixture
def relative_error():
    return lambda ours, theirs: float((ours - theirs).norm() / theirs.norm())
