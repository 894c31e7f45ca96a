"""What is wrong whatever the pictures are is said once, with the way out, before any weights are loaded."""

import pytest
from fourfold import cli
from fourfold.nodes import restoration
from fourfold.nodes.common import tiny
from fourfold.nodes.common.codec import LinearCodec


@pytest.fixture
def complaint(tmp_path, picture, enlarger, monkeypatch, capsys):
    """`complaint(*options)`: what `restore` says of two photographs with these options, of which it restores none."""
    monkeypatch.setattr(enlarger, "__init__", lambda *_: pytest.fail("loaded for nothing"))
    files = [str(picture(tmp_path / "in" / f"{name}.png")) for name in "ab"]

    def run(*options: str) -> str:
        assert cli.main(["restore", *files, "--out", str(tmp_path / "out"), *options]) == 1
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1
        return said.err

    return run


@pytest.mark.parametrize("options, expected", [
    (("--tile", "8", "--overlap", "8"), "--overlap 8 must be smaller than --tile 8"),
    (("--tile", "8"), "--overlap 8 (what dit4sr takes if it is not given) must be smaller than --tile 8"),
    (("--overlap", "32"), "must be smaller than --tile 32 (what dit4sr takes if it is not given): lower the overlap"),
    (("--tile", "15", "--overlap", "4"), "--tile 15 must be a multiple of 2, the side of a token of dit4sr: 14 or 16"),
    (("--preview-start", "0.5"), "dit4sr has no --preview-start: leave it out, or choose another --method"),
    (("--method", "instantir", "--start-sigma", "0.5", "--steps", "2"), "instantir has no --start-sigma: leave it out"),
    (("--device", "gpu"), "there is no device 'gpu'. On this machine there is cpu"),
    (("--base", "sd3"), "the base is sd3, but tiny weights (the model is 'tiny') bring their own VAE and text encoder"),
])
def test_options_that_cannot_work_are_said_once(complaint, options, expected):
    assert expected in complaint(*options)


def test_a_folder_without_the_codec_of_tiny_ones_is_full_size(complaint, tmp_path):
    (tmp_path / "dit4sr_q").mkdir()
    assert "--overlap 24 (what" in complaint("--tile", "16", "--model", str(tmp_path / "dit4sr_q"))


def test_a_base_beside_the_weights_of_a_tiny_training_is_refused(complaint, tmp_path):
    LinearCodec().save(tmp_path / tiny.FILES["codec"])
    assert "leave the base out" in complaint("--model", str(tmp_path), "--base", "sd3")


def test_a_word_for_a_model_is_answered_with_the_folders_to_give(complaint):
    said = complaint("--model", "full")
    assert "the model is 'full', but there is no such file or folder" in said
    for part in ("'tiny'", "dit4sr_q", "huggingface.co/acceptee/DiT4SR", "as base the folder of Stable Diffusion 3.5"):
        assert part in said


def test_every_method_says_what_its_full_size_weights_are():
    assert set(restoration.FULL_SIZE) == set(restoration.METHODS)


def test_results_that_cannot_be_written(complaint, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for folder in ("notes.txt", "notes.txt/deep/er"):
        said = complaint("--out", str(tmp_path / folder))
        assert f"--out {tmp_path / folder} cannot be a folder: {tmp_path / 'notes.txt'} is a file" in said


def test_a_folder_that_the_user_may_not_write_to(complaint, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    assert f"{tmp_path} does not allow it" in complaint("--out", str(tmp_path / "results"))


@pytest.mark.parametrize("command", [["evaluate", "--data", "nowhere"], ["demo"]])
def test_the_other_commands_look_first_too(command, capsys, tmp_path):
    assert cli.main([*command, "--out", str(tmp_path), "--device", "gpu"]) == 1
    assert "there is no device 'gpu'" in capsys.readouterr().err


def test_a_seed_that_no_generator_takes_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["restore", "a.png", "--seed", str(2**64)])
    assert stop.value.code == 2 and f"at most {2**64 - 1}" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["-0.1", "1.1", "half"])
def test_parts_of_the_steps_lie_between_0_and_1(value, capsys):
    with pytest.raises(SystemExit):
        cli.main(["restore", "a.png", "--method", "instantir", "--creative-start", value])
    assert f"a number from 0 to 1 is expected, not '{value}'" in capsys.readouterr().err
