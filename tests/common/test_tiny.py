"""Where the tiny family lies."""

from pathlib import Path

import pytest
from fourfold.nodes.common import tiny
from fourfold.nodes.common.checkpoints import read_header


def test_shipped_parts_are_found_in_the_suite():
    assert tiny.checkpoints_dir().name == "checkpoints" and (tiny.checkpoints_dir().parent / "pyproject.toml").is_file()
    assert tiny.tiny_checkpoint("codec").is_file()
    assert tiny.load_codec().latent_channels == 16


def test_shipped_files_describe_themselves_without_folders_of_the_machine_they_were_made_on():
    for path in tiny.checkpoints_dir().glob("*.safetensors"):
        header = read_header(path)
        assert header.method in tiny.FILES and header.config and header.training
        assert not [value for value in header.training.values() if Path(str(value)).is_absolute()], path.name
    assert sum(path.stat().st_size for path in tiny.checkpoints_dir().iterdir()) < 64 * 2**20


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match=r"no part 'vae'; there are codec, text, "):
        tiny.tiny_checkpoint("vae")


def test_missing_parts_are_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "CHECKPOINTS", tmp_path)
    assert tiny.available_methods() == []
    for part, file in tiny.FILES.items():
        with pytest.raises(FileNotFoundError, match=rf"{part} checkpoint is missing.*{file}.*train_tiny\.sh"):
            tiny.tiny_checkpoint(part)
    (tmp_path / tiny.FILES["dit4sr"]).touch()
    assert tiny.available_methods() == ["dit4sr"] and tiny.tiny_checkpoint("dit4sr").parent == tmp_path
