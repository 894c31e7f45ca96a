"""ComfyUI loads the suite from folders with dashes, dots and spaces in their names, whatever module it names."""

import shutil

import pytest
import requests
from fourfold.headless.server import SUITE

NAMES = ("comfyui-fourfold", "Comfy UI.fourfold", "fourfold-main.v0.1 (1)")


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    """A server that has the suite under every name: a link for the first, copies for the others."""
    workspace = tmp_path_factory.mktemp("names")
    (workspace / "custom_nodes").mkdir()
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests", "runs", "out", "benchmarks", "*.egg-info")
    for name in NAMES[1:]:
        shutil.copytree(SUITE, workspace / "custom_nodes" / name, ignore=ignored)
    server = start_server(workspace=workspace, link_name=NAMES[0])
    yield server
    server.stop()


def test_every_name_is_imported(server):
    log = server.log_text()
    assert "IMPORT FAILED" not in log
    for name in NAMES:
        assert f"custom_nodes/{name}" in log.replace("\\", "/")


def test_no_part_is_left_out(server):
    log = server.log_text()
    assert "could not be loaded" not in log


def test_workflows_are_served_under_every_name(server):
    templates = requests.get(f"{server.address}/workflow_templates", timeout=30).json()
    for name in NAMES:
        assert set(templates[name]) == {path.stem for path in (SUITE / "workflows").glob("*.json")}
