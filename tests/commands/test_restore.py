"""`fourfold restore`: which files it writes, what is in them, what it does about errors."""

import io
import json
import sys

import fourfold
import pytest
import torch
from fourfold import cli
from fourfold.commands import methods
from fourfold.nodes import restoration
from fourfold.nodes.common.image_files import read_image, write_image
from PIL import Image


def test_a_result_says_how_it_was_made(tmp_path, picture):
    source = picture(tmp_path / "lr.png")
    weights = tmp_path / "private" / "dit4sr_q"
    weights.mkdir(parents=True)
    assert cli.main(["restore", str(source), "--out", str(tmp_path / "out"), "--seed", "7", "--scale", "2",
                     "--start-sigma", "0.5", "--model", str(weights), "--base", str(tmp_path / "private" / "sd3")]) == 0
    with Image.open(tmp_path / "out" / "lr.png") as result:
        assert result.size == (12, 10)
        made = json.loads(result.text["fourfold"])
    assert (made["method"], made["model"], made["seed"], made["scale"]) == ("dit4sr", "dit4sr_q", 7, 2)
    assert made["settings"] == {"steps": 2, "start_sigma": 0.5, "prompt": "a fence"}
    assert made["source"] == "lr.png" and made["version"] and made["base"] == "sd3"
    assert "private" not in result.text["fourfold"] and tmp_path.name not in result.text["fourfold"]


def test_an_exact_size(tmp_path, capsys, picture):
    source = picture(tmp_path / "lr.png")
    assert cli.main(["restore", str(source), "--out", str(tmp_path / "out"), "--size", "11x7"]) == 0
    assert read_image(tmp_path / "out" / "lr.png").shape == (1, 3, 7, 11)
    with pytest.raises(SystemExit):
        cli.main(["restore", str(source), "--size", "11by7"])
    assert "WIDTHxHEIGHT" in capsys.readouterr().err


