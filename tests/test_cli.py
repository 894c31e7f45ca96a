"""The command line: which files `fourfold restore` writes, what it does about errors, what the demo leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

import fourfold
import pytest
import torch
import torch.nn.functional as F
from fourfold import cli
from fourfold.commands import demo, engines, methods
from fourfold.commands.options import METHODS, sampling_settings
from fourfold.commands.restore import plan
from fourfold.commands.sheet import MARGIN, write_sheet
from fourfold.nodes import restoration
from fourfold.nodes.common.image_files import read_image, write_image
from PIL import Image

METHOD = methods.Method


class Enlarger:
    """Stands in for a method: nearest-neighbour enlargement, two steps, and a refusal of pictures 13 px wide."""

    def __init__(self, name, options):
        if options.model == "missing":
            raise FileNotFoundError("no weights at missing")
        self.name, self.settings, self.used = name, {"steps": 2} | sampling_settings(options), {}

    def __call__(self, lr, seed, scale=4, size=None, on_step=None):
        if lr.shape[-1] == 13:
            raise RuntimeError("13 px bring bad luck")
        self.used = {"prompt": ["a fence"], **self.settings}
        for step in range(2):
            if on_step is not None:
                on_step(step, 2, lr, lr)
        return F.interpolate(lr, size=size) if size else F.interpolate(lr, scale_factor=scale)


@pytest.fixture(autouse=True)
def enlarger(monkeypatch):
    monkeypatch.setattr(methods, "Method", Enlarger)


def picture(path: Path, width: int = 6, height: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(width))
    write_image(path, image)
    return path


def test_help_answers_without_loading_torch():
    program = "import sys, fourfold.cli as c; c.build_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd="/").returncode == 0


def test_wrong_usage_is_told_apart_from_failure(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["restore", "a.png", "--steps", "0"])
    assert stop.value.code == 2
    assert "at least 1" in capsys.readouterr().err
    assert cli.main(["restore", "no/such/file.png"]) == 1
    assert "no file or folder no/such/file.png" in capsys.readouterr().err


def test_a_result_says_how_it_was_made(tmp_path):
    source = picture(tmp_path / "lr.png")
    assert cli.main(["restore", str(source), "--out", str(tmp_path / "out"), "--seed", "7", "--scale", "2",
                     "--start-sigma", "0.5", "--base", str(tmp_path / "private" / "sd3")]) == 0
    with Image.open(tmp_path / "out" / "lr.png") as result:
        assert result.size == (12, 10)
        made = json.loads(result.text["fourfold"])
    assert (made["method"], made["model"], made["seed"], made["scale"]) == ("dit4sr", "tiny", 7, 2)
    assert made["settings"] == {"steps": 2, "start_sigma": 0.5, "prompt": "a fence"}
    assert made["source"] == "lr.png" and made["version"] and made["base"] == "sd3"
    assert "private" not in result.text["fourfold"] and tmp_path.name not in result.text["fourfold"]


def test_an_exact_size(tmp_path, capsys):
    source = picture(tmp_path / "lr.png")
    assert cli.main(["restore", str(source), "--out", str(tmp_path / "out"), "--size", "11x7"]) == 0
    assert read_image(tmp_path / "out" / "lr.png").shape == (1, 3, 7, 11)
    with pytest.raises(SystemExit):
        cli.main(["restore", str(source), "--size", "11by7"])
    assert "WIDTHxHEIGHT" in capsys.readouterr().err


def test_methods_are_those_of_the_python_api():
    assert METHODS == restoration.METHODS


def test_one_bad_file_does_not_stop_the_others(tmp_path, capsys):
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "b.png", width=13)
    (tmp_path / "in" / "c.png").write_text("not a picture")
    picture(tmp_path / "in" / "d.png")
    assert cli.main(["restore", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.png", "d.png"]
    said = capsys.readouterr()
    assert "2 restored, 0 skipped, 2 failed" in said.out
    assert "b.png: FAILED: 13 px bring bad luck" in said.err and "c.png: FAILED" in said.err


def test_missing_weights_are_said_once_not_once_a_file(tmp_path, capsys):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    assert cli.main(["restore", str(tmp_path), "--out", str(tmp_path / "out"), "--model", "missing"]) == 1
    assert capsys.readouterr().err.count("no weights at missing") == 1


def test_overwrite_policies(tmp_path, capsys):
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


def test_an_original_is_never_replaced(tmp_path, capsys):
    source = picture(tmp_path / "a.png")
    before = source.read_bytes()
    assert cli.main(["restore", str(source), "--out", str(tmp_path), "--overwrite", "always"]) == 1
    assert source.read_bytes() == before
    assert "would replace the photograph itself" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_formats(tmp_path, suffix):
    source = picture(tmp_path / "a.png")
    assert cli.main(["restore", str(source), "--out", str(tmp_path / "out"), "--format", suffix]) == 0
    assert read_image(tmp_path / "out" / f"a.{suffix}").shape == (1, 3, 20, 24)


def test_transparency_that_jpeg_cannot_hold_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Enlarger, "__call__", lambda *_, **__: pytest.fail("restored for nothing"))
    write_image(tmp_path / "a.png", torch.rand(1, 4, 5, 6))
    assert cli.main(["restore", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--format", "jpg"]) == 1
    assert not (tmp_path / "out").exists() and "transparency" in capsys.readouterr().err


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch, capsys):
    original = Enlarger.__call__
    monkeypatch.setattr(Enlarger, "__call__", lambda *given, **options: original(*given, **options) * float("nan"))
    assert cli.main(["restore", str(picture(tmp_path / "a.png")), "--out", str(tmp_path / "out")]) == 1
    assert list((tmp_path / "out").iterdir()) == [] and "NaN" in capsys.readouterr().err


def test_ctrl_c_ends_the_run_and_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")

    class Interrupted(Enlarger):
        def __call__(self, lr, seed, **options):
            if (tmp_path / "out" / "a.png").exists():
                raise KeyboardInterrupt
            return super().__call__(lr, seed, **options)

    monkeypatch.setattr(methods, "Method", Interrupted)
    assert cli.main(["restore", str(tmp_path), "--out", str(tmp_path / "out")]) == cli.INTERRUPTED
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.png"]
    assert "interrupted" in capsys.readouterr().err


def test_folders_keep_their_layout_and_never_take_their_own_results(tmp_path):
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "deep" / "b.jpg")
    picture(tmp_path / "in" / "out" / "a.png")
    out = tmp_path / "in" / "out"

    def planned(**options):
        return [str(job.target.relative_to(out)) for job in plan([tmp_path / "in"], out, "png", **options)]

    assert planned() == ["a.png"]
    assert planned(recursive=True) == ["a.png", str(Path("deep") / "b.png")]


def test_photographs_that_would_share_a_result_get_names_of_their_own(tmp_path):
    files = [picture(tmp_path / name) for name in ("x/a.jpg", "x/a.png", "y/a.png", "x/b.png")]
    names = [job.target.name for job in plan([*files, files[0]], tmp_path / "out", "png")]
    assert names == ["a-jpg.png", "a-png.png", "a-png-2.png", "b.png"]


def test_the_demo_in_process(tmp_path, capsys):
    out = tmp_path / "demo"
    assert cli.main(["demo", "--in-process", "--limit", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "in this process, as asked" in said and "GiB of memory at most" in said
    assert ("PSNR" in said) or ("no quality measured" in said)
    for example in demo.examples(2):
        assert read_image(out / f"{example.name}-dit4sr.png").shape[-2:] == example.hr.shape[-2:]
    numbers = json.loads((out / "numbers.json").read_text())["spent"]["dit4sr"]
    assert numbers["peak_memory_bytes"] > 2**20 and len(numbers["picture_s"]) == 2
    assert read_image(out / "sheet.jpg").shape[-1] > 3 * 400


def test_the_demo_says_why_it_does_without_comfyui(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert cli.main(["demo", "--limit", "1", "--out", str(tmp_path / "demo")]) == 0
    assert f"in this process, because: COMFYUI_PATH is {tmp_path}" in capsys.readouterr().out
    assert cli.main(["demo", "--limit", "1", "--out", str(tmp_path / "demo"), "--comfyui", str(tmp_path)]) == 1
    assert "no main.py" in capsys.readouterr().err


def test_the_demo_does_without_comfyui_where_the_workflow_is_absent(tmp_path, monkeypatch, capsys):
    found = tmp_path / "ComfyUI"
    found.mkdir()
    (found / "main.py").write_text("raise SystemExit('started for nothing')")
    monkeypatch.setattr(engines, "WORKFLOWS", tmp_path)
    monkeypatch.setenv("COMFYUI_PATH", str(found))
    command = ["demo", "--limit", "1", "--out", str(tmp_path / "demo")]
    assert cli.main(command) == 0
    assert "in this process, because: there is no workflow dit4sr_tiny.json" in capsys.readouterr().out
    assert cli.main([*command, "--comfyui", str(found)]) == 1
    assert "no workflow dit4sr_tiny.json" in capsys.readouterr().err


def test_a_workflow_is_filled_with_picture_and_seed():
    graph = {"1": {"class_type": "FourfoldExamplePhoto", "inputs": {"photo": "cat"}},
             "2": {"class_type": "Sampler", "inputs": {"seed": 0, "latent": ["1", 0]}},
             "3": {"class_type": "Other", "inputs": {"seed": ["2", 0]}}}
    filled = engines.filled(graph, "mine.png", 5)
    assert filled["1"] == {"class_type": "LoadImage", "inputs": {"image": "mine.png"}}
    assert filled["2"]["inputs"] == {"seed": 5, "latent": ["1", 0]}
    assert filled["3"]["inputs"]["seed"] == ["2", 0]  # a link stays a link
    assert graph["1"]["inputs"] == {"photo": "cat"}


def test_a_sheet_has_a_column_a_label_and_rows_as_high_as_their_pictures(tmp_path):
    wide, square = torch.zeros(1, 3, 10, 40), torch.ones(1, 1, 8, 8)
    write_sheet(tmp_path / "sheet.png", [{"a": wide, "b": wide}, {"b": square}], cell=40)
    sheet = read_image(tmp_path / "sheet.png")
    top = sheet.shape[-2] - 10 - 40 - 2 * MARGIN
    assert sheet.shape[-1] == 3 * MARGIN + 2 * 40
    assert sheet[..., top:top + 10, MARGIN:MARGIN + 40].max() == 0
    assert sheet[..., top + 10, :].min() == 1  # the gap
    assert sheet[..., top + 10 + MARGIN:, :MARGIN + 40].min() == 1  # no picture for this label
    with pytest.raises(ValueError, match="at least one row"):
        write_sheet(tmp_path / "sheet.png", [])


def test_the_tiny_weights_from_the_command_line_are_those_of_the_python_api(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "Method", METHOD)
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


def test_the_captioner_reaches_the_method(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(methods, "Method", METHOD)
    source, folder = picture(tmp_path / "lr.png", width=8, height=8), tmp_path / "blip"
    command = ["restore", str(source), "--out", str(tmp_path / "out"), "--device", "cpu", "--steps", "1",
               "--captioner", str(folder)]
    assert cli.main(command) == 1
    assert f"{folder} does not exist" in capsys.readouterr().err
    asked = []
    monkeypatch.setattr(restoration, "load_captioner", lambda name, device: asked.append((name, device)) or (
        lambda pictures: ["a red door"] * len(pictures)))
    assert cli.main(command) == 0 and asked == [(str(folder), "cpu")]
    with Image.open(tmp_path / "out" / "lr.png") as result:
        made = json.loads(result.text["fourfold"])
    assert made["settings"]["prompt"] == "a red door" and made["captioner"] == "blip"
