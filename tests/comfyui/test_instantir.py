"""InstantIR's nodes in a real server, with a small random network beside the tiny family's encoders."""

import copy
import os
import threading
import time
from dataclasses import replace

import pytest
import torch
from fourfold.headless.client import Interrupted, NodeFailed, PromptRejected
from fourfold.nodes.common import tiny
from fourfold.nodes.common.vision import VisionEncoder
from fourfold.nodes.instantir.config import PRESETS
from fourfold.nodes.instantir.delta_plot import HEIGHT, WIDTH
from fourfold.nodes.instantir.model import InstantIR
from fourfold.nodes.instantir.restore import System, restore
from safetensors.torch import save_file

SAMPLER = "FourfoldInstantIRSampler"
NODES = {"FourfoldInstantIRLoader", "FourfoldDINOLoader", "FourfoldDINOEncoder", "FourfoldDCPResampler",
         "FourfoldPreviewer", "FourfoldOneStepPreview", "FourfoldAggregator", SAMPLER}
STEPS = 3
LOADER = "100"


@pytest.fixture(scope="module")
def small():
    """A network of the tiny one's interfaces and a fraction of its size."""
    config = PRESETS["tiny"].network
    unet = config.unet | dict(block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=(1, 2))
    torch.manual_seed(3)
    network = InstantIR(replace(config, unet=unet))
    network.add_previewer(4)
    for name, parameter in network.named_parameters():
        if "lora_B" in name or "controlnet" in name:  # zeros, which would do nothing
            torch.nn.init.normal_(parameter, std=0.05)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def models(server, small):
    """The server's folder models/fourfold, with the small network in it."""
    folder = server.workspace / "models/fourfold"
    folder.mkdir(parents=True, exist_ok=True)
    small.save_pretrained(folder / "small.safetensors")
    small.save_part(folder / "aggregator.safetensors", "aggregator")
    return folder


@pytest.fixture(scope="module")
def picture(make_png):
    return make_png(32, 48, seed=6)


@pytest.fixture(scope="module")
def graph(api_graph, client, models, picture):
    """The tiny workflow on a small picture with the small network, in few steps."""
    graph = api_graph("instantir_tiny").with_picture(client.upload_image(picture[0], "instantir.png"))
    family = graph.id("FourfoldTinyModels")
    inputs = {"base": "small.safetensors", "adapter": "none", "aggregator": "none", "previewer": "none",
              "dtype": "default"}
    graph[LOADER] = {"class_type": "FourfoldInstantIRLoader", "inputs": inputs}
    for node in graph.values():
        if node["inputs"].get("model") == [family, 0]:
            node["inputs"]["model"] = [LOADER, 0]
    graph[family]["inputs"]["method"] = "dit4sr"  # for its CLIP and VAE
    graph.inputs(SAMPLER)["steps"] = STEPS
    return graph


def changed(graph, class_type: str, **inputs):
    graph = copy.deepcopy(graph)
    graph.inputs(class_type).update(inputs)
    return graph


def without(graph, *class_types: str):
    """The graph with nodes taken out, and the links from them."""
    graph = copy.deepcopy(graph)
    for class_type in class_types:
        gone = graph.id(class_type)
        del graph[gone]
        for node in graph.values():
            links = [name for name, value in node["inputs"].items() if isinstance(value, list) and value[0] == gone]
            for name in links:
                del node["inputs"][name]
    return graph


def previews_node(graph) -> str:
    """The node that shows the previews: behind a decoder behind the sampler's second output."""
    decoder = next(i for i in graph.ids("VAEDecode") if graph[i]["inputs"]["samples"] == [graph.id(SAMPLER), 1])
    return next(i for i in graph.ids("PreviewImage") if graph[i]["inputs"]["images"] == [decoder, 0])


def plot_node(graph) -> str:
    return next(i for i in graph.ids("PreviewImage") if graph[i]["inputs"]["images"] == [graph.id(SAMPLER), 2])


def still_works(client, graph, fetch) -> bool:
    outputs = client.run(changed(graph, SAMPLER, seed=int(time.time())), timeout=900)
    return fetch(outputs, graph.id("SaveImage")).shape == (1, 3, 128, 192)


def test_all_nodes_are_listed(object_info):
    assert set(object_info) >= NODES
    for name in NODES:
        assert object_info[name]["category"] == "Fourfold/InstantIR"
    outputs = object_info[SAMPLER]["output"]
    assert outputs == ["LATENT", "LATENT", "IMAGE"] and object_info["FourfoldDINOLoader"]["output"] == ["FOURFOLD_DINO"]
    assert "FOURFOLD_INSTANTIR" in object_info["FourfoldTinyModels"]["output"][0].split(",")


