"""From the editor's workflow files to graphs in API form, as the editor itself exports them.

What the editor knows from its widgets is read from ComfyUI's `/object_info` here: which inputs are widgets, and in what
order their values lie in `widgets_values`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SEED_NAMES = ("seed", "noise_seed")  # the editor gives these a "control after generate" even where no node asks for one
DRAWN_ONLY = ("Note", "MarkdownNote")
MUTED, BYPASSED = 2, 4  # LiteGraph's node modes

Definition = Mapping[str, Any]  # one node of /object_info
Node = Mapping[str, Any]  # one node of a workflow file


class GraphError(ValueError):
    """A workflow file cannot be turned into a graph in API form; the text says which node, and what to do."""


def is_widget(spec: list[Any]) -> bool:
    """Whether an input of `/object_info`, `[type, options]`, is drawn as a widget (else it is a socket only)."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput", False)


def inputs_of(definition: Definition) -> Iterator[tuple[str, list[Any]]]:
    """The inputs of a node in the order in which the editor draws them: required first, then optional."""
    for group in ("required", "optional"):
        specs = definition["input"].get(group) or {}
        for name in definition.get("input_order", {}).get(group) or specs:
            yield name, specs[name]


def widget_slots(definition: Definition) -> list[str | None]:
    """The input that each entry of `widgets_values` sets; None for the editor's own (seed control, upload button)."""
    slots: list[str | None] = []
    for name, spec in inputs_of(definition):
        if not is_widget(spec):
            continue
        options = spec[1] if len(spec) > 1 else {}
        slots.append(name)
        seeded = options.get("control_after_generate", spec[0] == "INT" and name in SEED_NAMES)
        uploads = any(options.get(key) for key in ("image_upload", "video_upload", "audio_upload"))
        slots += [None] * (bool(seeded) + bool(uploads))
    return slots


def to_api(workflow: Mapping[str, Any], object_info: Mapping[str, Definition]) -> dict[str, Any]:
    """The API form of an editor workflow.

    Args:
        workflow: the content of a workflow file (format 0.4), without subgraphs and primitive nodes.
        object_info: ComfyUI's answer to `/object_info`.
    Returns: `{node id: {"class_type", "inputs", "_meta": {"title"}}}`; muted nodes and notes are left out, bypassed
        nodes hand through the first input of the same type.
    Raises: GraphError for an unknown node, a subgraph, or values that do not fit the node's widgets.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    graph = {}
    for node in sorted(nodes.values(), key=lambda node: node["id"]):
        if node["type"] in (*DRAWN_ONLY, "Reroute") or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        definition = _definition(node, object_info)
        inputs = _widget_values(node, definition)
        for socket in node.get("inputs", []):
            source = _source(socket.get("link"), nodes, links)
            if source is not None:
                inputs[socket["name"]] = source
        title = node.get("title") or definition.get("display_name") or node["type"]
        graph[str(node["id"])] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}
    return graph


def _definition(node: Node, object_info: Mapping[str, Definition]) -> Definition:
    definition = object_info.get(node["type"])
    if definition is None:
        raise GraphError(f"node {node['id']}: ComfyUI knows no node {node['type']}. If it is a subgraph or primitive, "
                         "export the graph in API form in the editor; else install the suite that it comes from.")
    return definition


def _widget_values(node: Node, definition: Definition) -> dict[str, Any]:
    values = node.get("widgets_values") or []
    slots = widget_slots(definition)
    if isinstance(values, Mapping):
        return {name: values[name] for name in slots if name in values}
    needed = len(slots)
    while needed and slots[needed - 1] is None:  # an upload button at the end may lack its entry
        needed -= 1
    if not needed <= len(values) <= len(slots):
        raise GraphError(f"node {node['id']} ({node['type']}): {len(values)} widget values, but its widgets are "
                         f"{[name or '(control)' for name in slots]}. Open and save the workflow with this ComfyUI.")
    return {name: value for name, value in zip(slots, values, strict=False) if name is not None}


def _source(link: int | None, nodes: Mapping[int, Node], links: Mapping[int, tuple[int, int]]) -> list[Any] | None:
    """`[node id, output]` at the far end of a link, through reroutes and bypassed nodes; None if nothing is there."""
    while link is not None:
        node_id, output = links[link]
        node = nodes[node_id]
        mode = node.get("mode", 0)
        if mode == MUTED:
            return None
        if mode != BYPASSED and node["type"] != "Reroute":
            return [str(node_id), output]
        kind = node["outputs"][output]["type"]
        through = [socket for socket in node.get("inputs", []) if node["type"] == "Reroute" or socket["type"] == kind]
        link = through[0].get("link") if through else None
    return None
