"""Which ComfyUI there is, and which Python runs it."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

SUITE = Path(__file__).absolute().parent.parent  # absolute, not resolved: a link in custom_nodes shall find its ComfyUI
DEFAULT_COMFYUI = Path("~/comfy/ComfyUI")  # where comfy-cli installs


def _interpreter_of(comfyui: Path) -> Path | None:
    candidates = (comfyui / ".venv/bin/python", comfyui / ".venv/Scripts/python.exe")
    return next((path for path in candidates if path.is_file()), None)


def find_comfyui(suite: Path = SUITE, environment: Mapping[str, str] = os.environ) -> Path:
    """The ComfyUI to run: `COMFYUI_PATH`, else ~/comfy/ComfyUI, else the one whose custom_nodes holds the suite.

    Raises: FileNotFoundError if there is none, or if `COMFYUI_PATH` names a folder without ComfyUI's main.py.
    """
    named = environment.get("COMFYUI_PATH", "").strip()
    if named:
        path = Path(named).expanduser().absolute()
        if not (path / "main.py").is_file():
            raise FileNotFoundError(f"COMFYUI_PATH is {path}, but there is no main.py: name the folder of a ComfyUI.")
        return path
    candidates = [DEFAULT_COMFYUI.expanduser()]
    if suite.parent.name == "custom_nodes":
        candidates.append(suite.parent.parent)
    for path in candidates:
        if (path / "main.py").is_file() and (path / "folder_paths.py").is_file():
            return path
    looked = ", ".join(str(path) for path in candidates)
    raise FileNotFoundError(f"there is no ComfyUI in {looked}; to use one that lies elsewhere, set COMFYUI_PATH to "
                            "its folder.")


def find_python(comfyui: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """The interpreter that runs `comfyui`: `COMFYUI_PYTHON`, else its .venv, else the current interpreter.

    Raises: FileNotFoundError if `COMFYUI_PYTHON` names no file.
    """
    named = environment.get("COMFYUI_PYTHON", "").strip()
    if named:
        path = Path(shutil.which(named) or named).expanduser().absolute()
        if not path.is_file():
            raise FileNotFoundError(f"COMFYUI_PYTHON is {named}, but there is no such file: name a Python interpreter.")
        return path
    return _interpreter_of(comfyui) or Path(sys.executable)
