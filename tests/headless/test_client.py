"""The client against a stand-in for ComfyUI's HTTP interface: what it sends, and how answers become exceptions."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from fourfold.headless.client import ComfyClient, ComfyError, Interrupted, NodeFailed, Output, PromptRejected
from fourfold.headless.messages import raise_if_over

REFUSAL = {
    "error": {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation", "details": ""},
    "node_errors": {"4": {"class_type": "FourfoldDiT4SRLoader", "dependent_outputs": ["9"], "errors": [
        {"type": "custom_validation_failed", "message": "Custom validation failed", "details": "an SDXL checkpoint",
         "extra_info": {"input_name": "model_name"}}]}},
}


class StandIn(HTTPServer):
    """Answers every request from `answers` {"METHOD /path": (status, JSON or bytes)} and keeps what was asked."""

    def __init__(self):
        self.answers, self.asked = {}, []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((f"{self.command} {self.path}", body))
        status, content = self.server.answers.get(f"{self.command} {self.path}", (404, b"nothing here"))
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = answer

    def log_message(self, *arguments):
        """Keeps the test output clean."""


@pytest.fixture
def stand_in():
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def client(stand_in):
    return ComfyClient(f"127.0.0.1:{stand_in.server_port}", timeout=5)


def test_refused_graph_names_node_input_and_reason(stand_in, client):
    stand_in.answers["POST /prompt"] = (400, REFUSAL)
    with pytest.raises(PromptRejected, match="an SDXL checkpoint") as caught:
        client.queue({})
    (problem,) = caught.value.problems
    assert (problem.node_id, problem.class_type, problem.input) == ("4", "FourfoldDiT4SRLoader", "model_name")


def test_graph_with_one_broken_branch_is_taken_back(stand_in, client):
    stand_in.answers.update({
        "POST /prompt": (200, {"prompt_id": "p", "number": 1, "node_errors": REFUSAL["node_errors"]}),
        "POST /queue": (200, b""), "POST /interrupt": (200, b"")})
    with pytest.raises(PromptRejected, match="branch"):
        client.queue({})
    assert ("POST /queue", b'{"delete": ["p"]}') in stand_in.asked


def test_queue_sends_the_graph_as_it_is(stand_in, client):
    stand_in.answers["POST /prompt"] = (200, {"prompt_id": "p7", "number": 1, "node_errors": {}})
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}}}
    assert client.queue(graph, {"extra_pnginfo": {"workflow": {}}}) == "p7"
    sent = json.loads(stand_in.asked[-1][1])
    assert sent["prompt"] == graph and sent["client_id"] == client.client_id
    assert sent["extra_data"] == {"extra_pnginfo": {"workflow": {}}}


def test_upload_returns_the_name_that_comfyui_chose(stand_in, client):
    stand_in.answers["POST /upload/image"] = (200, {"name": "a (1).png", "subfolder": "in", "type": "input"})
    assert client.upload_image(b"\x89PNG", "a.png") == "in/a (1).png"
    assert b"\x89PNG" in stand_in.asked[-1][1]
    with pytest.raises(ValueError, match="name"):
        client.upload_image(b"\x89PNG")


def test_outputs_are_every_file_of_every_node(stand_in, client):
    image = {"filename": "a.png", "subfolder": "", "type": "output"}
    latent = {"filename": "b.latent", "subfolder": "s", "type": "temp"}
    stand_in.answers["GET /history/p"] = (200, {"p": {"outputs": {
        "9": {"images": [image], "animated": [False]}, "11": {"latents": [latent], "text": ["no file"]}}}})
    assert client.outputs("p") == [Output("9", "a.png", "", "output"), Output("11", "b.latent", "s", "temp")]
    stand_in.answers["GET /history/q"] = (200, {})
    with pytest.raises(ComfyError, match="no record"):
        client.outputs("q")


def test_view_asks_for_the_file_by_folder_and_name(stand_in, client):
    stand_in.answers["GET /view?filename=a+b.png&subfolder=s&type=temp"] = (200, b"bytes")
    assert client.view(Output("1", "a b.png", "s", "temp")) == b"bytes"


def test_other_answers_are_quoted(stand_in, client):
    stand_in.answers["POST /prompt"] = (500, b"{}")
    with pytest.raises(ComfyError, match="500"):
        client.queue({})
    stand_in.answers["GET /object_info"] = (200, b"<html>")
    with pytest.raises(ComfyError, match="no JSON"):
        client.object_info()


def test_nobody_there_says_so():
    client = ComfyClient("127.0.0.1:9", timeout=2)
    with pytest.raises(ComfyError, match=r"No ComfyUI answers at http://127\.0\.0\.1:9"):
        client.object_info()
    with pytest.raises(ComfyError, match=r"No ComfyUI answers at http://127\.0\.0\.1:9"):
        client.run({})


def test_messages_become_exceptions():
    with pytest.raises(Interrupted, match="node 5"):
        raise_if_over("execution_interrupted", {"node_id": "5", "node_type": "KSampler"})
    failure = {"node_id": "5", "node_type": "Sampler", "exception_message": "NaN in step 3\n",
               "exception_type": "NonFiniteLatentError", "traceback": ["a\n", "b"]}
    with pytest.raises(NodeFailed, match=r"node 5 \(Sampler\) failed: NaN in step 3$") as caught:
        raise_if_over("execution_error", failure)
    assert caught.value.kind == "NonFiniteLatentError" and caught.value.traceback == "a\nb"
    raise_if_over("executing", {"node": "5"})
