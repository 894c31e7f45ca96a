"""A real ComfyUI with this suite linked in: one server a session, and what the tests ask of graphs and pictures."""

import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fourfold.headless.client import ComfyClient
from fourfold.headless.server import SUITE, ComfyServer, find_comfyui, find_python
from fourfold.nodes.common import tiny
from PIL import Image

ARGUMENTS = ("--disable-api-nodes", "--preview-method", "latent2rgb")  # no node that talks to the internet
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
PICTURES = ("LoadImage", "FourfoldExamplePhoto")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.comfyui)


@pytest.fixture(scope="session")
def start_server(tmp_path_factory):
    """Starts servers: `start_server(**options of ComfyServer)`; every one is ended with the session at the latest."""
    try:
        comfyui = find_comfyui()
        python = find_python(comfyui)
    except FileNotFoundError as error:
        pytest.skip(f"no ComfyUI to test with: {error}")
    started = []

    def start(**options) -> ComfyServer:
        options = {"workspace": tmp_path_factory.mktemp("comfyui"), "cpu": True, "arguments": ARGUMENTS,
                   "environment": ENVIRONMENT, "timeout": 900, **options}
        server = ComfyServer(comfyui, python, **options)
        started.append(server)
        return server.__enter__()

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server(start_server) -> ComfyServer:
    return start_server()


@pytest.fixture(scope="session")
def client(server) -> ComfyClient:
    return ComfyClient(server.address)


@pytest.fixture(scope="session")
def object_info(client) -> dict:
    return client.object_info()


class Graph(dict):
    """A graph in API form that can be asked for its nodes by class."""

    def ids(self, *class_types: str) -> list[str]:
        return [node_id for node_id, node in self.items() if node["class_type"] in class_types]

    def id(self, *class_types: str) -> str:
        (node_id,) = self.ids(*class_types)
        return node_id

    def inputs(self, *class_types: str) -> dict:
        return self[self.id(*class_types)]["inputs"]

    def with_picture(self, name: str) -> "Graph":
        """A copy whose picture is `name` in ComfyUI's input folder."""
        graph = copy.deepcopy(self)
        graph[graph.id(*PICTURES)] = {"class_type": "LoadImage", "inputs": {"image": name}}
        return graph


@pytest.fixture(scope="session")
def api_graph():
    """`api_graph(name)`: a shipped workflow in API form."""
    return lambda name: Graph(json.loads((SUITE / "workflows/api" / f"{name}.json").read_text(encoding="utf-8")))


def shipped(folder: str = "workflows") -> list[str]:
    """Names of the workflows that the suite ships in `folder`."""
    return sorted(path.stem for path in (SUITE / folder).glob("*.json"))


def pytest_generate_tests(metafunc):
    if "workflow" in metafunc.fixturenames:
        metafunc.parametrize("workflow", shipped())
    if "tiny_workflow" in metafunc.fixturenames:
        names = [name for name in shipped("workflows/api") if name.endswith("_tiny")]
        there = tiny.available_methods()
        missing = pytest.mark.skip(reason="its checkpoint is not in the suite")
        metafunc.parametrize("tiny_workflow", [
            pytest.param(name, marks=[] if name.removesuffix("_tiny") in there else missing) for name in names])


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture with edges, gradients and texture, uint8 (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
    disc = ((x - 0.4) ** 2 + (y - 0.35) ** 2 < 0.05)[..., None] * np.array([120, -40, -60])
    stripes = (np.sin(40 * x + 12 * y) > 0.5)[..., None] * np.array([25, 45, 15])
    sky = np.stack([90 + 60 * y, 120 + 50 * y, 170 - 40 * y], axis=-1)
    return np.clip(sky + disc + stripes + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def make_png():
    """`make_png(height, width)` -> (PNG bytes, the same picture as float (1, 3, H, W))."""

    def make(height: int, width: int, seed: int = 0) -> tuple[bytes, torch.Tensor]:
        pixels = photograph(height, width, seed)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue(), torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255

    return make


@pytest.fixture(scope="session")
def fetch(client):
    """`fetch(outputs, node id)`: the one picture that this node saved, float (1, C, H, W)."""

    def get(outputs, node_id: str) -> torch.Tensor:
        (output,) = (output for output in outputs if output.node_id == node_id)
        with Image.open(io.BytesIO(client.view(output))) as image:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255

    return get
