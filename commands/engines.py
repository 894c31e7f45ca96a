"""Where a demo picture is made: in a ComfyUI server over HTTP, as users will run it, or in this process."""

import argparse
import copy
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..headless.client import ComfyClient, ComfyError
from ..headless.server import ComfyServer
from ..nodes.common.image_files import checked, from_pillow, to_pillow

if TYPE_CHECKING:
    from torch import Tensor

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows" / "api"
PICTURES = ("LoadImage", "FourfoldExamplePhoto")  # nodes that bring the picture into a workflow


class InProcess:
    """Calls the method's Python function. Loads the weights when it is made."""

    def __init__(self, method: str, options: argparse.Namespace):
        from .methods import Method

        self._method = Method(method, options)

    def __call__(self, lr: "Tensor", seed: int) -> "Tensor":
        return self._method(lr, seed)

    def peak_memory(self) -> int:
        return peak_memory(os.getpid())


class InComfyUI:
    """Queues the method's tiny workflow on a running server; the server loads the weights with the first picture."""

    def __init__(self, method: str, server: ComfyServer):
        self._server, self._client = server, ComfyClient(server.address)
        self._graph = json.loads(tiny_workflow(method).read_text(encoding="utf-8"))

    def __call__(self, lr: "Tensor", seed: int) -> "Tensor":
        """Restores (1, C, h, w) in 0..1. Raises: ComfyError if the server fails or makes no picture."""
        file = io.BytesIO()
        to_pillow(checked(lr)[0]).save(file, "PNG")
        outputs = self._client.run(filled(self._graph, self._client.upload_image(file.getvalue(), "demo.png"), seed))
        pictures = [output for output in outputs if output.kind == "output"]
        if not pictures:
            raise ComfyError(f"the workflow made no picture; see the server's log:\n{self._server.log_tail()}")
        with Image.open(io.BytesIO(self._client.view(pictures[0]))) as picture:
            return from_pillow(picture.convert("RGB"))

    def peak_memory(self) -> int:
        return peak_memory(self._server.process.pid)


def tiny_workflow(method: str) -> Path:
    """The method's tiny workflow in API form. Raises: FileNotFoundError if the suite has none."""
    path = WORKFLOWS / f"{method}_tiny.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no workflow {path.name} in workflows/api to run in ComfyUI.")
    return path


def filled(graph: dict[str, Any], image: str, seed: int) -> dict[str, Any]:
    """A copy of a graph in API form with another picture, from ComfyUI's input folder, and another seed."""
    graph = copy.deepcopy(graph)
    for node in graph.values():
        if node["class_type"] in PICTURES:
            node["class_type"], node["inputs"] = "LoadImage", {"image": image}
        if isinstance(node["inputs"].get("seed"), int):
            node["inputs"]["seed"] = seed
    return graph


def peak_memory(process_id: int) -> int:
    """The most memory that a process has held at once, in bytes; where the system keeps no record, what it holds."""
    status = Path(f"/proc/{process_id}/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import psutil

    memory = psutil.Process(process_id).memory_info()
    return getattr(memory, "peak_wset", memory.rss)
