"""The node tests once more, inside the interpreter of the real ComfyUI: with its own schemas, CLIP, VAE and memory."""

import os
import subprocess
from pathlib import Path

import _pytest
import pytest
from fourfold.headless.server import SUITE, find_comfyui, find_python

TESTS = ("tests/captions/test_comfy_nodes.py", "tests/common/test_comfy_nodes.py", "tests/common/test_host.py",
         "tests/dit4sr/test_comfy_nodes.py", "tests/instancersr/test_comfy_nodes.py",
         "tests/instantir/test_comfy_nodes.py")
PROGRAM = """
import importlib.util
import sys
suite, comfyui, packages, *arguments = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.path.append(packages)  # pytest, where this ComfyUI has none of its own; all else is its own
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.model_management
spec = importlib.util.spec_from_file_location("fourfold", f"{suite}/__init__.py", submodule_search_locations=[suite])
sys.modules["fourfold"] = importlib.util.module_from_spec(spec)  # as the alias of pyproject.toml, installed or not
spec.loader.exec_module(sys.modules["fourfold"])
import pytest
raise SystemExit(pytest.main(arguments))
"""


def test_the_nodes_inside_comfyui(tmp_path):
    try:
        comfyui = find_comfyui()
        python = find_python(comfyui)
    except FileNotFoundError as error:
        pytest.skip(f"no ComfyUI to test with: {error}")
    packages = Path(_pytest.__file__).parents[1]
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", f"--basetemp={tmp_path / 'inside'}"]
    done = subprocess.run(
        [python, "-c", PROGRAM, SUITE, comfyui, packages, *options, *TESTS], cwd=SUITE, text=True, capture_output=True,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "HF_HUB_OFFLINE": "1"}, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
