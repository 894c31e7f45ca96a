"""A ComfyUI server process of one's own, with this suite linked in as its custom node.

The user's ComfyUI is only read: models, input, output, temp, user and custom_nodes folders lie in a workspace of the
server's own; the models of the checkout (and those its `extra_model_paths.yaml` names) stay visible.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import requests

from .checkout import SUITE, find_comfyui, find_python

__all__ = ["SUITE", "ComfyServer", "ServerError", "find_comfyui", "find_python", "free_port"]

log = logging.getLogger(__name__)

LINK_NAME = "comfyui-fourfold"
NOT_COPIED = ("[.]*", "__pycache__", "*.egg-info", "runs", "out", "cache", "venv")  # where links are not allowed


# Runs main.py and ends with the process that holds the other end of its stdin, however that one ends. ComfyUI's folder
# is the working directory, which `python -c` searches for modules first, as it does the folder of a program.
LAUNCHER = """
import os, runpy, sys, threading
def watch():
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class ServerError(RuntimeError):
    """ComfyUI was not found, did not start, or could not import the suite; the text says what to do."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError as error:  # Windows without the right to make links
        log.info("cannot link %s to %s (%s): copying it", target, source, error)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*NOT_COPIED))


class ComfyServer:
    """A headless ComfyUI as a context manager.

    Args:
        comfyui: checkout to run; None: see `find_comfyui`.
        python: its interpreter; None: see `find_python`.
        suite: folder that is linked in as custom node; None: no custom node at all.
        link_name: the folder name that ComfyUI sees for the suite.
        workspace: base directory (made if needed, kept afterwards); None: a temporary one, removed on exit.
        cpu: run without a GPU; None: only where torch finds none.
        arguments: more arguments of ComfyUI's main.py.
        environment: variables set on top of the current environment.
        timeout: seconds that ComfyUI may take to answer.

    Raises (on entering): ServerError with the log's tail; FileNotFoundError where there is no ComfyUI.

        with ComfyServer() as server:
            ComfyClient(server.address).run(prompt)
    """

    def __init__(self, comfyui: Path | str | None = None, python: Path | str | None = None, *,
                 suite: Path | str | None = SUITE, link_name: str = LINK_NAME, workspace: Path | str | None = None,
                 cpu: bool | None = None, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None,
                 timeout: float = 300.0) -> None:
        self.comfyui = Path(comfyui).expanduser().absolute() if comfyui else find_comfyui()
        self.python = Path(python).expanduser().absolute() if python else find_python(self.comfyui)
        self.suite = Path(suite).absolute() if suite else None
        self.link_name, self.cpu, self.timeout = link_name, cpu, timeout
        self.arguments, self.environment = list(arguments), dict(environment or {})
        self._temporary = workspace is None
        self.workspace = Path(tempfile.mkdtemp(prefix="fourfold-comfyui-") if self._temporary else workspace).absolute()
        self.port = 0
        self.process: subprocess.Popen | None = None

    @property
    def address(self) -> str:
        """Base address, like http://127.0.0.1:8188."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_file(self) -> Path:
        """What the server process writes; gone after exit if the workspace is temporary."""
        return self.workspace / "comfyui.log"

    def log_text(self) -> str:
        """Everything that the server has logged so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the log."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def alive(self) -> bool:
        """Whether the server process runs."""
        return self.process is not None and self.process.poll() is None

    def __enter__(self) -> "ComfyServer":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the process and waits until it answers; see the class for errors."""
        if self.alive():
            raise ServerError(f"This ComfyUI runs already, at {self.address}.")
        self._lay_out()
        self.port = free_port()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **self.environment}
        with self.log_file.open("wb") as sink:
            self.process = subprocess.Popen(
                self._command(), cwd=self.comfyui, env=environment, stdin=subprocess.PIPE, stdout=sink,
                stderr=subprocess.STDOUT, start_new_session=os.name == "posix")
        self._wait()
        if self.suite and self._import_failed():
            raise ServerError(f"ComfyUI at {self.comfyui} could not import {self.suite}. The end of its log:\n"
                              f"{self.log_tail()}\nIf a module is missing, install the suite's dependencies: "
                              f"{self.python} -m pip install -e {self.suite}")

    def stop(self, patience: float = 10.0) -> None:
        """Ends the process (asked first, killed after `patience` seconds) and removes a temporary workspace."""
        if self.process is not None and self.process.poll() is None:
            self._signal(signal.SIGTERM)
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                log.warning("ComfyUI (process %d) did not end within %.0f s: killing it", self.process.pid, patience)
                self._signal(getattr(signal, "SIGKILL", signal.SIGTERM))
                self.process.wait()
        if self.process is not None:
            self.process.stdin.close()
        if self._temporary:
            shutil.rmtree(self.workspace, ignore_errors=True)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may end between the look and the signal
            if os.name == "posix":
                os.killpg(self.process.pid, number)
            else:
                self.process.terminate()

    def _lay_out(self) -> None:
        if not (self.comfyui / "main.py").is_file():
            raise FileNotFoundError(f"{self.comfyui} holds no ComfyUI (no main.py).")
        for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
            (self.workspace / name).mkdir(parents=True, exist_ok=True)
        link = self.workspace / "custom_nodes" / self.link_name
        if link.is_symlink():  # a workspace that was used before, perhaps with another suite
            link.unlink()
        if self.suite and not link.exists():
            _link(self.suite, link)
        # The checkout's model folders, under the names that ComfyUI knows them by; JSON is YAML.
        models = self.comfyui / "models"
        folders = {path.name: path.name for path in sorted(models.glob("*/"))}
        paths = {"comfyui": {"base_path": str(models), **folders}} if folders else {}
        self._models_file.write_text(json.dumps(paths, indent=1), encoding="utf-8")

    @property
    def _models_file(self) -> Path:
        return self.workspace / "models_of_checkout.yaml"

    def _command(self) -> list[str]:
        command = [str(self.python), "-c", LAUNCHER, str(self.comfyui / "main.py"), "--disable-auto-launch",
                   "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(self.workspace),
                   "--extra-model-paths-config", str(self._models_file), "--database-url", "sqlite:///:memory:"]
        if self.cpu or (self.cpu is None and not self._has_accelerator()):
            command.append("--cpu")
        return command + self.arguments

    def _has_accelerator(self) -> bool:
        question = ("import torch; raise SystemExit(0 if torch.cuda.is_available() or torch.backends.mps.is_available()"
                    " or (hasattr(torch, 'xpu') and torch.xpu.is_available()) else 3)")
        return subprocess.run([str(self.python), "-c", question], capture_output=True, check=False).returncode == 0

    def _wait(self) -> None:
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI at {self.comfyui}, run by {self.python}, ended with status "
                                  f"{self.process.returncode} before it answered. The end of its log:\n"
                                  f"{self.log_tail()}\n"
                                  "If a module is missing, set COMFYUI_PYTHON to the interpreter of that ComfyUI.")
            try:
                if self._get("/object_info").ok:
                    return
            except requests.RequestException:
                time.sleep(0.3)
        raise ServerError(f"ComfyUI at {self.comfyui} did not answer at {self.address} within {self.timeout:.0f} s. "
                          f"The end of its log:\n{self.log_tail()}")

    def _import_failed(self) -> bool:
        lines = (line.rstrip() for line in self.log_text().splitlines())
        return any("(IMPORT FAILED)" in line and line.endswith(self.link_name) for line in lines)

    def _get(self, path: str) -> requests.Response:
        with requests.Session() as session:
            session.trust_env = False  # no proxy between this process and its own server
            return session.get(self.address + path, timeout=30)
