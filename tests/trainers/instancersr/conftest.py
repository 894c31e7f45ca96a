"""Photographs with label maps, settings and the sizes of very small trainings of InstanceRSR."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fourfold.nodes.common.images import read_image, resize, write_image
from fourfold.nodes.common.vision import Preprocessing, VisionEncoder
from fourfold.nodes.instancersr.config import PRESETS
from fourfold.nodes.instancersr.label_files import write_labels
from fourfold.trainers.instancersr_study import InstanceRSRTraining
from fourfold.trainers.labelled import LabelledPhotographs

CLEAN = Path(__file__).parents[3] / "photographs" / "clean"
NETWORK = replace(
    PRESETS["tiny"].network, num_layers=3, attention_head_dim=8, num_attention_heads=2, sample_size=8, control_blocks=2,
    align_block=2, align_hidden=12, head_width=4)
SETTINGS = {"preset": "tiny", "crop": 32, "batch_size": 2, "log_every": 1, "save_every": 2, "num_workers": 0,
            "tensorboard": False, "max_steps": 3, "learning_rate": 1e-3, "weight_decay": 0.01, "loss_weight": "x0",
            "degradation": "light", "scale_weight": 1e-3}


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Three small photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("cat", "coffee", "astronaut"):
        write_image(folder / f"{name}.png", resize(read_image(CLEAN / f"{name}.jpg")[:, :3], (40, 56)))
    return folder


@pytest.fixture(scope="session")
def instances(tmp_path_factory):
    """Their label maps: quarters, and a square in the middle."""
    folder = tmp_path_factory.mktemp("instances")
    for number, name in enumerate(("cat", "coffee", "astronaut")):
        labels = torch.ones(40, 56, dtype=torch.int64)
        labels[:20, 28:], labels[20:, :28], labels[20:, 28:] = 2, 3, 0
        labels[12:28, 20:36] = 7 + number
        write_labels(folder / f"{name}.png", labels)
    return folder


@pytest.fixture(scope="session")
def vision(tmp_path_factory):
    path = tmp_path_factory.mktemp("family") / "vision.safetensors"
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    VisionEncoder.new(sizes, Preprocessing(resize=32, crop=32)).save(path)
    return path


@pytest.fixture
def network():
    return NETWORK


@pytest.fixture
def config(photographs, instances, vision, tmp_path):
    """`config(**fields)`: settings of a training."""

    def make(**fields):
        paths = {"photographs": photographs, "instances": instances, "vision": vision, "output_dir": tmp_path / "run"}
        return InstanceRSRTraining(**{**SETTINGS, **{name: str(path) for name, path in paths.items()}, **fields})

    return make


@pytest.fixture
def crops():
    """`crops(config, grid)`: the training's items."""

    def make(config, grid=(4, 4)):
        return LabelledPhotographs(config.photographs, config.crop, config.degradation, grid, config.instances,
                                   seed=config.seed, captions=False, min_scale=config.min_scale)

    return make


@pytest.fixture
def batch_of(crops):
    """`batch_of(study, count)`: the first crops of the training."""

    def make(study, count=2):
        items = crops(study.config, study.grid)
        return torch.utils.data.default_collate([items[i] for i in range(count)])

    return make
