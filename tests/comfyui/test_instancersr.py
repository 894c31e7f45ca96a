"""InstanceRSR's nodes in a real server, with a small random network beside the tiny family's autoencoder."""

from dataclasses import replace

import pytest
import torch
from fourfold.headless.client import PromptRejected
from fourfold.nodes.common import tiny
from fourfold.nodes.instancersr.config import PRESETS
from fourfold.nodes.instancersr.model import InstanceRSR
from fourfold.nodes.instancersr.restore import System, restore_with_map

SAMPLER, DECODE, LOADER = "FourfoldInstanceRSRSampler", "FourfoldInstanceMapDecode", "FourfoldInstanceRSRLoader"
STEPS = 3


@pytest.fixture(scope="module")
def small():
    """A network of the tiny one's interfaces and a fraction of its size."""
    torch.manual_seed(3)
    config = replace(PRESETS["tiny"].network, num_attention_heads=2, attention_head_dim=16, num_layers=2,
                     control_blocks=2, align_block=2, align_hidden=16, head_width=16)
    network = InstanceRSR(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def picture(make_png):
    return make_png(32, 48, seed=6)


@pytest.fixture(scope="module")
def graph(server, client, small, picture):
    """From a picture to the restored one and its instances."""
    folder = server.workspace / "models/fourfold"
    folder.mkdir(parents=True, exist_ok=True)
    small.save_pretrained(folder / "small_instancersr.safetensors")
    name = client.upload_image(picture[0], "instancersr.png")
    sampling = PRESETS["tiny"].sampling
    widgets = {field: getattr(sampling, field) for field in ("start", "spacing", "tile", "overlap", "tile_batch")}
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "FourfoldTinyModels", "inputs": {"method": "dit4sr"}},  # for its VAE
        "3": {"class_type": LOADER, "inputs": {"network": "small_instancersr.safetensors", "dtype": "fp32"}},
        "4": {"class_type": "FourfoldLRPrepare", "inputs": {
            "image": ["1", 0], "scale": 4.0, "width": 0, "height": 0, "multiple": sampling.multiple,
            "min_short_side": sampling.min_short_side}},
        "5": {"class_type": "VAEEncode", "inputs": {"pixels": ["4", 0], "vae": ["2", 2]}},
        "6": {"class_type": SAMPLER, "inputs": {
            "model": ["3", 0], "lr_latent": ["5", 0], "seed": 7, "steps": STEPS, **widgets}},
        "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["2", 2]}},
        "8": {"class_type": "FourfoldColorFix", "inputs": {"image": ["7", 0], "frame": ["4", 1], "method": "none"}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "instancersr"}},
        "10": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 1], "vae": ["2", 2]}},
        "11": {"class_type": DECODE, "inputs": {
            "image": ["10", 0], "min_area": sampling.min_area, "max_masks": 3, "frame": ["4", 1]}},
        "12": {"class_type": "MaskToImage", "inputs": {"mask": ["11", 1]}},
        "13": {"class_type": "PreviewImage", "inputs": {"images": ["12", 0]}},
        "14": {"class_type": "PreviewImage", "inputs": {"images": ["11", 0]}},
    }


def test_all_nodes_are_listed(object_info):
    for name in (SAMPLER, DECODE, LOADER, "FourfoldSAMLoader", "FourfoldSAMInstances"):
        assert object_info[name]["category"] == "Fourfold/InstanceRSR"
    assert object_info[SAMPLER]["output"] == ["LATENT", "LATENT"]
    for name in (DECODE, "FourfoldSAMInstances"):
        assert object_info[name]["output"] == ["IMAGE", "MASK", "IMAGE"]
        assert object_info[name]["output_is_list"] == [False, True, False]
    assert "FOURFOLD_INSTANCERSR" in object_info["FourfoldTinyModels"]["output"][0].split(",")


def test_a_graph_makes_what_the_library_makes(graph, client, fetch, small, picture):
    reports = []
    outputs = client.run(graph, reports.append, timeout=300)
    system = System.of(PRESETS["tiny"], small, tiny.load_codec())
    expected = restore_with_map(picture[1], system, scale=4, seed=7, steps=STEPS)
    made = fetch(outputs, "9")
    assert made.shape == expected.picture.shape == (1, 3, 128, 192)
    assert (made - expected.picture).abs().max() < 3 / 255
    labels = (fetch(outputs, "14")[0, 0] * 255).round().long()
    assert (labels == expected.labels[0]).float().mean() > 0.98
    assert len([output for output in outputs if output.node_id == "13"]) == min(3, max(1, int(labels.max())))
    assert fetch(outputs, "11").shape == (1, 3, 128, 192), "the colours are shown on the node"
    steps = [report for report in reports if report.node_id == "6" and report.maximum > 1]
    assert steps[-1].value == steps[-1].maximum >= STEPS
    assert any(report.preview for report in reports)


def test_what_is_wrong_is_said_at_the_node_when_the_graph_is_queued(graph, client):
    tile = {**graph, "6": {**graph["6"], "inputs": {**graph["6"]["inputs"], "tile": 16, "overlap": 16}}}
    with pytest.raises(PromptRejected, match="must be smaller than tile"):
        client.run(tile, timeout=60)
    codec = {**graph, "3": {"class_type": LOADER, "inputs": {"network": tiny.FILES["codec"], "dtype": "fp32"}}}
    with pytest.raises(PromptRejected, match="image codec, but an InstanceRSR checkpoint is needed"):
        client.run(codec, timeout=60)
