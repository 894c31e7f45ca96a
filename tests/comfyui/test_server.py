"""The nodes in a real server, over HTTP: what they declare, what they make, how they are cancelled, how they refuse."""

import copy
import io
import os
import threading
import time

import fourfold
import pytest
import torch
from fourfold.headless.client import Interrupted, NodeFailed, PromptRejected
from fourfold.nodes.common import tiny
from fourfold.nodes.dit4sr.config import PRESETS
from fourfold.nodes.examples.photos import load_example
from PIL import Image
from safetensors.torch import save_file

SAMPLER = "FourfoldMMDiTControlSampler"
SAMPLERS = (SAMPLER, "FourfoldInstantIRSampler")
SDXL_KEYS = {  # what tells an SDXL checkpoint from others, at sizes that cost nothing
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
    "model.diffusion_model.middle_block.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
    "conditioner.embedders.1.model.text_projection": (1280, 1280),
}


@pytest.fixture(scope="module")
def tiny_graph(api_graph):
    return api_graph("dit4sr_tiny")


@pytest.fixture(scope="module")
def small_graph(tiny_graph, client, make_png):
    """The tiny workflow on a picture of 32 x 48 pixels."""
    return tiny_graph.with_picture(client.upload_image(make_png(32, 48)[0], "small.png"))


def changed(graph, class_type: str, **inputs):
    graph = copy.deepcopy(graph)
    graph.inputs(class_type).update(inputs)
    return graph


def loader_graph(graph, transformer: str):
    """The same graph with a DiT4SR Loader in place of the tiny network."""
    graph = copy.deepcopy(graph)
    inputs = {"transformer": transformer, "variant": "auto", "dtype": "default"}
    graph["100"] = {"class_type": "FourfoldDiT4SRLoader", "inputs": inputs}
    graph.inputs(SAMPLER)["model"] = ["100", 0]
    return graph


def still_works(client, graph, fetch) -> bool:
    outputs = client.run(changed(graph, SAMPLER, seed=int(time.time())), timeout=600)
    return fetch(outputs, graph.id("SaveImage")).shape == (1, 3, 128, 192)


def test_every_node_is_listed_with_a_tooltip_on_every_input(object_info):
    ours = {name: node for name, node in object_info.items() if name.startswith("Fourfold")}
    assert set(ours) >= {
        "FourfoldDiT4SRLoader", SAMPLER, "FourfoldLRPrepare", "FourfoldColorFix", "FourfoldDegrade",
        "FourfoldTinyModels", "FourfoldCaptionImage", "FourfoldCompare", "FourfoldExamplePhoto"}
    for name, node in ours.items():
        assert node["category"].split("/")[0] == "Fourfold" and node["description"], name
        for group in ("required", "optional"):
            for key, spec in node["input"].get(group, {}).items():
                assert len(spec) > 1 and spec[1].get("tooltip"), f"{name}.{key} has no tooltip"


def test_server_has_loaded_every_part(server):
    assert "could not be loaded" not in server.log_text()


def test_tiny_workflow_makes_what_the_library_makes(tiny_workflow, api_graph, client, make_png, fetch):
    data, lr = make_png(32, 48, seed=5)
    graph = api_graph(tiny_workflow).with_picture(client.upload_image(data, "library.png"))
    reports = []
    outputs = client.run(graph, reports.append, timeout=600)
    made = fetch(outputs, graph.id("SaveImage"))
    method = graph.inputs("FourfoldTinyModels")["method"]
    expected = fourfold.restore(lr, method=method, model="tiny", scale=4, seed=graph.inputs(*SAMPLERS)["seed"])
    assert made.shape == expected.shape
    difference = (made - expected).abs()
    assert difference.max() < 3 / 255 and difference.mean() < 0.6 / 255  # 8 bits, and another version of torch
    assert (made - torch.nn.functional.interpolate(lr, scale_factor=4, mode="bicubic")).abs().mean() > 2 / 255
    steps = [report for report in reports if report.node_id == graph.id(*SAMPLERS) and report.maximum > 1]
    assert steps[-1].value == steps[-1].maximum >= graph.inputs(*SAMPLERS)["steps"]
    assert any(report.preview for report in reports)


def test_tiny_workflow_runs_as_it_is_shipped(tiny_workflow, api_graph, client, fetch):
    graph = api_graph(tiny_workflow)
    started = time.monotonic()
    outputs = client.run(graph, timeout=600)
    assert {output.node_id for output in outputs} >= {graph.id("SaveImage"), graph.id("FourfoldCompare")}
    made = fetch(outputs, graph.id("SaveImage"))
    photo = graph.inputs("FourfoldExamplePhoto")["photo"]
    assert made.shape == load_example(photo)[1].shape
    assert time.monotonic() - started < 300


