"""What an old ComfyUI is told: one sentence, whether or not it knows how to call our entrypoint."""

import asyncio
import subprocess
import sys
import types

import fourfold
import pytest
from fourfold.nodes.common.host.version import complaint


@pytest.fixture
def version(request, monkeypatch) -> str:
    """The version of the ComfyUI that seems to run."""
    monkeypatch.setitem(sys.modules, "folder_paths", types.ModuleType("folder_paths"))
    monkeypatch.setitem(sys.modules, "comfyui_version", types.SimpleNamespace(__version__=request.param))
    return request.param


@pytest.mark.parametrize("version", ["0.3.64", "0.8.0", "1.0", "0.0.0"], indirect=True)  # 0.0.0: it does not tell
def test_a_recent_comfyui_will_do(version):
    assert complaint() is None


@pytest.mark.parametrize("version", ["0.3.63", "0.2.9", ""], indirect=True)
def test_an_old_comfyui_is_told_so_in_one_sentence(version):
    assert complaint().startswith("Fourfold needs ComfyUI 0.3.64 or newer") and "\n" not in complaint()
    with pytest.raises(RuntimeError, match=r"needs ComfyUI 0\.3\.64"):
        asyncio.run(fourfold.comfy_entrypoint())


def test_without_comfyui_nothing_is_complained_about(monkeypatch):
    monkeypatch.delitem(sys.modules, "folder_paths", raising=False)
    assert complaint() is None


@pytest.mark.parametrize(("knows_entrypoints", "sentences"), [(False, 1), (True, 0)])
def test_a_comfyui_that_never_calls_the_entrypoint_is_told_on_import(knows_entrypoints, sentences):
    program = f"""
import sys, types
sys.modules["folder_paths"] = types.ModuleType("folder_paths")
sys.modules["comfyui_version"] = types.SimpleNamespace(__version__="0.2.7")
if {knows_entrypoints}:
    sys.modules["comfy_api.latest"] = types.ModuleType("comfy_api.latest")
import fourfold
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", check=True)
    assert done.stderr.count("Fourfold needs ComfyUI 0.3.64 or newer, and this is 0.2.7: update ComfyUI.") == sentences
    assert "Traceback" not in done.stderr
