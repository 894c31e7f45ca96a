"""`fourfold demo`: what it leaves behind, and where it runs."""

import json

from fourfold import cli
from fourfold.commands import demo, engines
from fourfold.nodes.common.image_files import read_image


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
