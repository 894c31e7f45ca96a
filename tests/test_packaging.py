"""What a fresh clone is set up from: dependencies, packages, the README's two commands, the example photographs."""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fourfold.nodes.common.image_files import read_image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUITE = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((SUITE / "pyproject.toml").read_text(encoding="utf-8"))
README = (SUITE / "README.md").read_text(encoding="utf-8")


def test_requirements_are_those_of_pyproject():
    lines = (SUITE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == PROJECT["project"]["dependencies"]


def test_every_package_is_installed():
    folders = {path.parent.relative_to(SUITE) for top in ("nodes", "trainers", "headless", "commands")
               for path in (SUITE / top).rglob("*.py")}
    named = {".".join(("fourfold", *folder.parts)) for folder in folders}
    assert {"fourfold", *named} == set(PROJECT["tool"]["setuptools"]["packages"])
    assert all((SUITE / folder / "__init__.py").is_file() for folder in folders)


def test_the_readmes_commands_exist_and_ci_runs_the_second():
    program = runpy.run_path(str(SUITE / "scripts" / "run.py"))
    commands = [line.strip() for line in README.splitlines() if line.strip().startswith("python3 scripts/run.py ")]
    assert [command.split()[2] for command in commands] == list(program["EXTRAS"])
    assert set(program["EXTRAS"].values()) <= set(PROJECT["project"]["optional-dependencies"])
    steps = (SUITE / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert steps[-1] == f"exec {commands[1]}"
    assert os.access(SUITE / ".ci" / "run", os.X_OK)


def test_the_setup_script_needs_only_the_standard_library():
    tree = ast.parse((SUITE / "scripts" / "run.py").read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} <= set(sys.stdlib_module_names)


def test_the_setup_script_explains_itself():
    done = subprocess.run([sys.executable, SUITE / "scripts" / "run.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "run.py demo" in done.stderr and "run.py test" in done.stderr


def test_the_demo_runs_where_the_user_is_and_says_what_to_do_next(monkeypatch, capsys):
    """A relative --out is the user's, and so is the folder that the pictures go to without one."""
    program, calls = runpy.run_path(str(SUITE / "scripts" / "run.py")), []
    monkeypatch.setitem(program["main"].__globals__, "set_up", lambda extra: None)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: calls.append((command, options["cwd"])) or
                        subprocess.CompletedProcess(command, 0))
    with pytest.raises(SystemExit) as stop:
        program["main"](["demo", "--out", "pictures"])
    assert stop.value.code == 0 and calls[0][0][-2:] == ["--out", "pictures"] and calls[0][1] is None
    assert f"{program['python']().with_name('fourfold')} restore photo.jpg" in capsys.readouterr().out


def test_the_changelog_knows_this_version():
    changes = (SUITE / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {PROJECT['project']['version']}" in changes


def test_the_licence_is_whole():
    licence = (SUITE / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence


EXAMPLES = runpy.run_path(str(SUITE / "photographs" / "make_photographs.py"))


@pytest.mark.parametrize("name", EXAMPLES["EXAMPLES"])
def test_examples_are_what_our_degradation_makes_of_them(name):
    clean = read_image(SUITE / "photographs" / "clean" / f"{name}.jpg")
    kept = read_image(SUITE / "photographs" / "low_quality" / f"{name}.png")
    made = EXAMPLES["low_quality"](clean, EXAMPLES["EXAMPLES"][name][1])
    assert kept.shape == made.shape and kept.shape[-1] * 4 == clean.shape[-1]
    # other builds of libjpeg decode the clean photograph by a level or so differently
    assert torch.mean((kept - made).abs()) < 2 / 255
    assert f"| `{name}` |" in (SUITE / "photographs" / "README.md").read_text(encoding="utf-8")


def test_examples_are_small():
    assert sum(path.stat().st_size for path in (SUITE / "photographs").rglob("*") if path.is_file()) < 2_000_000