def test_settings_of_the_tiny_workflow_are_those_of_the_library(tiny_graph):
    sampling, inputs = PRESETS["tiny"].sampling, tiny_graph.inputs(SAMPLER)
    for name in ("steps", "guidance", "start_sigma", "tile", "overlap", "tile_batch"):
        assert inputs[name] == getattr(sampling, name), name
    prepare = tiny_graph.inputs("FourfoldLRPrepare")
    assert (prepare["multiple"], prepare["min_short_side"]) == (sampling.multiple, sampling.min_short_side)
    assert tiny_graph.inputs("FourfoldColorFix")["method"] == sampling.color_fix
    assert tiny_graph.inputs("FourfoldCaptionImage")["suffix"] == PRESETS["tiny"].added_prompt
    assert tiny_graph[inputs["negative"][0]]["inputs"]["text"] == PRESETS["tiny"].negative_prompt


def test_settings_of_the_full_workflow_are_those_of_the_paper(api_graph):
    graph, sampling = api_graph("dit4sr_full"), PRESETS["full"].sampling
    for name in ("steps", "guidance", "start_sigma", "tile", "overlap", "tile_batch"):
        assert graph.inputs(SAMPLER)[name] == getattr(sampling, name), name
    assert graph.inputs(SAMPLER)["injection_scale"] == 1.2
    assert graph.inputs("FourfoldCaptionImage")["suffix"] == PRESETS["full"].added_prompt
    assert graph[graph.inputs(SAMPLER)["negative"][0]]["inputs"]["text"] == PRESETS["full"].negative_prompt
    prepare = graph.inputs("FourfoldLRPrepare")
    assert (prepare["multiple"], prepare["min_short_side"]) == (sampling.multiple, sampling.min_short_side)


def test_same_seed_same_bytes_and_another_seed_another_picture(small_graph, client):
    def content(seed: int) -> bytes:
        client.free()
        graph = changed(small_graph, SAMPLER, seed=seed)
        graph.inputs("SaveImage")["filename_prefix"] = f"seed{seed}"  # else ComfyUI answers from its cache
        (output,) = (o for o in client.run(graph, timeout=600) if o.node_id == graph.id("SaveImage"))
        return pixels_of(client.view(output))

    first = content(7)
    content(8)  # drops what was cached for 7
    assert content(7) == first
    assert content(8) != first


def pixels_of(png: bytes) -> bytes:
    """A PNG without its text chunks: those carry the graph."""
    with Image.open(io.BytesIO(png)) as image:
        return image.tobytes()


def test_cancel_stops_within_one_network_call(small_graph, client, fetch):
    graph = changed(small_graph, SAMPLER, seed=99, steps=200)
    sampler, after = graph.id(SAMPLER), []
    cancelled = threading.Event()

    def watch(report):
        if report.node_id != sampler or not report.value:
            return
        if cancelled.is_set():
            after.append(report.value)
        elif report.value >= 3:
            client.interrupt()
            cancelled.set()

    with pytest.raises(Interrupted) as caught:
        client.run(graph, watch, timeout=600)
    assert caught.value.node_id == sampler
    assert len(after) <= 2  # reports that were on their way, or the one call that ran: not the other 190
    assert still_works(client, small_graph, fetch)


def test_cancel_from_the_callback_goes_on_to_the_caller(small_graph, client):
    class Enough(Exception):
        pass

    def stop(report):
        if report.value >= 2:
            raise Enough

    with pytest.raises(Enough):
        client.run(changed(small_graph, SAMPLER, seed=98, steps=200), stop, timeout=600)


def test_text_file_is_refused_at_its_node(tiny_graph, client, small_graph, fetch):
    graph = tiny_graph.with_picture(client.upload_image(b"This is no picture.\n", "text.png"))
    with pytest.raises(NodeFailed, match="identify image") as caught:
        client.run(graph, timeout=600)
    assert caught.value.class_type == "LoadImage"
    assert still_works(client, small_graph, fetch)


def test_picture_of_one_pixel_becomes_sixteen(tiny_graph, client, make_png, fetch):
    graph = tiny_graph.with_picture(client.upload_image(make_png(1, 1)[0], "one.png"))
    outputs = client.run(graph, timeout=600)
    assert fetch(outputs, graph.id("SaveImage")).shape == (1, 3, 4, 4)


@pytest.mark.parametrize(("size", "target"), [((17, 31), (68, 124)), ((5, 40), (20, 160))])
def test_odd_sizes_come_out_exactly(size, target, tiny_graph, client, make_png, fetch):
    graph = tiny_graph.with_picture(client.upload_image(make_png(*size)[0], f"{size[0]}x{size[1]}.png"))
    outputs = client.run(graph, timeout=600)
    assert fetch(outputs, graph.id("SaveImage")).shape == (1, 3, *target)


