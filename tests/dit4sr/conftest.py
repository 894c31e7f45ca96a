"""Small random networks, a small Stable Diffusion 3.5 transformer, and recorded runs of the published program."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from fourfold.nodes.dit4sr.config import DiT4SRConfig
from fourfold.nodes.dit4sr.model import DiT4SRTransformer
from safetensors.torch import load_file

FIXTURES = Path(__file__).parents[1] / "fixtures" / "dit4sr"
SMALL = DiT4SRConfig(
    sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=3,
    joint_attention_dim=12, caption_projection_dim=24, pooled_projection_dim=10, pos_embed_max_size=16,
    dual_attention_layers=(0, 1))


@pytest.fixture
def small():
    """`small(**fields)`: the config of a small network."""
    return lambda **fields: replace(SMALL, **fields)


@pytest.fixture
def network():
    """`network(**fields)`: a small network with random weights everywhere, as after a training."""

    def make(**fields):
        torch.manual_seed(0)
        model = DiT4SRTransformer(replace(SMALL, **fields))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture
def inputs():
    """`inputs(batch, height, width)`: latent, LR latent, timestep, prompt and pooled prompt of a small network."""

    def make(batch=2, height=8, width=8, tokens=5, seed=1):
        draw = torch.Generator().manual_seed(seed)
        shapes = [(batch, 4, height, width)] * 2 + [(batch, tokens, 12), (batch, 10)]
        latent, lr_latent, prompt, pooled = (torch.randn(shape, generator=draw) for shape in shapes)
        return latent, lr_latent, torch.rand(batch, generator=draw) * 1000, prompt, pooled

    return make


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory):
    """A diffusers folder with the transformer of a Stable Diffusion 3.5 of the small size."""
    folder = tmp_path_factory.mktemp("sd3") / "transformer"
    torch.manual_seed(5)
    names = ("sample_size", "patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim",
             "num_attention_heads", "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim",
             "pos_embed_max_size", "dual_attention_layers", "qk_norm")
    base = SD3Transformer2DModel(**{name: getattr(SMALL, name) for name in names})
    for name, parameter in base.named_parameters():
        if "norm_" not in name:
            torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
    base.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd3(sd3_folder):
    return SD3Transformer2DModel.from_pretrained(sd3_folder).eval().requires_grad_(False)


@pytest.fixture
def recorded():
    """`recorded(variant)`: the folder of small weights in the published format, and what the published program made."""
    return lambda variant: (FIXTURES / variant, load_file(FIXTURES / variant / "io.safetensors"))


@pytest.fixture
def relative_error():
    return lambda ours, theirs: float((ours - theirs).norm() / theirs.norm())
