"""The ComfyUI extension: which nodes there are.

Every part below has a `comfy_nodes.py` with a list `NODES`. A part that cannot be imported is logged and left out; the
others load without it.
"""

import importlib
import logging

from comfy_api.latest import ComfyExtension, io

from .common.host.files import register_folder

log = logging.getLogger("fourfold")

PARTS = ("common", "examples", "captions", "dit4sr", "instantir", "instancersr")


def load_nodes(parts: tuple[str, ...] = PARTS) -> list[type[io.ComfyNode]]:
    """The node classes of all parts that can be imported; why another cannot is logged with its traceback."""
    nodes: list[type[io.ComfyNode]] = []
    for part in parts:
        try:
            found = importlib.import_module(f".{part}.comfy_nodes", __package__).NODES
            for node in found:
                node.define_schema().validate()  # a schema that fails inside ComfyUI would take all nodes with it
        except Exception:
            log.exception("Fourfold's %r nodes could not be loaded; the other nodes were.", part)
        else:
            nodes += found
    return nodes


class FourfoldExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folder()
        return load_nodes()
