#!/usr/bin/env python3
"""From a fresh clone to a running program, with nothing but Python 3.10 or newer and a network.

    python3 scripts/run.py demo     sets everything up in .venv and enlarges the bundled photographs (fourfold demo)
    python3 scripts/run.py test     sets everything up in .venv and runs the linter and the tests

What follows is handed on: `demo --out pictures`, `test -k tiling`. Uses only the standard library.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
EXTRAS = {"demo": "metrics", "test": "dev"}


def python() -> Path:
    """The interpreter of the environment."""
    return ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def torch_index() -> list[str]:
    """pip's arguments for builds of torch that fit this machine.

    On Linux, PyPI has torch with CUDA, several gigabytes. Without an NVIDIA GPU the CPU builds do the same in 200 MB;
    they come from PyTorch's own index, where that can be reached. On other systems PyPI's builds are the right ones.
    """
    if platform.system() != "Linux" or shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists():
        return []
    try:
        with urllib.request.urlopen(f"{CPU_BUILDS}/torch/", timeout=10):
            return ["--extra-index-url", CPU_BUILDS]
    except OSError as error:
        say(f"no CPU builds of torch from {CPU_BUILDS} ({error}): taking PyPI's, several gigabytes with CUDA")
        return []


def set_up(extra: str) -> None:
    """Makes the environment; installs the suite unless that was done before for the same pyproject.toml."""
    mark = ENVIRONMENT / f"fourfold-{extra}.sha256"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if python().exists() and mark.exists() and mark.read_text() == wanted:
        return
    if not python().exists():
        say(f"making {ENVIRONMENT}")
        venv.create(ENVIRONMENT, with_pip=True)
    say(f"installing the suite with its extra '{extra}'; the first time this takes some minutes")
    code = run("-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", *torch_index(),
               "--editable", f"{ROOT}[{extra}]")
    if code:
        sys.exit(code)
    mark.write_text(wanted)


def say(text: str) -> None:
    print(f"[{Path(__file__).name}] {text}", flush=True)


def run(*command, folder: Path | None = ROOT) -> int:
    """Runs the environment's Python in a folder (None: where the user is); returns the exit code."""
    return subprocess.run([str(part) for part in (python(), *command)], cwd=folder, check=False).returncode


def main(arguments: list[str]) -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 (it is this check that tells the user)
        sys.exit(f"Fourfold needs Python 3.10 or newer; this is {platform.python_version()}.")
    if not arguments or arguments[0] not in EXTRAS:
        sys.exit(__doc__)
    task, rest = arguments[0], arguments[1:]
    set_up(EXTRAS[task])
    if task == "demo":
        code = run("-m", "fourfold.cli", "demo", *rest, folder=None)
        if code == 0:
            say(f"your own photographs: {python().with_name('fourfold')} restore photo.jpg")
        sys.exit(code)
    lint = run("-m", "ruff", "check", ".")
    sys.exit(run("-m", "pytest", "-q", *(rest or ["-m", "not slow"])) or lint)


if __name__ == "__main__":
    main(sys.argv[1:])
