"""`fourfold.restore`: one call for every method, with an untrained tiny family."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import fourfold
import pytest
import torch
from fourfold.nodes import restoration
from fourfold.nodes.common import tiny
from fourfold.nodes.common.captions import EmbeddedCaptioner
from fourfold.nodes.common.images import prepare_lr
from fourfold.nodes.common.tiny_text import TinyTextEncoder
from fourfold.nodes.dit4sr.config import PRESETS
from fourfold.nodes.dit4sr.model import WEIGHTS_NAME, DiT4SRTransformer


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A folder with the tiny family: the shipped codec, everything else barely begun."""
    folder = tmp_path_factory.mktemp("checkpoints")
    shutil.copy(tiny.tiny_checkpoint("codec"), folder)
    torch.manual_seed(0)
    network = DiT4SRTransformer(PRESETS["tiny"].network)
    network.init_from_scratch()
    torch.nn.init.normal_(network.proj_out.weight, std=0.02)
    network.save_pretrained(folder / "dit4sr")
    shutil.move(folder / "dit4sr" / WEIGHTS_NAME, folder / tiny.FILES["dit4sr"])
    TinyTextEncoder().save(folder / tiny.FILES["text"])
    return folder


@pytest.fixture(autouse=True)
def use(family, monkeypatch):
    monkeypatch.setattr(tiny, "CHECKPOINTS", family)
    restoration._loaded.clear()
    yield
    restoration._loaded.clear()


def picture(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def test_restores_with_nothing_but_a_picture():
    assert fourfold.restore is restoration.restore
    sr = fourfold.restore(picture(1, 3, 20, 33), device="cpu")
    assert sr.shape == (1, 3, 80, 132) and sr.dtype == torch.float32 and sr.isfinite().all()
    assert torch.equal(sr, fourfold.restore(picture(1, 3, 20, 33), device="cpu"))


def test_arguments_reach_the_method():
    steps = []
    sr = fourfold.restore(picture(2, 4, 6, 5), method="dit4sr", model="tiny", scale=2.5, seed=3, steps=2,
                          prompt="bright, warm", device="cpu", color_fix="wavelet", tile=16, overlap=4,
                          on_step=lambda i, n, x, x0: steps.append((i, n)))
    assert sr.shape == (2, 4, 15, 12) and steps == [(0, 2), (1, 2)]
    other = fourfold.restore(picture(2, 4, 6, 5), scale=2.5, seed=4, steps=2, prompt="bright, warm", device="cpu",
                             color_fix="wavelet", tile=16, overlap=4)
    assert not torch.equal(sr, other)


def test_weights_are_loaded_once(monkeypatch):
    loads = []
    original = DiT4SRTransformer.from_pretrained.__func__
    monkeypatch.setattr(DiT4SRTransformer, "from_pretrained", classmethod(
        lambda cls, *arguments, **options: loads.append(1) or original(cls, *arguments, **options)))
    for _ in range(3):
        fourfold.restore(picture(1, 3, 8, 8), device="cpu", steps=1)
    assert len(loads) == 1


def test_the_captioner_is_the_methods_own_unless_a_folder_is_named(tmp_path, monkeypatch):
    used, asked, options = [], [], dict(device="cpu", steps=1, on_settings=lambda settings: used.append(settings))
    fourfold.restore(picture(1, 3, 8, 8), **options)
    own = EmbeddedCaptioner(as_good=True)(prepare_lr(picture(1, 3, 8, 8), 4, None, 8, 0).lr)
    assert used[0]["prompt"] == own and used[0]["steps"] == 1 and used[0]["tile"] == PRESETS["tiny"].sampling.tile
    monkeypatch.setattr(restoration, "load_captioner", lambda name, device: asked.append(name) or (
        lambda pictures: ["a door"] * len(pictures)))
    for _ in range(2):
        fourfold.restore(picture(2, 3, 8, 8), captioner=tmp_path, **options)
    assert used[1]["prompt"] == ["a door", "a door"] and asked == [str(tmp_path)]


def test_the_last_weights_leave_before_others_come(tmp_path, monkeypatch):
    kept, (a, b) = [], (str(tmp_path / name) for name in "ab")
    for folder in (a, b):
        Path(folder).mkdir()
    module = SimpleNamespace(load_system=lambda *_, **__: kept.append(len(restoration._loaded)) or object())
    monkeypatch.setattr(restoration, "import_module", lambda *_: module)
    first = restoration.load_system("dit4sr", a, None, None)
    assert restoration.load_system("dit4sr", a, None, None) is first
    assert restoration.load_system("dit4sr", b, None, None) is not first and kept == [0, 0]


def test_mistakes_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no method 'esrgan'; choose one of dit4sr"):
        fourfold.restore(picture(1, 3, 8, 8), method="esrgan")
    with pytest.raises(FileNotFoundError, match=r"nowhere', but there is no such file.*acceptee/DiT4SR"):
        fourfold.restore(picture(1, 3, 8, 8), model=tmp_path / "nowhere", device="cpu")
    with pytest.raises(ValueError, match=r"tiny weights .* bring their own VAE"):
        fourfold.restore(picture(1, 3, 8, 8), base=tmp_path)
    with pytest.raises(ValueError, match="there is no device 'gpu'"):
        fourfold.restore(picture(1, 3, 8, 8), device="gpu")
    with pytest.raises(ValueError, match="steps is 0"):
        fourfold.restore(picture(1, 3, 8, 8), steps=0, device="cpu")
    restoration._loaded.clear()
    monkeypatch.setattr(tiny, "CHECKPOINTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tiny family's dit4sr checkpoint is missing.*train_tiny\.sh"):
        fourfold.restore(picture(1, 3, 8, 8), device="cpu")
