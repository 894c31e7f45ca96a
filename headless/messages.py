"""What ComfyUI reports about a queued graph, as types: progress, files, problems found at queue time, failures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class ComfyError(RuntimeError):
    """ComfyUI could not be reached, or refused; the text says what it answered."""


@dataclass(frozen=True)
class NodeProblem:
    """What ComfyUI says about one node of a refused graph; `input` is empty where it concerns no single input."""

    node_id: str
    class_type: str
    input: str
    message: str

    def __str__(self) -> str:
        return f"node {self.node_id} ({self.class_type}){f', input {self.input}' if self.input else ''}: {self.message}"


class PromptRejected(ComfyError):
    """The graph did not pass validation at queue time; `problems` holds each node's complaint."""

    def __init__(self, message: str, problems: list[NodeProblem]) -> None:
        super().__init__("\n".join([message, *map(str, problems)]))
        self.problems = problems


class NodeFailed(ComfyError):
    """A node raised while the graph ran."""

    def __init__(self, node_id: str, class_type: str, message: str, kind: str = "", traceback: str = "") -> None:
        super().__init__(f"node {node_id} ({class_type}) failed: {message}")
        self.node_id, self.class_type, self.message, self.kind, self.traceback = (
            node_id, class_type, message, kind, traceback)


class Interrupted(ComfyError):
    """The run was cancelled; `node_id` is the node that ran then (empty if it still waited in the queue)."""

    def __init__(self, node_id: str = "", class_type: str = "") -> None:
        super().__init__(f"cancelled{f' at node {node_id} ({class_type})' if node_id else ''}")
        self.node_id, self.class_type = node_id, class_type


@dataclass(frozen=True)
class Progress:
    """One report of a running graph: `value` of `maximum` at `node_id`; `preview` is an encoded image, if one came."""

    node_id: str
    value: float = 0.0
    maximum: float = 0.0
    preview: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Output:
    """A file that a node of the graph left on the server; `kind` is ComfyUI's folder: output, temp or input."""

    node_id: str
    filename: str
    subfolder: str
    kind: str


def problems_of(report: Mapping[str, Any]) -> list[NodeProblem]:
    """The complaints in ComfyUI's answer to a queued graph, in its order."""
    return [
        NodeProblem(str(node_id), str(entry.get("class_type", "")),
                    str((error.get("extra_info") or {}).get("input_name", "")),
                    ": ".join(filter(None, (error.get("message", ""), error.get("details", "")))))
        for node_id, entry in (report.get("node_errors") or {}).items() for error in entry.get("errors", [])]


def raise_if_over(kind: str, data: Mapping[str, Any]) -> None:
    """Raises Interrupted or NodeFailed if the message `kind` says that the run ended so."""
    node, class_type = str(data.get("node_id", "")), str(data.get("node_type", ""))
    if kind == "execution_interrupted":
        raise Interrupted(node, class_type)
    if kind == "execution_error":
        trace = data.get("traceback") or ()
        raise NodeFailed(node, class_type, str(data.get("exception_message", "")).strip(),
                         str(data.get("exception_type", "")), trace if isinstance(trace, str) else "".join(trace))
