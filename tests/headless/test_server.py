"""Finding, starting and ending a ComfyUI, with stand-ins for the checkout (the real one is in tests/comfyui)."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from fourfold.headless.client import ComfyClient, ComfyError
from fourfold.headless.server import ComfyServer, ServerError, find_comfyui, find_python

ANSWERS = """
    import json, sys
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from pathlib import Path

    options = dict(zip(sys.argv[1:], sys.argv[2:]))
    links = [path.name for path in (Path(options["--base-directory"]) / "custom_nodes").iterdir()]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            modules = {"N": "nodes", **{name: "custom_nodes." + name for name in links}}
            body = json.dumps({name: {"python_module": module} for name, module in modules.items()}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    print("stand-in listens", flush=True)
    HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""


def checkout(folder: Path, program: str = "") -> Path:
    """A folder that looks like a ComfyUI and runs `program`."""
    (folder / "models/checkpoints").mkdir(parents=True)
    (folder / "folder_paths.py").touch()
    (folder / "main.py").write_text(textwrap.dedent(program))
    return folder


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "__init__.py").touch()
    return folder


def test_comfyui_is_found_by_name_then_at_home_then_around_the_suite(tmp_path, monkeypatch):
    named, around = checkout(tmp_path / "named"), checkout(tmp_path / "around")
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    suite = around / "custom_nodes/comfyui-fourfold"
    assert find_comfyui(suite, {"COMFYUI_PATH": str(named)}) == named
    assert find_comfyui(suite, {}) == around
    at_home = checkout(home / "comfy/ComfyUI")
    assert find_comfyui(suite, {}) == at_home


def test_missing_comfyui_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"comfy.ComfyUI.*COMFYUI_PATH"):
        find_comfyui(tmp_path / "suite", {})
    with pytest.raises(FileNotFoundError, match=r"nowhere.*main\.py"):
        find_comfyui(tmp_path / "suite", {"COMFYUI_PATH": str(tmp_path / "nowhere")})


def test_python_is_the_named_one_then_the_checkouts_then_the_current(tmp_path):
    comfyui = checkout(tmp_path / "comfyui")
    assert find_python(comfyui, {}) == Path(sys.executable)
    own = comfyui / ".venv/bin/python"
    own.parent.mkdir(parents=True)
    own.touch()
    assert find_python(comfyui, {}) == own
    assert find_python(comfyui, {"COMFYUI_PYTHON": sys.executable}) == Path(sys.executable)
    with pytest.raises(FileNotFoundError, match="COMFYUI_PYTHON"):
        find_python(comfyui, {"COMFYUI_PYTHON": str(tmp_path / "python9")})


def test_server_answers_and_leaves_neither_process_nor_folder(tmp_path, suite):
    comfyui = checkout(tmp_path / "comfyui", ANSWERS)
    before = sorted(comfyui.rglob("*"))
    with ComfyServer(comfyui, sys.executable, suite=suite, cpu=True, timeout=30) as server:
        assert set(ComfyClient(server.address).object_info()) == {"N", "comfyui-fourfold"}
        assert "stand-in listens" in server.log_tail()
        process, workspace = server.process, server.workspace
        assert process.poll() is None
    assert process.poll() is not None
    assert not workspace.exists()
    assert sorted(comfyui.rglob("*")) == before


def test_named_workspace_is_kept(tmp_path, suite):
    comfyui = checkout(tmp_path / "comfyui", ANSWERS)
    workspace = tmp_path / "kept"
    with ComfyServer(comfyui, sys.executable, suite=suite, workspace=workspace, cpu=True, timeout=30):
        pass
    assert (workspace / "comfyui.log").read_text().startswith("stand-in listens")
    other = tmp_path / "other"
    other.mkdir()
    with ComfyServer(comfyui, sys.executable, suite=other, workspace=workspace, cpu=True, timeout=30):
        assert (workspace / "custom_nodes/comfyui-fourfold").resolve() == other


def test_server_that_ends_early_quotes_its_log(tmp_path, suite):
    comfyui = checkout(tmp_path / "comfyui", 'raise ModuleNotFoundError("No module named torchsde")')
    with pytest.raises(ServerError, match=r"(?s)status 1 .*torchsde.*COMFYUI_PYTHON"), \
            ComfyServer(comfyui, sys.executable, suite=suite, cpu=True, timeout=30):
        pass


def test_server_that_never_answers_is_ended(tmp_path, suite):
    comfyui = checkout(tmp_path / "comfyui", 'import time\nprint("thinking", flush=True)\ntime.sleep(60)')
    server = ComfyServer(comfyui, sys.executable, suite=suite, cpu=True, timeout=1.5)
    with pytest.raises(ServerError, match=r"(?s)did not answer.*thinking"):
        server.start()
    server.stop()
    assert not server.alive()


def test_suite_that_fails_to_import_is_told(tmp_path, suite):
    program = ANSWERS.replace("stand-in listens", "0.0 seconds (IMPORT FAILED): /x/custom_nodes/comfyui-fourfold")
    comfyui = checkout(tmp_path / "comfyui", program)
    with pytest.raises(ServerError, match=r"(?s)could not import .*suite.*pip install"), \
            ComfyServer(comfyui, sys.executable, suite=suite, cpu=True, timeout=30):
        pass


def test_models_of_the_checkout_stay_visible(tmp_path, suite):
    comfyui = checkout(tmp_path / "comfyui", ANSWERS)
    workspace = tmp_path / "work"
    with ComfyServer(comfyui, sys.executable, suite=suite, workspace=workspace, cpu=True, timeout=30):
        text = (workspace / "models_of_checkout.yaml").read_text()
    assert str(comfyui / "models") in text and '"checkpoints": "checkpoints"' in text


def test_server_ends_with_the_process_that_started_it(tmp_path, suite):
    comfyui = checkout(tmp_path / "comfyui", ANSWERS)
    program = f"""
from fourfold.headless.server import ComfyServer
import os
server = ComfyServer({str(comfyui)!r}, {sys.executable!r}, suite={str(suite)!r},
                     workspace={str(tmp_path / "kept")!r}, cpu=True)
server.start()
print(server.address, flush=True)
os._exit(9)  # as if it had been killed: nothing is tidied up
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 9, done.stderr
    client = ComfyClient(done.stdout.strip(), timeout=5)
    deadline = time.monotonic() + 10
    with pytest.raises(ComfyError, match="No ComfyUI answers"):
        while time.monotonic() < deadline:
            client.object_info()
            time.sleep(0.1)


def test_without_a_gpu_comfyui_is_told_to_use_the_cpu(tmp_path, suite):
    comfyui = checkout(tmp_path / "comfyui", ANSWERS)
    server = ComfyServer(comfyui, sys.executable, suite=suite, workspace=tmp_path / "w", arguments=["--verbose"])
    found = torch.cuda.is_available() or torch.backends.mps.is_available()
    assert ("--cpu" in server._command()) == (not found)
    assert server._command()[-1] == "--verbose"
    server.cpu = True
    assert "--cpu" in server._command()
