"""The shipped workflows: editor file, API file and thumbnail of each are one and the same graph."""

import json
import re

import pytest
from fourfold.headless.graphs import GraphError, to_api, widget_slots
from fourfold.headless.server import SUITE
from PIL import Image

WORKFLOWS = SUITE / "workflows"


def editor_file(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def test_every_workflow_has_its_three_files():
    names = {path.stem for path in WORKFLOWS.glob("*.json")}
    assert {"dit4sr_tiny", "dit4sr_full"} <= names
    assert names == {path.stem for path in (WORKFLOWS / "api").glob("*.json")}
    assert names == {path.stem for path in WORKFLOWS.glob("*.jpg")}


def test_workflows_is_the_only_folder_that_comfyui_serves_templates_from():
    """ComfyUI serves all of these under one address, where the first that exists hides the others."""
    taken = ("example_workflows", "example", "examples", "workflow", "workflows")
    assert [name for name in taken if (SUITE / name).exists()] == ["workflows"]


def test_thumbnail_is_a_small_picture(workflow):
    path = WORKFLOWS / f"{workflow}.jpg"
    with Image.open(path) as image:
        assert image.format == "JPEG" and min(image.size) >= 256 and max(image.size) <= 1024
    assert path.stat().st_size < 200_000


def test_api_file_is_the_editors_graph(workflow, object_info, api_graph):
    assert to_api(editor_file(workflow), object_info) == api_graph(workflow)


def test_links_join_what_they_say(workflow):
    graph = editor_file(workflow)
    nodes = {node["id"]: node for node in graph["nodes"]}
    for link, source, output, target, slot, kind in graph["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link
        assert {kind} & {nodes[source]["outputs"][output]["type"], nodes[target]["inputs"][slot]["type"]}
    known = {link[0] for link in graph["links"]}
    assert all(socket.get("link") in known | {None} for node in nodes.values() for socket in node.get("inputs", []))
    assert graph["last_node_id"] >= max(nodes) and graph["last_link_id"] >= max(known)


def test_sockets_are_those_of_the_nodes(workflow, object_info):
    for node in editor_file(workflow)["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        definition = object_info[node["type"]]
        names = {name for group in definition["input"].values() for name in group}
        sockets = {socket["name"] for socket in node["inputs"] if not socket.get("widget")}
        assert sockets <= names, node["type"]
        assert [output["type"] for output in node["outputs"]] == definition["output"], node["type"]
        required = {name for name in definition["input"].get("required", {}) if name not in widget_slots(definition)}
        linked = {socket["name"] for socket in node["inputs"] if socket.get("link") is not None}
        assert required <= linked, node["type"]


def test_loaders_of_full_workflows_say_where_their_files_are_from(workflow, api_graph):
    if workflow.endswith("_tiny"):
        pytest.skip("tiny workflows need no file")
    named = {}
    for node in editor_file(workflow)["nodes"]:
        for model in node.get("properties", {}).get("models", []):
            assert re.match(r"https://huggingface\.co/.+\.(safetensors|pt|bin)(\?download=true)?$", model["url"])
            assert model["directory"] and "/" not in model["directory"]
            named[model["name"]] = node["id"]
    files = {value for node in api_graph(workflow).values() for value in node["inputs"].values()
             if isinstance(value, str) and value.endswith((".safetensors", ".pt", ".bin"))}
    assert files and files == set(named)


def test_nodes_do_not_overlap_and_lie_in_one_group_each(workflow):
    graph = editor_file(workflow)
    boxes = [(node["id"], *node["pos"], *node["size"]) for node in graph["nodes"]]
    for i, (first, x, y, w, h) in enumerate(boxes):
        for second, x2, y2, w2, h2 in boxes[i + 1:]:
            apart = x + w <= x2 or x2 + w2 <= x or y + h + 30 <= y2 or y2 + h2 + 30 <= y  # 30: the title above a node
            assert apart, f"nodes {first} and {second} overlap"
        inside = [gx <= x and gy <= y - 30 and x + w <= gx + gw and y + h <= gy + gh
                  for gx, gy, gw, gh in (group["bounding"] for group in graph["groups"])]
        grouped = 0 if graph["nodes"][i]["type"] == "MarkdownNote" else 1
        assert sum(inside) == grouped, f"node {first} lies in {sum(inside)} groups"


def test_conversion_follows_reroutes_and_bypassed_nodes_and_drops_muted_ones(object_info):
    def node(node_id, kind, mode=0, inputs=(), outputs=(), values=()):
        return {"id": node_id, "type": kind, "mode": mode, "widgets_values": list(values),
                "inputs": [{"name": name, "type": "IMAGE", "link": link} for name, link in inputs],
                "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": list(outputs)}]}

    workflow = {
        "nodes": [
            node(1, "LoadImage", outputs=[1], values=["a.png", "image"]),
            node(2, "ImageInvert", mode=4, inputs=[("image", 1)], outputs=[2]),
            node(3, "Reroute", inputs=[("", 2)], outputs=[3, 4]),
            node(4, "SaveImage", inputs=[("images", 3)], values=["kept"]),
            node(5, "SaveImage", mode=2, inputs=[("images", 4)], values=["muted"]),
            node(6, "MarkdownNote", values=["text"]),
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"],
                  [3, 3, 0, 4, 0, "IMAGE"], [4, 3, 0, 5, 0, "IMAGE"]],
    }
    graph = to_api(workflow, object_info)
    assert set(graph) == {"1", "4"}
    assert graph["4"]["inputs"] == {"filename_prefix": "kept", "images": ["1", 0]}
    assert graph["1"]["inputs"] == {"image": "a.png"}


def test_seed_control_is_no_input(object_info):
    assert widget_slots(object_info["KSampler"])[:3] == ["seed", None, "steps"]


def test_conversion_says_what_it_cannot_do(object_info):
    with pytest.raises(GraphError, match="node 3: ComfyUI knows no node Nonsense"):
        to_api({"nodes": [{"id": 3, "type": "Nonsense"}], "links": []}, object_info)
    sampler = {"id": 5, "type": "KSampler", "widgets_values": [1, "fixed"], "inputs": []}
    with pytest.raises(GraphError, match=r"node 5.*2 widget values"):
        to_api({"nodes": [sampler], "links": []}, object_info)
