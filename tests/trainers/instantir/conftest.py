"""Photographs, settings and starting points of very small trainings of InstantIR."""

import importlib.util
from pathlib import Path

import pytest
import torch
from fourfold.nodes.common import tiny
from fourfold.nodes.common.images import read_image, resize, write_image
from fourfold.nodes.common.tiny_text import TinyTextConfig, TinyTextEncoder
from fourfold.nodes.common.vision import Preprocessing, VisionEncoder
from fourfold.nodes.instantir.model import InstantIR
from fourfold.trainers.data import Photographs

CLEAN = Path(__file__).parents[3] / "photographs" / "clean"


@pytest.fixture(scope="session")
def program():
    """The module instantir_training; its `__file__` can be run as a program."""
    path = Path(__file__).with_name("instantir_training.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Three small photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("cat", "coffee", "astronaut"):
        write_image(folder / f"{name}.png", resize(read_image(CLEAN / f"{name}.jpg")[:, :3], (40, 56)))
    return folder


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """codec, text and vision: small ones, random but for the codec."""
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    TinyTextEncoder(TinyTextConfig(width=16, layers=1, heads=2, hidden=16)).save(folder / "text.safetensors")
    sizes = dict(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    VisionEncoder.new(sizes, Preprocessing(resize=32, crop=32)).save(folder / "vision.safetensors")
    return {"codec": str(tiny.tiny_checkpoint("codec")), "text": str(folder / "text.safetensors"),
            "vision": str(folder / "vision.safetensors")}


@pytest.fixture(scope="session")
def starts(tmp_path_factory, program):
    """What each training starts from, with random weights everywhere: name of the training -> file."""
    folder, network = tmp_path_factory.mktemp("starts"), program.NETWORK
    torch.manual_seed(0)
    model = InstantIR.new(network.unet, prediction=network.prediction, anchor=network.anchor,
                          downscale=network.downscale, latent_scale=tiny.load_codec().scale,
                          aggregator_hidden=network.aggregator_hidden)
    files = {}
    for training, add in (("dcp", None), ("previewer", lambda: model.add_adapter(network.resampler)),
                          ("aggregator", lambda: model.add_previewer(network.previewer)),
                          ("nothing", model.add_aggregator)):
        if add:
            add()
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.1)
        files[training] = str(folder / f"{training}.safetensors")
        model.save_pretrained(files[training])
    return files


@pytest.fixture
def config(photographs, family, starts, program, tmp_path):
    """`config(training, **fields)`: settings of one of `program.TRAININGS`."""

    def make(training, **fields):
        parts = {part: file for part, file in family.items() if training != "base" or part != "vision"}
        settings = {**program.SETTINGS, "photographs": str(photographs), "output_dir": str(tmp_path / training),
                    "start": starts.get(training), **parts, **fields}
        return program.TRAININGS[training][0](**settings)

    return make


@pytest.fixture
def batch_of():
    """`batch_of(config, count)`: the first crops of the training."""

    def make(config, count=4):
        crops = Photographs(config.photographs, config.crop, config.degradation, config.seed,
                            min_scale=config.min_scale)
        return torch.utils.data.default_collate([crops[i] for i in range(count)])

    return make


@pytest.fixture
def trained_names():
    """`trained_names(study)`: names of what trains, after checking that a loss reaches every one of them."""

    def check(study, batch, generator):
        loss, _ = study(batch, generator)
        loss.backward()
        trained = {name: p for name, p in study.named_parameters() if p.requires_grad}
        assert [name for name, p in trained.items() if p.grad is None] == []
        assert [name for name, p in study.named_parameters() if not p.requires_grad and p.grad is not None] == []
        study.zero_grad()
        return {name.removeprefix("model.") for name in trained}

    return check
