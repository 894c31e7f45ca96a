"""The rules of the suite's layout, checked by reading its files: who imports whom, and what every node comes with."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).resolve().parents[1]
METHODS = ("dit4sr", "instantir", "dreamsr", "instancersr")
LANGUAGES = ("en", "zh")
HOST_MODULES = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfy_config", "folder_paths", "nodes",
                "latent_preview", "node_helpers", "execution", "server"}
PROGRAMS = ("nodes", "trainers", "headless", "commands")
PACKAGE_FILES = [
    SUITE / "__init__.py",
    SUITE / "cli.py",
    *sorted(path for folder in PROGRAMS for path in (SUITE / folder).rglob("*.py")),
]
NODE_FILES = sorted((SUITE / "nodes").glob("*/comfy_*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(SUITE).as_posix()


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import; level 0 is absolute, 1 the file's own package, 2 the one above."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" if node.module else alias.name for alias in node.names]
            found += [(node.level, module) for module in inside]
    return found


def package_of(path: Path, level: int) -> tuple[str, ...]:
    """The package, as folders below the suite, that a relative import of this level starts from."""
    folders = path.parent.relative_to(SUITE).parts
    return folders[: len(folders) - (level - 1)]


def may_import_host(path: Path) -> bool:
    inside = name_of(path)
    return path in NODE_FILES or inside == "nodes/registry.py" or inside.startswith("nodes/common/host/")


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name_of)
def test_only_node_files_and_the_host_package_import_comfyui(path):
    found = [module for level, module in imports(path) if level == 0 and module.split(".")[0] in HOST_MODULES]
    assert may_import_host(path) or not found, f"{name_of(path)} imports {found}"


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name_of)
def test_inside_the_suite_imports_are_relative(path):
    found = [module for level, module in imports(path) if level == 0 and module.split(".")[0] == "fourfold"]
    assert not found, f"{name_of(path)} imports {found}; ComfyUI loads the suite under another name"


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name_of)
def test_the_search_path_is_left_alone(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    touched = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "path"
               and isinstance(node.value, ast.Name) and node.value.id == "sys"]
    assert not touched, f"{name_of(path)} touches sys.path in lines {touched}"


@pytest.mark.parametrize("path", sorted((SUITE / "nodes").rglob("*.py")), ids=name_of)
def test_methods_import_neither_each_other_nor_the_programs_around_them(path):
    here = path.relative_to(SUITE / "nodes").parts[0]
    for level, module in imports(path):
        if level == 0:
            continue
        target = (*package_of(path, level), *module.split("."))
        assert target[0] == "nodes", f"{name_of(path)} imports {'.'.join(target)}"
        if here in METHODS or here == "common":
            part = target[1] if len(target) > 1 else ""
            assert part in {here, "common"}, f"{name_of(path)} imports {'.'.join(target)}"


def nodes_of(path: Path) -> dict[str, list[str]]:
    """node_id -> ids of its inputs, as the schemas in a node file spell them out."""
    nodes = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "Schema":
            arguments = {keyword.arg: keyword.value for keyword in node.keywords}
            nodes[arguments["node_id"].value] = [call.args[0].value for call in arguments["inputs"].elts]
    return nodes


ALL_NODES = {node: inputs for path in NODE_FILES for node, inputs in nodes_of(path).items()}


def test_nodes_are_found_and_registered_ids_begin_with_the_suites_name():
    assert len(ALL_NODES) >= 8
    assert [node for node in ALL_NODES if not node.startswith("Fourfold")] == []
    parts = ast.parse((SUITE / "nodes" / "registry.py").read_text(encoding="utf-8"))
    registered = next(ast.literal_eval(node.value) for node in parts.body
                      if isinstance(node, ast.Assign) and node.targets[0].id == "PARTS")
    assert set(registered) == {path.parent.name for path in NODE_FILES}


@pytest.mark.parametrize("path", NODE_FILES, ids=name_of)
def test_every_socket_and_widget_has_a_tooltip(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in {"Input", "Output"}:
            tooltip = next((keyword.value for keyword in node.keywords if keyword.arg == "tooltip"), None)
            assert tooltip is not None, f"{name_of(path)}, line {node.lineno}: no tooltip"


@pytest.mark.parametrize("node", ALL_NODES)
def test_every_node_has_a_page_that_names_all_its_inputs(node):
    page = (SUITE / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    assert len(page) > 400
    missing = [name for name in ALL_NODES[node] if f"**{name}**" not in page]
    assert not missing, f"web/docs/{node}.md does not explain {missing}"
    assert re.search(r"^## What can go wrong", page, re.MULTILINE)


@pytest.mark.parametrize("page", sorted((SUITE / "web" / "docs").rglob("*.md")), ids=name_of)
def test_no_page_without_a_node(page):
    assert page.stem in ALL_NODES or page.parent.name in ALL_NODES


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_is_translated_with_all_its_inputs(language):
    definitions = json.loads((SUITE / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(definitions) == set(ALL_NODES)
    for node, inputs in ALL_NODES.items():
        entry = definitions[node]
        assert entry["display_name"] and entry["description"]
        assert set(entry["inputs"]) == set(inputs), node
        assert all(text["name"] and text["tooltip"] for text in entry["inputs"].values()), node


def test_importing_the_suite_needs_neither_comfyui_nor_torch():
    program = """
import sys, fourfold
heavy = [name for name in ("torch", "comfy", "folder_paths", "diffusers") if name in sys.modules]
assert not heavy, heavy
assert fourfold.WEB_DIRECTORY == "./web"
assert not hasattr(fourfold, "NODE_CLASS_MAPPINGS")  # where both exist, ComfyUI ignores the entrypoint
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
