"""Photographs and settings of a very small training of DiT4SR."""

import importlib.util
from pathlib import Path

import pytest
import torch
from fourfold.nodes.common.images import read_image, resize, write_image
from fourfold.trainers.data import Photographs
from fourfold.trainers.train_dit4sr import DiT4SRTraining

CLEAN = Path(__file__).parents[3] / "photographs" / "clean"


@pytest.fixture(scope="session")
def program():
    """The module dit4sr_training: NETWORK and SETTINGS; its `__file__` can be run as a program."""
    spec = importlib.util.spec_from_file_location("dit4sr_training", Path(__file__).with_name("dit4sr_training.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Three small photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("cat", "coffee", "astronaut"):
        write_image(folder / f"{name}.png", resize(read_image(CLEAN / f"{name}.jpg")[:, :3], (72, 96)))
    return folder


@pytest.fixture
def config(photographs, program, tmp_path):
    return DiT4SRTraining(preset="tiny", photographs=str(photographs), output_dir=str(tmp_path / "run"),
                          learning_rate=1e-3, l1=0.3, export_dtype="float16", **program.SETTINGS)


@pytest.fixture
def batch_of():
    """`batch_of(study, config, count)`: the first crops of the training."""

    def make(study, config, count=2):
        crops = Photographs(config.photographs, config.crop, config.degradation, config.seed)
        return torch.utils.data.default_collate([crops[i] for i in range(count)])

    return make
