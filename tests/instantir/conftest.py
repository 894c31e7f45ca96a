"""Small random networks, and recorded runs of the published program on small random weights in its file formats."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fourfold.nodes.common.text import TextEmbedding
from fourfold.nodes.instantir.config import TINY_UNET, ResamplerConfig
from fourfold.nodes.instantir.model import InstantIR
from safetensors.torch import load_file

FIXTURES = Path(__file__).parents[1] / "fixtures" / "instantir"
PARTS = dict(adapter="adapter.pt", aggregator="aggregator.pt", previewer_lora="previewer_lora_weights.bin")
UNET = TINY_UNET | dict(
    in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=(1, 2),
    cross_attention_dim=12, addition_time_embed_dim=4, projection_class_embeddings_input_dim=10 + 6 * 4,
    layers_per_block=1)
RESAMPLER = ResamplerConfig(
    embedding_dim=6, dim=8, depth=1, dim_head=4, heads=2, num_queries=3, output_dim=12, ff_mult=2)
TEXT, POOLED, FEATURES = (5, 12), 10, (7, 6)  # tokens and widths that the small network takes


@pytest.fixture(scope="session")
def published():
    """Paths of the recorded weights, as `InstantIR.load` takes them."""
    return dict(unet=FIXTURES / "unet", **{name: FIXTURES / file for name, file in PARTS.items()})


@pytest.fixture(scope="session")
def recorded(published):
    """The network with the recorded weights. Tests leave it as it is."""
    return InstantIR.load(**published)


@pytest.fixture(scope="session")
def record():
    """`record(name)`: what the published program took and gave, by name."""
    tensors = load_file(FIXTURES / "io.safetensors")

    def of(name):
        return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}

    return of


@pytest.fixture(scope="session")
def relative_error():
    return lambda ours, theirs: float((ours - theirs).norm() / theirs.norm())


@pytest.fixture
def network():
    """`network(**fields)`: a small network with all parts and random weights everywhere, as after a training.

    `unet` and `resampler` replace fields of their configs.
    """

    def make(previewer=True, aggregator=True, unet=None, resampler=None, **fields):
        torch.manual_seed(0)
        model = InstantIR.new(UNET | (unet or {}), replace(RESAMPLER, **(resampler or {})), **fields)
        if aggregator:
            model.add_aggregator()
        if previewer:
            model.add_previewer(2)
        for name, parameter in model.named_parameters():
            std = 0.15 if parameter.ndim > 1 else 0.1
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=std)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture
def inputs():
    """`inputs(batch, height, width)`: what a small network and a run take, by the names of their arguments."""

    def make(batch=1, height=8, width=8, seed=1):
        draw = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(shape, generator=draw)  # noqa: E731
        text = lambda: TextEmbedding(normal(batch, *TEXT), normal(batch, POOLED))  # noqa: E731
        run = dict(lq_latent=normal(batch, 4, height, width), noise=normal(batch, 4, height, width),
                   image=normal(batch, *FEATURES), positive=text(), negative=text(),
                   null_image=normal(1, *FEATURES))
        return run

    return make


@pytest.fixture
def conditions(inputs):
    """`conditions(model, batch, previewer)`: prompt_embeds, pooled, time_ids and tokens for `denoise`."""

    def make(model, batch=2, previewer=False, seed=1):
        run = inputs(batch, seed=seed)
        text = run["positive"]
        time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(batch, -1)
        return text.prompt_embeds, text.pooled, time_ids, model.resample(run["image"], previewer)

    return make