def test_transparent_picture_stays_transparent(tiny_graph, client, fetch):
    buffer = io.BytesIO()
    image = Image.new("RGBA", (32, 32), (200, 120, 40, 255))
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    image.save(buffer, "PNG")
    graph = tiny_graph.with_picture(client.upload_image(buffer.getvalue(), "alpha.png"))
    graph.inputs("FourfoldLRPrepare")["mask"] = [graph.id("LoadImage"), 1]
    made = fetch(client.run(graph, timeout=600), graph.id("SaveImage"))
    assert made.shape == (1, 4, 128, 128)
    assert made[0, 3, :, :56].max() < 0.05 and made[0, 3, :, 72:].min() > 0.95


def test_a_batch_is_restored_picture_by_picture_each_with_its_own_caption(tiny_graph, client, make_png, fetch):
    names = [client.upload_image(make_png(32, 48, seed)[0], f"batch{seed}.png") for seed in (8, 9)]
    singles = [tiny_graph.with_picture(name) for name in names]
    expected = [fetch(client.run(graph, timeout=600), graph.id("SaveImage")) for graph in singles]
    graph = copy.deepcopy(singles[0])
    first = graph.id("LoadImage")
    graph["200"] = {"class_type": "LoadImage", "inputs": {"image": names[1]}}
    graph["201"] = {"class_type": "ImageBatch", "inputs": {"image1": [first, 0], "image2": ["200", 0]}}
    graph.inputs("FourfoldLRPrepare")["image"] = graph.inputs("FourfoldCompare")["before"] = ["201", 0]
    outputs = client.run(graph, timeout=600)
    saved, sheets = ([output for output in outputs if output.node_id == graph.id(kind)]
                     for kind in ("SaveImage", "FourfoldCompare"))
    assert len(saved) == len(sheets) == 2  # not two for each of two captions
    for output, single in zip(saved, expected, strict=True):
        assert torch.equal(fetch([output], output.node_id), single)


def test_truncated_checkpoint_is_named_before_anything_runs(server, small_graph, client, fetch):
    content = tiny.tiny_checkpoint("dit4sr").read_bytes()
    (server.workspace / "models/diffusion_models").mkdir(parents=True, exist_ok=True)
    (server.workspace / "models/diffusion_models/cut.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(PromptRejected, match=r"cut\.safetensors") as caught:
        client.run(loader_graph(small_graph, "cut.safetensors"), timeout=600)
    assert [(problem.node_id, problem.class_type) for problem in caught.value.problems] == [
        ("100", "FourfoldDiT4SRLoader")]
    assert still_works(client, small_graph, fetch)


def test_sdxl_checkpoint_is_told_from_its_header(server, small_graph, client, fetch):
    folder = server.workspace / "models/diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(shape, dtype=torch.float16) for name, shape in SDXL_KEYS.items()},
              folder / "sdxl.safetensors")
    with pytest.raises(PromptRejected, match=r"(?i)sdxl") as caught:
        client.run(loader_graph(small_graph, "sdxl.safetensors"), timeout=600)
    (problem,) = caught.value.problems
    assert (problem.node_id, problem.class_type) == ("100", "FourfoldDiT4SRLoader")
    assert "dit4sr" in problem.message.lower()
    assert still_works(client, small_graph, fetch)


def test_missing_checkpoint_says_where_it_belongs_and_where_it_is_from(small_graph, client):
    with pytest.raises(PromptRejected, match=r"nowhere\.safetensors.*huggingface\.co/acceptee/DiT4SR") as caught:
        client.run(loader_graph(small_graph, "nowhere.safetensors"), timeout=600)
    assert "diffusion_models" in str(caught.value)


@pytest.mark.parametrize(("inputs", "text"), [
    ({"tile": 16, "overlap": 16}, "overlap"), ({"steps": 0}, "steps"), ({"guidance": 99.0}, "guidance")])
def test_settings_out_of_range_are_refused_at_the_sampler(inputs, text, small_graph, client):
    with pytest.raises(PromptRejected, match=text) as caught:
        client.queue(changed(small_graph, SAMPLER, **inputs))
    assert {problem.node_id for problem in caught.value.problems} == {small_graph.id(SAMPLER)}


def test_shipped_checkpoint_loads_through_the_loader_node(small_graph, client, fetch):
    graph = loader_graph(small_graph, tiny.FILES["dit4sr"])
    made = fetch(client.run(graph, timeout=600), graph.id("SaveImage"))
    same = fetch(client.run(small_graph, timeout=600), small_graph.id("SaveImage"))
    assert torch.equal(made, same)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc for the server's memory")
def test_repeated_runs_do_not_grow_memory(server, small_graph, client):
    def resident() -> float:
        with open(f"/proc/{server.process.pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))  # MiB

    sizes = []
    for seed in range(200, 206):
        client.run(changed(small_graph, SAMPLER, seed=seed), timeout=600)
        sizes.append(resident())
    assert sizes[-1] - sizes[1] < 40, f"MiB after each run: {[round(size) for size in sizes]}"