def test_the_workflow_makes_what_the_library_makes_and_shows_how(graph, client, fetch, small, picture):
    reports = []
    outputs = client.run(graph, reports.append, timeout=900)
    made = fetch(outputs, graph.id("SaveImage"))
    text, eye = tiny.load_text_encoder(), VisionEncoder.from_pretrained(tiny.tiny_checkpoint("vision"))
    system = System.of(PRESETS["tiny"], small, tiny.load_codec(), text, eye)
    expected = restore(picture[1], system, scale=4, seed=graph.inputs(SAMPLER)["seed"], steps=STEPS)
    assert made.shape == expected.shape == (1, 3, 128, 192)
    assert (made - expected).abs().max() < 3 / 255 and (made - expected).abs().mean() < 0.6 / 255
    shown = [output for output in outputs if output.node_id == previews_node(graph)]
    assert len(shown) == STEPS
    assert fetch(outputs, plot_node(graph)).shape[-2:] == (HEIGHT, WIDTH)
    steps = [report for report in reports if report.node_id == graph.id(SAMPLER) and report.maximum > 1]
    assert steps[-1].value == steps[-1].maximum >= 2 * STEPS  # previews and predictions, in windows
    assert any(report.preview for report in reports)


def test_it_runs_without_previewer_and_without_aggregator(graph, client, fetch):
    whole = fetch(client.run(graph, timeout=900), graph.id("SaveImage"))
    for gone in ("FourfoldPreviewer", "FourfoldAggregator"):
        part = without(graph, gone)
        outputs = client.run(part, timeout=900)
        assert not [output for output in outputs if output.node_id == previews_node(part)]
        made = fetch(outputs, part.id("SaveImage"))
        assert made.shape == whole.shape and (made - whole).abs().mean() > 0.5 / 255


