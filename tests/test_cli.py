"""The command line as a whole: help, usage, exit codes."""

import subprocess
import sys

import pytest
from fourfold import cli
from fourfold.commands.options import METHODS
from fourfold.nodes import restoration


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


def test_methods_are_those_of_the_python_api():
    assert METHODS == restoration.METHODS