def test_one_bad_file_does_not_stop_the_others(tmp_path, capsys, picture):
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "b.png", width=13)
    (tmp_path / "in" / "c.png").write_text("not a picture")
    picture(tmp_path / "in" / "d.png")
    assert cli.main(["restore", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.png", "d.png"]
    said = capsys.readouterr()
    assert "2 restored, 0 skipped, 2 failed" in said.out
    assert "b.png: FAILED: 13 px bring bad luck" in said.err and "c.png: FAILED" in said.err
    listed = said.err.partition("failed:\n")[2].splitlines()  # again at the end, where they are seen
    assert [line.strip().partition(": ")[0] for line in listed] == [str(tmp_path / "in" / name) for name in
                                                                    ("b.png", "c.png")]
    assert listed[0].endswith("13 px bring bad luck")


def test_a_name_that_is_not_there_does_not_stop_the_others(tmp_path, capsys, picture):
    source, gone, empty = picture(tmp_path / "a.png"), tmp_path / "gone.png", tmp_path / "empty"
    empty.mkdir()
    assert cli.main(["restore", str(gone), str(source), str(empty), "--out", str(tmp_path / "out")]) == 1
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.png"]
    said = capsys.readouterr()
    assert "1 restored, 0 skipped, 2 failed" in said.out
    assert f"{gone}: FAILED: there is no file or folder" in said.err and f"no photographs in {empty}" in said.err
    assert len(said.err.partition("failed:\n")[2].splitlines()) == 2


def test_without_a_photograph_nothing_is_loaded(tmp_path, capsys, enlarger, monkeypatch):
    monkeypatch.setattr(enlarger, "__init__", lambda *_: pytest.fail("loaded for nothing"))
    assert cli.main(["restore", str(tmp_path / "gone.png"), "--out", str(tmp_path / "out")]) == 1
    assert "0 restored, 0 skipped, 1 failed" in capsys.readouterr().out


def test_damaged_weights_are_said_once_not_once_a_file(tmp_path, capsys, picture):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "broken").mkdir()
    command = ["restore", str(tmp_path), "--out", str(tmp_path / "out"), "--model", str(tmp_path / "broken")]
    assert cli.main(command) == 1
    assert capsys.readouterr().err.count("the weights in broken are damaged") == 1


def test_each_line_is_out_before_the_next_picture_begins_even_into_a_file(tmp_path, picture, enlarger, monkeypatch):
    """A log or a pipe is not a terminal: Python would keep the lines back until the end."""
    for name in "ab":
        picture(tmp_path / "in" / f"{name}.png")
    raw, errors, seen = io.BytesIO(), io.StringIO(), []
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    monkeypatch.setattr(sys, "stderr", errors)

    class Watched(enlarger):
        def __call__(self, lr, seed, **options):
            seen.append(raw.getvalue().decode())
            return super().__call__(lr, seed, **options)

    monkeypatch.setattr(methods, "Method", Watched)
    assert cli.main(["restore", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert seen[0] == "" and len(seen) == 2
    (line,) = seen[1].splitlines()
    assert line.startswith(f"[1/2] {tmp_path / 'in' / 'a.png'} -> {tmp_path / 'out' / 'a.png'} (6 x 5 -> 24 x 20 px, ")
    assert errors.getvalue() == ""  # no bar


def test_a_terminal_gets_a_bar(tmp_path, picture, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert cli.main(["restore", str(picture(tmp_path / "a.png")), "--out", str(tmp_path / "out")]) == 0
    assert "[1/1] a.png: 0step" in terminal.getvalue()


def test_overwrite_policies(tmp_path, capsys, picture):
    source, out = picture(tmp_path / "a.png"), tmp_path / "out"
    target = picture(out / "a.png", width=3)
    before = target.read_bytes()
    command = ["restore", str(source), "--out", str(out), "--overwrite"]
    assert cli.main([*command, "never"]) == 0
    assert target.read_bytes() == before and "1 skipped" in capsys.readouterr().out
    assert cli.main([*command, "rename"]) == 0
    assert target.read_bytes() == before and read_image(out / "a-2.png").shape[-1] == 24
    assert cli.main([*command, "rename"]) == 0
    assert (out / "a-3.png").exists()
    assert cli.main([*command, "always"]) == 0
    assert read_image(target).shape[-1] == 24


def test_an_original_is_never_replaced_which_is_said_before_the_weights_are_loaded(
        tmp_path, capsys, picture, enlarger, monkeypatch):
    monkeypatch.setattr(enlarger, "__init__", lambda *_: pytest.fail("loaded for nothing"))
    source = picture(tmp_path / "a.png")
    before = source.read_bytes()
    assert cli.main(["restore", str(source), "--out", str(tmp_path), "--overwrite", "always"]) == 1
    assert source.read_bytes() == before
    assert "would replace the photograph itself" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_formats(tmp_path, suffix, picture):
    source = picture(tmp_path / "a.png")
    assert cli.main(["restore", str(source), "--out", str(tmp_path / "out"), "--format", suffix]) == 0
    assert read_image(tmp_path / "out" / f"a.{suffix}").shape == (1, 3, 20, 24)


def test_transparency_that_jpeg_cannot_hold_is_said_before_the_work(tmp_path, monkeypatch, capsys, enlarger):
    monkeypatch.setattr(enlarger, "__call__", lambda *_, **__: pytest.fail("restored for nothing"))
    write_image(tmp_path / "a.png", torch.rand(1, 4, 5, 6))
    assert cli.main(["restore", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--format", "jpg"]) == 1
    assert not (tmp_path / "out").exists() and "transparency" in capsys.readouterr().err


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch, capsys, picture, enlarger):
    original = enlarger.__call__
    monkeypatch.setattr(enlarger, "__call__", lambda *given, **options: original(*given, **options) * float("nan"))
    assert cli.main(["restore", str(picture(tmp_path / "a.png")), "--out", str(tmp_path / "out")]) == 1
    assert list((tmp_path / "out").iterdir()) == [] and "NaN" in capsys.readouterr().err


def test_ctrl_c_ends_the_run_and_keeps_what_is_finished(tmp_path, monkeypatch, capsys, picture, enlarger):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")

    class Interrupted(enlarger):
        def __call__(self, lr, seed, **options):
            if (tmp_path / "out" / "a.png").exists():
                raise KeyboardInterrupt
            return super().__call__(lr, seed, **options)

    monkeypatch.setattr(methods, "Method", Interrupted)
    assert cli.main(["restore", str(tmp_path), "--out", str(tmp_path / "out")]) == cli.INTERRUPTED
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.png"]
    assert "interrupted" in capsys.readouterr().err


def test_the_tiny_weights_from_the_command_line_are_those_of_the_python_api(
        tmp_path, monkeypatch, picture, real_method):
    monkeypatch.setattr(methods, "Method", real_method)
    source = picture(tmp_path / "lr.png", width=20, height=16)
    assert cli.main(["restore", str(source), "--out", str(tmp_path / "out"), "--seed", "3", "--device", "cpu",
                     "--steps", "1"]) == 0
    expected = fourfold.restore(read_image(source), seed=3, steps=1, device="cpu")
    restored = read_image(tmp_path / "out" / "lr.png")
    assert restored.shape == (1, 3, 64, 80)
    assert (restored - expected).abs().max() <= 0.51 / 255
    with Image.open(tmp_path / "out" / "lr.png") as result:
        made = json.loads(result.text["fourfold"])
    system = restoration.load_system("dit4sr", "tiny", None, "cpu")
    assert made["settings"]["steps"] == 1 and made["settings"]["guidance"] == system.sampling.guidance
    assert made["settings"]["negative"] == system.negative_prompt and made["settings"]["color_fix"] == "adain"
    again = fourfold.restore(read_image(source), seed=3, steps=1, device="cpu", prompt=made["settings"]["prompt"])
    assert torch.equal(again, expected) and made["settings"]["prompt"] and made["captioner"] == "embedded"


def test_the_captioner_reaches_the_method(tmp_path, monkeypatch, capsys, picture, real_method):
    monkeypatch.setattr(methods, "Method", real_method)
    source, folder = picture(tmp_path / "lr.png", width=8, height=8), tmp_path / "blip"
    command = ["restore", str(source), "--out", str(tmp_path / "out"), "--device", "cpu", "--steps", "1",
               "--captioner", str(folder)]
    assert cli.main(command) == 1
    assert f"{folder} does not exist" in capsys.readouterr().err
    asked = []
    monkeypatch.setattr(restoration, "load_captioner", lambda name, device: asked.append((name, device)) or (
        lambda pictures: ["a red door"] * len(pictures)))
    assert cli.main(command) == 0 and asked == [(str(folder), torch.device("cpu"))]
    with Image.open(tmp_path / "out" / "lr.png") as result:
        made = json.loads(result.text["fourfold"])
    assert made["settings"]["prompt"] == "a red door" and made["captioner"] == "blip"