def test_two_prompts_and_weighted_words_change_the_picture(graph, client, fetch):
    whole = fetch(client.run(graph, timeout=900), graph.id("SaveImage"))
    family, positive = graph.id("FourfoldTinyModels"), graph.inputs(SAMPLER)["positive"]
    combined = copy.deepcopy(graph)
    combined["200"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": [family, 1], "text": "(dark:1.4), cold"}}
    combined["201"] = {"class_type": "ConditioningCombine",
                       "inputs": {"conditioning_1": positive, "conditioning_2": ["200", 0]}}
    combined.inputs(SAMPLER)["positive"] = ["201", 0]
    made = fetch(client.run(combined, timeout=900), graph.id("SaveImage"))
    assert made.shape == whole.shape and not torch.equal(made, whole)


def test_the_previewer_runs_alone(graph, client, fetch):
    alone = copy.deepcopy(graph)
    sampler = alone.pop(graph.id(SAMPLER))["inputs"]
    alone["300"] = {"class_type": "FourfoldOneStepPreview",
                    "inputs": {"previewer": sampler["previewer"], "prompt": sampler["positive"],
                               "latent": sampler["lq_latent"], "noise_level": 0.3, "seed": 4}}
    for node in (previews_node(graph), plot_node(graph), graph[previews_node(graph)]["inputs"]["images"][0]):
        del alone[node]
    del alone[graph.id("FourfoldAggregator")]
    alone.inputs("VAEDecode")["samples"] = ["300", 0]
    assert fetch(client.run(alone, timeout=900), alone.id("SaveImage")).shape == (1, 3, 128, 192)


def test_a_previewer_without_a_prompt_says_what_to_connect(graph, client, fetch):
    lonely = copy.deepcopy(graph)
    del lonely.inputs("FourfoldPreviewer")["empty_prompt"]
    with pytest.raises(NodeFailed, match="connect a CLIP Text Encode with an empty text") as caught:
        client.run(lonely, timeout=900)
    assert caught.value.class_type == "FourfoldPreviewer"
    guided = changed(lonely, "FourfoldPreviewer", text_guided=True)
    assert fetch(client.run(guided, timeout=900), guided.id("SaveImage")).shape == (1, 3, 128, 192)


def test_cancel_stops_within_one_network_call(graph, client, fetch):
    long = changed(graph, SAMPLER, seed=99, steps=200)
    sampler, after = long.id(SAMPLER), []
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
        client.run(long, watch, timeout=900)
    assert caught.value.node_id == sampler
    assert len(after) <= 3  # reports that were on their way, or the one call that ran: not the other hundreds
    assert still_works(client, graph, fetch)


def refused(client, graph, **widgets) -> str:
    """What the loader answers to other files, found at its node before anything runs."""
    with pytest.raises(PromptRejected) as caught:
        client.run(changed(graph, "FourfoldInstantIRLoader", **widgets), timeout=900)
    problems = caught.value.problems
    assert {(problem.node_id, problem.class_type) for problem in problems} == {(LOADER, "FourfoldInstantIRLoader")}
    return problems[0].message


def test_wrong_files_are_named_before_anything_runs(graph, client, models, fetch):
    sdxl = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
            "model.diffusion_model.label_emb.0.0.weight": torch.zeros(1280, 2816)}
    save_file(sdxl, models / "sdxl.safetensors")
    content = (models / "aggregator.safetensors").read_bytes()
    (models / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (models / "letter.safetensors").write_text("this is a letter, not a checkpoint")
    sdxl_base = {"base": "sdxl.safetensors"}
    assert "SDXL" in refused(client, graph, adapter="sdxl.safetensors")
    assert "cut.safetensors is truncated" in refused(client, graph, aggregator="cut.safetensors")
    assert "text file" in refused(client, graph, previewer="letter.safetensors")
    assert "Choose adapter.pt" in refused(client, graph, **sdxl_base)
    assert "holds all parts" in refused(client, graph, aggregator="aggregator.safetensors")
    message = refused(client, graph, **sdxl_base, adapter="nowhere.pt")
    assert "nowhere.pt" in message and "huggingface.co/InstantX/InstantIR" in message and "fourfold" in message
    assert still_works(client, graph, fetch)


@pytest.mark.parametrize(("inputs", "text"), [
    ({"tile": 32, "overlap": 32}, "overlap"), ({"tile": 20}, "tile is 20"), ({"steps": 0}, "steps")])
def test_settings_out_of_range_are_refused_at_the_sampler(inputs, text, graph, client):
    with pytest.raises(PromptRejected, match=text) as caught:
        client.queue(changed(graph, SAMPLER, **inputs))
    assert {problem.node_id for problem in caught.value.problems} == {graph.id(SAMPLER)}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc for the server's memory")
def test_repeated_runs_do_not_grow_memory(server, graph, client):
    def resident() -> float:
        with open(f"/proc/{server.process.pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))  # MiB

    sizes = []
    for seed in range(200, 206):
        client.run(changed(graph, SAMPLER, seed=seed), timeout=900)
        sizes.append(resident())
    assert sizes[-1] - sizes[1] < 40, f"MiB after each run: {[round(size) for size in sizes]}"


# the shipped workflows


def test_settings_of_the_workflows_are_those_of_the_library(api_graph):
    for name, preset in (("instantir_tiny", PRESETS["tiny"]), ("instantir_full", PRESETS["full"])):
        graph, sampling = api_graph(name), preset.sampling
        for kind in (SAMPLER, "FourfoldAggregator", "FourfoldPreviewer"):
            for key, value in graph.inputs(kind).items():
                assert isinstance(value, list) or key == "seed" or value == getattr(sampling, key), (name, key)
        assert graph.inputs("FourfoldDCPResampler")["weight"] == sampling.image_scale
        prepare = graph.inputs("FourfoldLRPrepare")
        for key in ("multiple", "min_short_side", "max_long_side", "interpolation"):
            assert prepare[key] == getattr(sampling, key), (name, key)
        assert graph.inputs("FourfoldColorFix")["method"] == sampling.color_fix
        texts = {role: graph[graph.inputs(SAMPLER)[role][0]]["inputs"]["text"] for role in ("positive", "negative")}
        assert texts["negative"] == preset.negative_prompt
        if preset.captioned:
            assert graph.inputs("FourfoldCaptionImage")["suffix"] == preset.prompt
        else:
            assert texts["positive"] == preset.prompt
        assert graph[graph.inputs("FourfoldPreviewer")["empty_prompt"][0]]["inputs"]["text"] == ""


def test_the_creative_workflow_lets_the_text_paint(api_graph):
    graph = api_graph("instantir_creative")
    assert graph.inputs("FourfoldAggregator")["creative_start"] < 0.6
    assert graph.inputs("FourfoldPreviewer")["text_guided"] is True
    assert len(graph[graph.inputs(SAMPLER)["positive"][0]]["inputs"]["text"]) > 20


def test_the_shipped_network_edits_by_text_as_the_creative_workflow_says(graph, client, fetch):
    edited = []
    for text in ("low contrast, smooth", "high contrast, fine texture"):
        creative = changed(graph, "FourfoldInstantIRLoader", base=tiny.FILES["instantir"])
        creative = changed(creative, "FourfoldAggregator", creative_start=0.3)
        creative = changed(creative, "FourfoldPreviewer", text_guided=True)
        creative = changed(creative, SAMPLER, steps=8, guidance=4.0)
        creative[creative.inputs(SAMPLER)["positive"][0]]["inputs"]["text"] = text
        edited.append(fetch(client.run(creative, timeout=900), creative.id("SaveImage")))
    assert edited[1].std() > edited[0].std() + 1 / 255
