"""Fourfold: photograph restoration and super-resolution as ComfyUI nodes, and as `fourfold.restore` in Python.

ComfyUI imports this file and calls `comfy_entrypoint`; nothing here needs ComfyUI, torch or a GPU to be imported.
"""

import logging

from .nodes.common.host.version import KNOWS_ENTRYPOINTS, complaint

WEB_DIRECTORY = "./web"
log = logging.getLogger("fourfold")

if complaint() and not KNOWS_ENTRYPOINTS:  # such a ComfyUI never calls comfy_entrypoint: say it here
    log.error(complaint())


async def comfy_entrypoint():
    """The extension that ComfyUI (0.3.64 and newer) asks for its nodes.

    Raises: RuntimeError, one plain sentence, on an older ComfyUI. Any other failure is logged with its traceback, since
        ComfyUI itself prints only the last line of it.
    """
    if reason := complaint():
        raise RuntimeError(reason)
    try:
        from .nodes.registry import FourfoldExtension

        return FourfoldExtension()
    except Exception:
        log.exception("Fourfold could not be loaded.")
        raise


def __getattr__(name: str):
    """`fourfold.restore`, imported when it is first asked for (PEP 562)."""
    if name == "restore":
        from .nodes.restoration import restore

        return restore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
