"""The shipped workflows in the real editor: found among its templates, drawn whole, the same graph, run."""

import json
import shutil
from pathlib import Path

import pytest
from fourfold.headless.graphs import widget_slots
from fourfold.headless.server import LINK_NAME, SUITE
from fourfold.nodes.examples.photos import load_example

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

pytestmark = pytest.mark.browser

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARTIFACTS = Path(__file__).resolve().parents[1] / "artifacts"
SECOND = 1000  # playwright counts in milliseconds
READY = "() => window.app?.graph && window.app.extensionManager && window.app.vueAppReady"
# What the editor has made of each node: its widgets by name, its links, and whether it knows the class.
DRAWN = """() => app.graph.nodes.map(node => ({
    id: node.id, type: node.type, known: node.type in LiteGraph.registered_node_types, bad: !!node.has_errors,
    widgets: Object.fromEntries((node.widgets ?? []).map(widget => [widget.name, widget.value])),
    linked: (node.inputs ?? []).filter(input => input.link != null).map(input => input.name),
    box: [node.pos[0], node.pos[1], node.size[0], node.size[1]],
    needed: Array.from(node.computeSize()),
}))"""
FOLLOW = "() => app.api.addEventListener('execution_error', event => { window.failure = event.detail })"
PICTURES = """types => window.failure || app.graph.nodes.filter(node => types.includes(node.type))
    .every(node => node.imgs?.length && node.imgs.every(image => image.naturalWidth > 0))"""


@pytest.fixture(scope="module")
def chromium():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no Chromium found (looked for {', '.join(BROWSERS)})")
    with sync_api.sync_playwright() as playwright:
        yield lambda folder: playwright.chromium.launch_persistent_context(
            folder, executable_path=executable, headless=True, args=FLAGS, viewport={"width": 1920, "height": 1080})


@pytest.fixture(scope="module")
def editor_server(server):
    """The server, told that this user has seen the tutorial, and with the picture that ComfyUI comes with."""
    settings = server.workspace / "user/default/comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))
    shutil.copy(server.comfyui / "input/example.png", server.workspace / "input")
    return server


@pytest.fixture
def page(chromium, editor_server, tmp_path):
    """The editor in a browser of its own: it brings back what was open in the last one."""
    with chromium(tmp_path / "profile") as context:
        context.set_default_timeout(90 * SECOND)
        page = context.pages[0]
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(error.stack or str(error)))
        page.goto(editor_server.address, wait_until="domcontentloaded", timeout=300 * SECOND)
        page.wait_for_function(READY, timeout=300 * SECOND)
        yield page


def picture_of(page, name: str) -> None:
    """Keeps a screenshot in tests/artifacts, which git ignores, for a person to look at."""
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"{name}.png")


def browse_templates(page) -> None:
    page.evaluate("() => { app.extensionManager.command.execute('Comfy.BrowseTemplates') }")
    page.get_by_role("dialog").get_by_text(LINK_NAME, exact=True).first.click()


def open_template(page, name: str) -> None:
    browse_templates(page)
    page.errors.clear()  # of the editor's own start
    page.get_by_role("dialog").get_by_title(name, exact=True).first.click()
    count = len(json.loads((SUITE / f"workflows/{name}.json").read_text(encoding="utf-8"))["nodes"])
    page.wait_for_function("count => app.graph.nodes.length == count", arg=count)
    page.evaluate("() => { app.extensionManager.command.execute('Comfy.Canvas.FitView') }")
    page.wait_for_timeout(1 * SECOND)  # the view glides


def close_dialogs(page) -> str:
    """Closes what the editor shows over the canvas (missing models, say) and returns its text."""
    texts = []
    for _ in range(5):
        dialogs = page.get_by_role("dialog")
        if not dialogs.count():
            break
        texts.append(dialogs.last.inner_text())
        page.keyboard.press("Escape")
        page.wait_for_timeout(1 * SECOND)
    return "\n".join(texts)


def test_template_browser_lists_the_suites_workflows_with_their_pictures(page):
    answers = {}
    page.on("response", lambda answer: answers.update({answer.url.rsplit("/", 1)[-1]: answer.status}))
    browse_templates(page)
    names = sorted(path.stem for path in (SUITE / "workflows").glob("*.json"))
    for name in names:
        page.get_by_role("dialog").get_by_title(name, exact=True).first.wait_for()
    page.wait_for_function("""count => [...document.querySelectorAll('[role=dialog] img')]
        .filter(image => image.naturalWidth > 0).length >= count""", arg=len(names))
    picture_of(page, "templates")
    assert {name: answers.get(f"{name}.jpg") for name in names} == dict.fromkeys(names, 200)


def test_opened_workflow_is_drawn_whole(page, workflow, object_info):
    open_template(page, workflow)
    dialogs = close_dialogs(page)
    picture_of(page, workflow)
    assert page.errors == []
    told = json.loads((SUITE / f"workflows/{workflow}.json").read_text(encoding="utf-8"))
    drawn = {node["id"]: node for node in page.evaluate(DRAWN)}
    assert set(drawn) == {node["id"] for node in told["nodes"]}
    for node in told["nodes"]:
        seen = drawn[node["id"]]
        assert seen["type"] == node["type"] and seen["known"] and not seen["bad"]
        assert seen["linked"] == [socket["name"] for socket in node["inputs"] if socket["link"] is not None]
        assert all(size >= needed for size, needed in zip(seen["box"][2:], seen["needed"], strict=True)), \
            f"{node['type']} is {seen['box'][2:]} and needs {seen['needed']}"
        if node["type"] in object_info:
            expected = {name for name in widget_slots(object_info[node["type"]]) if name}
            assert expected <= set(seen["widgets"]), node["type"]
    models = [model["name"] for node in told["nodes"] for model in node.get("properties", {}).get("models", [])]
    assert [name for name in models if name not in dialogs] == []
    assert models or not dialogs, dialogs


def test_editor_exports_the_shipped_api_file(page, workflow, api_graph):
    open_template(page, workflow)
    close_dialogs(page)
    assert page.evaluate("async () => (await app.graphToPrompt()).output") == api_graph(workflow)


def test_run_draws_the_restored_picture(page, tiny_workflow, api_graph):
    open_template(page, tiny_workflow)
    page.evaluate(FOLLOW)
    page.get_by_role("button", name="Run", exact=True).first.click()
    page.wait_for_function(PICTURES, arg=["FourfoldCompare", "SaveImage"], timeout=300 * SECOND)
    page.wait_for_timeout(1 * SECOND)
    picture_of(page, f"{tiny_workflow}_run")
    assert page.evaluate("() => window.failure?.exception_message ?? null") is None
    assert page.get_by_role("dialog").count() == 0
    assert page.errors == []
    sizes = page.evaluate("""() => Object.fromEntries(app.graph.nodes.filter(node => node.imgs?.length)
        .map(node => [node.type, [node.imgs[0].naturalWidth, node.imgs[0].naturalHeight]]))""")
    height, width = load_example(api_graph(tiny_workflow).inputs("FourfoldExamplePhoto")["photo"])[1].shape[2:]
    assert sizes["SaveImage"] == [width, height]


def test_help_of_a_node_is_shown(page, editor_server):
    page.evaluate("() => app.graph.add(LiteGraph.createNode('FourfoldLRPrepare'))")
    answer = page.request.get(f"{editor_server.address}/extensions/{LINK_NAME}/docs/FourfoldLRPrepare.md")
    assert answer.ok and "**min_short_side**" in answer.text()
