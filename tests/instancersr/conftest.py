"""Small random networks, and a small DiT to start from."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiTTransformer2DModel
from fourfold.nodes.common.codec import CodecConfig, LinearCodec
from fourfold.nodes.instancersr.config import InstanceRSRConfig, Sampling
from fourfold.nodes.instancersr.model import InstanceRSR
from fourfold.nodes.instancersr.restore import System

SMALL = InstanceRSRConfig(
    num_attention_heads=3, attention_head_dim=8, in_channels=4, num_layers=3, sample_size=8, num_embeds_ada_norm=5,
    control_blocks=2, align_block=2, align_hidden=12, align_dim=6, latent_scale=1.0)


def randomize(module, seed=0):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.1)
    return module


@pytest.fixture
def small():
    """`small(**fields)`: the config of a small network."""
    return lambda **fields: replace(SMALL, **fields)


@pytest.fixture
def network():
    """`network(**fields)`: a small network with random weights everywhere, as after a training."""

    def make(**fields):
        return randomize(InstanceRSR(replace(SMALL, **fields))).eval().requires_grad_(False)

    return make


@pytest.fixture
def inputs():
    """`inputs(batch, height, width, channels)`: noisy joint latent, LR latent, timesteps."""

    def make(batch=2, height=8, width=8, channels=8, seed=1):
        draw = torch.Generator().manual_seed(seed)
        latent = torch.randn(batch, channels, height, width, generator=draw)
        lr_latent = torch.randn(batch, 4, height, width, generator=draw)
        return latent, lr_latent, torch.randint(0, 1000, (batch,), generator=draw)

    return make


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory):
    """A diffusers folder with a DiT of the small size, every weight random: the base of a training."""
    folder = tmp_path_factory.mktemp("dit")
    base = DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        num_embeds_ada_norm=5)
    randomize(base, seed=7).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def dit(dit_folder):
    return DiTTransformer2DModel.from_pretrained(dit_folder / "transformer").eval().requires_grad_(False)


@pytest.fixture
def begun(dit_folder):
    """`begun(folder, ablations, **fields)`: a network of the small size as a training on a DiT begins with."""

    def make(folder=dit_folder, ablations=None, **fields):
        own = {name: getattr(SMALL, name) for name in ("control_blocks", "align_block", "align_hidden", "align_dim")}
        return InstanceRSR.from_base(folder, ablations, **own | fields)

    return make


@pytest.fixture
def system(network):
    """A whole system at the small size: latents a quarter of the picture."""
    torch.manual_seed(1)
    sampling = Sampling(steps=2, tile=16, overlap=4, multiple=8, min_short_side=32, min_area=4)
    codec = LinearCodec(CodecConfig(latent_channels=4)).eval()
    return System(network(prediction="x0", anchor="lr", learned_variance=False), codec, sampling)
