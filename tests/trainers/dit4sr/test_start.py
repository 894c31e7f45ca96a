"""DiT4SR's tiny training that starts from what an earlier one exported."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fourfold.nodes.common.errors import MismatchedKeysError
from fourfold.trainers.train_dit4sr import DiT4SRTraining, build

SPEC = importlib.util.spec_from_file_location("dit4sr_training", Path(__file__).with_name("dit4sr_training.py"))
program = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(program)
HEADLESS = replace(program.NETWORK, head_width=0)


def settings(**fields):
    fields = {"photographs": "photographs", "export_dtype": "float32", **program.SETTINGS, **fields}
    return DiT4SRTraining(preset="tiny", **fields)


@pytest.fixture
def earlier(tmp_path):
    """The export of a training without a head, and its state."""
    study = build(settings(seed=3), HEADLESS)
    for part in (study.transformer, study.text):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    state = {name: value.clone() for name, value in study.state_dict().items()}
    study.save(state, tmp_path / "export", step=5)
    return tmp_path / "export", state


def test_weights_are_those_of_the_earlier_training_and_a_new_head_changes_nothing(earlier):
    folder, state = earlier
    study = build(settings(start=str(folder)), program.NETWORK)
    own = study.state_dict()
    added = {name for name in own if name.startswith("transformer.head.")}
    assert added and own.keys() - added == state.keys()
    for name, value in state.items():
        assert torch.equal(own[name], value), name
    assert own["transformer.head.layers.4.weight"].abs().max() == 0


def test_another_network_is_refused(earlier):
    folder, _ = earlier
    with pytest.raises(MismatchedKeysError, match="of another shape"):
        build(settings(start=str(folder)), replace(program.NETWORK, num_attention_heads=4, caption_projection_dim=32))


def test_the_full_size_goes_on_with_resume():
    with pytest.raises(ValueError, match="--resume"):
        DiT4SRTraining(preset="full", photographs="photographs", start="export")


def test_folders_of_the_machine_are_not_in_the_exported_description():
    assert build(settings(), program.NETWORK).summary()["start"] is None
    study = build(settings(), program.NETWORK)
    study.config = replace(study.config, start="/somewhere/on/this/machine/export")
    assert study.summary()["start"] == "export"
