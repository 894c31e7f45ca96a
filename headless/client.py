"""A small client for ComfyUI's HTTP and websocket interface: queue a graph, follow it, fetch its pictures.

Graphs are in API form, `{node id: {"class_type": ..., "inputs": {...}}}`, as the editor exports them.
"""

import contextlib
import json
import struct
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import requests
import websocket

from .messages import (
    ComfyError,
    Interrupted,
    NodeFailed,
    NodeProblem,
    Output,
    Progress,
    PromptRejected,
    problems_of,
    raise_if_over,
)

__all__ = [
    "ComfyClient", "ComfyError", "Interrupted", "NodeFailed", "NodeProblem", "Output", "Progress", "PromptRejected"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PREVIEW_IMAGE = 1  # the binary message that carries a preview: >II (kind, image format), then the encoded image


class ComfyClient:
    """Talks to one ComfyUI.

    Args:
        address: base address, like http://127.0.0.1:8188 (host:port is enough).
        timeout: seconds for one HTTP answer (not for a run).
    """

    def __init__(self, address: str = "http://127.0.0.1:8188", timeout: float = 60.0) -> None:
        self.address = (address if "://" in address else f"http://{address}").rstrip("/")
        self.timeout = timeout
        self.client_id = uuid.uuid4().hex
        self._session = requests.Session()
        self._session.trust_env = urlsplit(self.address).hostname not in LOOPBACK  # no proxy to this machine itself

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """The definitions of all nodes, or of one (empty if ComfyUI does not know it)."""
        return self._json("GET", f"/object_info/{node}" if node else "/object_info")

    def upload_image(self, image: Path | str | bytes, name: str | None = None) -> str:
        """Puts a file into ComfyUI's input folder and returns the name for a LoadImage node.

        A file of the same name is kept: ComfyUI numbers the new one. `name` is needed for bytes.
        """
        if isinstance(image, bytes):
            if not name:
                raise ValueError("bytes have no name: pass name=, with the image's extension.")
            content = image
        else:
            name, content = name or Path(image).name, Path(image).read_bytes()
        answer = self._json("POST", "/upload/image", files={"image": (name, content)}, data={"type": "input"})
        return "/".join(filter(None, (answer.get("subfolder", ""), answer["name"])))

    def queue(self, prompt: Mapping[str, Any], extra_data: Mapping[str, Any] | None = None) -> str:
        """Queues a graph in API form and returns its prompt id.

        Raises: PromptRejected with every node's complaint; ComfyError for any other refusal.
        """
        body = {"prompt": prompt, "client_id": self.client_id, "extra_data": dict(extra_data or {})}
        answer = self._request("POST", "/prompt", json=body)
        report = self._decode(answer) if answer.content else {}
        problems = problems_of(report)
        if answer.status_code == 400 or problems:
            error = report.get("error") or {}
            text = error if isinstance(error, str) else ": ".join(filter(None, map(error.get, ("message", "details"))))
            if answer.ok:  # a branch of the graph is broken and the others are queued: all or nothing is clearer
                self.cancel(report["prompt_id"])
            raise PromptRejected(f"ComfyUI refused the graph: {text or 'a branch of it is not valid'}", problems)
        self._check(answer)
        return report["prompt_id"]

    def run(self, prompt: Mapping[str, Any], on_progress: Callable[[Progress], None] | None = None, *,
            extra_data: Mapping[str, Any] | None = None, timeout: float | None = None) -> list[Output]:
        """Queues a graph, follows it to its end and returns the files it made.

        `on_progress` may raise to cancel: the run is interrupted and the exception goes on to the caller.
        Raises: PromptRejected, NodeFailed, Interrupted, ComfyError; TimeoutError after `timeout` seconds (and cancels).
        """
        with contextlib.closing(self._listen()) as stream:
            prompt_id = self.queue(prompt, extra_data)
            try:
                self._follow(stream, prompt_id, on_progress, time.monotonic() + timeout if timeout else None)
            except (PromptRejected, NodeFailed, Interrupted):
                raise
            except BaseException:
                with contextlib.suppress(ComfyError):  # the first error is the one to tell
                    self.cancel(prompt_id)
                raise
        return self.outputs(prompt_id)

    def outputs(self, prompt_id: str) -> list[Output]:
        """The files that a finished run made, in the order of the nodes' ids as ComfyUI lists them."""
        record = self.history(prompt_id)
        if record is None:
            raise ComfyError(f"ComfyUI has no record of the run {prompt_id}: it has not finished, or was deleted.")
        return [
            Output(node_id, entry["filename"], entry.get("subfolder", ""), entry.get("type", "output"))
            for node_id, result in record["outputs"].items() for entries in result.values() if isinstance(entries, list)
            for entry in entries if isinstance(entry, dict) and "filename" in entry]

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """ComfyUI's record of a finished run, or None."""
        return self._json("GET", f"/history/{prompt_id}").get(prompt_id)

    def view(self, output: Output) -> bytes:
        """The content of a file that a run made."""
        where = {"filename": output.filename, "subfolder": output.subfolder, "type": output.kind}
        return self._check(self._request("GET", "/view", params=where)).content

    def interrupt(self) -> None:
        """Stops whatever runs at the moment."""
        self._check(self._request("POST", "/interrupt", json={}))

    def cancel(self, prompt_id: str) -> None:
        """Takes a run out of the queue, or interrupts it if it is the one that runs; else does nothing."""
        self._check(self._request("POST", "/queue", json={"delete": [prompt_id]}))
        self._check(self._request("POST", "/interrupt", json={"prompt_id": prompt_id}))

    def free(self) -> None:
        """Asks ComfyUI to unload its models and drop cached results once it is idle."""
        self._check(self._request("POST", "/free", json={"unload_models": True, "free_memory": True}))

    def _listen(self) -> "websocket.WebSocket":
        address = self.address.replace("http", "ws", 1) + "/ws?" + urlencode({"clientId": self.client_id})
        direct = {"http_no_proxy": list(LOOPBACK)}
        try:
            return websocket.create_connection(address, timeout=self.timeout, **direct)
        except (OSError, websocket.WebSocketException) as error:
            raise ComfyError(f"No ComfyUI answers at {self.address} ({error}). Is it running, and is this its address?"
                             ) from error

    def _follow(self, stream: "websocket.WebSocket", prompt_id: str, on_progress: Callable[[Progress], None] | None,
                deadline: float | None) -> None:
        stream.settimeout(1.0)
        report = on_progress or (lambda progress: None)
        node = ""
        while True:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"the run {prompt_id} did not finish in time (last at node {node or 'none'})")
            try:
                message = stream.recv()
            except websocket.WebSocketTimeoutException:
                if self._settled(prompt_id):
                    return
                continue
            except (OSError, websocket.WebSocketException) as error:
                raise ComfyError(f"ComfyUI at {self.address} hung up during the run ({error}); see its log.") from error
            if isinstance(message, bytes):
                if len(message) > 8 and struct.unpack(">I", message[:4])[0] == PREVIEW_IMAGE:
                    report(Progress(node, preview=message[8:]))
                continue
            kind, data = (event := json.loads(message))["type"], event.get("data") or {}
            if data.get("prompt_id") != prompt_id:
                continue
            if kind == "executing" and data.get("node") is None:
                return
            raise_if_over(kind, data)
            if kind in ("executing", "progress"):
                node = str(data["node"])
                report(Progress(node, float(data.get("value", 0)), float(data.get("max", 0))))

    def _settled(self, prompt_id: str) -> bool:
        """Whether a run that is silent on the websocket is over; raises what it ended with."""
        record = self.history(prompt_id)
        if record is None:
            waiting = self._json("GET", "/queue")
            if any(row[1] == prompt_id for rows in waiting.values() for row in rows):
                return False
            if (record := self.history(prompt_id)) is None:  # it may have finished between the two questions
                raise Interrupted()
        for kind, data in (record.get("status") or {}).get("messages", []):
            raise_if_over(kind, data)
        return True

    def _json(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        return self._decode(self._check(self._request(method, path, **arguments)))

    def _request(self, method: str, path: str, **arguments: Any) -> requests.Response:
        try:
            return self._session.request(method, self.address + path, timeout=self.timeout, **arguments)
        except requests.RequestException as error:
            raise ComfyError(f"No ComfyUI answers at {self.address} ({error}). Is it running, and is this its address?"
                             ) from error

    def _decode(self, answer: requests.Response) -> dict[str, Any]:
        try:
            return answer.json()
        except ValueError as error:
            raise ComfyError(f"{answer.url} answered {answer.status_code} with no JSON: is that a ComfyUI?") from error

    def _check(self, answer: requests.Response) -> requests.Response:
        if not answer.ok:
            raise ComfyError(f"ComfyUI answered {answer.status_code} to {answer.url}: {answer.text[:500]}")
        return answer
