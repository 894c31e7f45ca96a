"""The shared nodes and the host package: schemas, tensor layout, files, memory, progress."""

import asyncio
import json
import sys
import types
from pathlib import Path

import pytest
import torch

LOCALES = Path(__file__).resolve().parents[2] / "locales"


def picture(batch=1, height=9, width=7, channels=3, seed=0):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(seed))


# schemas


def test_schemas_hold_together(nodes):
    assert len(nodes) >= 9
    for node_id, node in nodes.items():
        schema = node.define_schema()
        schema.validate()
        assert node_id.startswith("Fourfold") and schema.category.split("/")[0] == "Fourfold" and schema.description
        assert all(socket.tooltip for socket in (*schema.inputs, *schema.outputs)), node_id
        defaults = {i.id: i for i in schema.inputs if getattr(i, "min", None) is not None}
        assert all(i.min <= i.default <= i.max for i in defaults.values()), node_id


def test_the_english_texts_are_those_of_the_schemas(nodes):
    texts = json.loads((LOCALES / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    for node_id, node in nodes.items():
        schema = node.define_schema()
        assert texts[node_id] == {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {i.id: {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs},
            "outputs": {
                str(k): {"name": o.display_name or o.id, "tooltip": o.tooltip} for k, o in enumerate(schema.outputs)
            },
        }, f"locales/en/nodeDefs.json is behind the schema of {node_id}"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_texts_hold_nothing_that_the_editor_would_interpret(language):
    text = (LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")
    strings = [s for node in json.loads(text).values() for s in json.dumps(node, ensure_ascii=False).split('"')[1::2]]
    assert not [s for s in strings if set(s) & set("@|{}$")]  # links, plurals and placeholders of vue-i18n


# registry


def test_a_part_that_cannot_be_imported_hides_no_other(nodes, monkeypatch, caplog):
    from fourfold.nodes import registry

    monkeypatch.setitem(sys.modules, "fourfold.nodes.broken", None)
    found = registry.load_nodes(("common", "broken"))
    assert found == sys.modules["fourfold.nodes.common.comfy_nodes"].NODES
    assert "'broken'" in caplog.text and "Traceback" in caplog.text


def test_the_entrypoint_gives_all_nodes(nodes, model_folder, monkeypatch):
    import folder_paths
    import fourfold

    monkeypatch.setitem(sys.modules, "comfyui_version", types.SimpleNamespace(__version__="0.3.64"))
    extension = asyncio.run(fourfold.comfy_entrypoint())
    assert {node.define_schema().node_id for node in asyncio.run(extension.get_node_list())} == set(nodes)
    paths, extensions = folder_paths.folder_names_and_paths["fourfold"]
    assert any(Path(path).name == "checkpoints" for path in paths) and ".safetensors" in extensions


# LR Prepare, Color Fix


def prepare(nodes, image, **options):
    """(pictures in one batch, frames); the node gives the pictures as a list."""
    widgets = {"scale": 4.0, "width": 0, "height": 0, "multiple": 16, "min_short_side": 0, **options}
    pictures, frames = nodes["FourfoldLRPrepare"].execute(image, **widgets).args
    assert [len(pixels) for pixels in pictures] == [1] * len(image)
    return torch.cat(pictures), frames


def fix(nodes, image, frames, method="none"):
    """(pictures, masks) of the one batch that the frames are of."""
    ((pictures,), (masks,)) = nodes["FourfoldColorFix"].execute(list(image.split(1)), frames, [method]).args
    return pictures, masks


@pytest.mark.parametrize(
    ("options", "target"),
    [({}, (36, 28)), ({"scale": 1.0}, (9, 7)), ({"width": 70}, (90, 70)), ({"height": 18}, (18, 14)),
     ({"width": 5, "height": 50}, (50, 5)), ({"min_short_side": 64}, (36, 28))],
)
def test_a_picture_comes_back_at_exactly_the_size_asked_for(nodes, options, target):
    prepared, frames = prepare(nodes, picture(), **options)
    assert prepared.shape[1] % 16 == prepared.shape[2] % 16 == 0 and prepared.shape[3] == 3
    assert min(prepared.shape[1:3]) >= options.get("min_short_side", 0)
    restored, mask = fix(nodes, prepared, frames)
    assert restored.shape == (1, *target, 3) and mask.shape == (1, *target) and not mask.any()


def test_small_results_are_drawn_whole_where_asked(nodes):
    def sides(**options):
        prepared, frame = prepare(nodes, picture(), multiple=8, **options)
        assert fix(nodes, prepared, frame)[0].shape == (1, 36, 28, 3)
        return tuple(prepared.shape[1:3])

    bounds = {"min_short_side": 40, "max_long_side": 50}
    assert sides(**bounds) == (48, 32)  # 36 x 28 raised to 51 x 40, capped at 50, rounded down
    assert sides(**bounds | {"max_long_side": 30}) == (56, 40)  # longer than the bound: padded
    assert sides(**bounds | {"max_long_side": 30, "larger": "shrink"}) == (24, 16)


def test_the_batch_and_grey_pictures_survive(nodes):
    prepared, frames = prepare(nodes, picture(batch=3, channels=1))
    restored, _ = fix(nodes, prepared, frames, "adain")
    assert restored.shape == (3, 36, 28, 3)  # Save Image takes three channels
    assert torch.equal(restored[..., 0], restored[..., 2])


def test_transparency_is_put_back(nodes):
    mask = (picture(channels=1)[..., 0] > 0.5).float()
    prepared, frames = prepare(nodes, picture(), mask=mask)
    restored, transparency = fix(nodes, prepared, frames)
    assert restored.shape == (1, 36, 28, 4)
    assert torch.allclose(restored[..., 3], 1 - transparency, atol=1e-6)
    assert torch.allclose(transparency[:, ::4, ::4].mean(), mask.mean(), atol=0.1)
    through_rgba, rgba_frames = prepare(nodes, torch.cat([picture(), 1 - mask[..., None]], dim=3))
    assert torch.equal(through_rgba, prepared) and torch.equal(rgba_frames[0].prepared.alpha, frames[0].prepared.alpha)


def test_load_images_mask_of_an_opaque_picture_is_no_transparency(nodes):
    prepared, frames = prepare(nodes, picture(), mask=torch.zeros(1, 64, 64))
    assert frames[0].prepared.alpha is None and fix(nodes, prepared, frames)[0].shape[3] == 3


def test_a_mask_of_another_picture_is_refused(nodes):
    with pytest.raises(ValueError, match="use the MASK output of the node that the picture comes from"):
        prepare(nodes, picture(), mask=torch.ones(1, 8, 8))


def test_colours_come_from_the_low_resolution_picture(nodes):
    prepared, frames = prepare(nodes, picture())
    shifted = prepared * 0.5 + 0.3
    raw, fixed = (fix(nodes, shifted, frames, method)[0] for method in ("none", "adain"))
    reference = frames[0].prepared.lr.mean(dim=(0, 2, 3))
    assert (raw.mean(dim=(0, 1, 2)) - reference).abs().max() > 0.02
    assert (fixed.mean(dim=(0, 1, 2)) - reference).abs().max() < 0.01


# Degrade, Compare, Tiny Models


def test_degrade_is_seeded_by_the_row(nodes):
    node = nodes["FourfoldDegrade"]
    image = picture(height=24, width=32, channels=4)
    twice = node.execute(image.repeat(2, 1, 1, 1), "light", 4, 2**64 - 1).args[0]
    assert twice.shape == (2, 6, 8, 3) and not torch.equal(twice[0], twice[1])
    assert torch.equal(twice[1:], node.execute(image, "light", 4, 0).args[0])  # seed + 1 begins anew after the last


def test_compare_shows_both_pictures(nodes, only_in_comfyui, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    node = nodes["FourfoldCompare"].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    output = node.execute(picture(), picture(height=36, width=28), "before", "after")
    assert output.args[0].shape[3] == 3 and output.args[0].shape[1] > 36
    assert [tmp_path / entry["filename"] for entry in output.ui.as_dict()["images"]] == list(tmp_path.glob("*.png"))


def test_tiny_models_says_which_checkpoint_is_missing(nodes, tmp_path, monkeypatch):
    from fourfold.nodes.common import tiny

    monkeypatch.setattr(tiny, "CHECKPOINTS", tmp_path)
    node = nodes["FourfoldTinyModels"]
    assert node.define_schema().inputs[0].options == []
    assert "codec" in node.validate_inputs("dit4sr") and str(tmp_path) in node.validate_inputs("dit4sr")
    for name in tiny.FILES.values():
        (tmp_path / name).touch()
    assert node.validate_inputs("dit4sr") is True and node.validate_inputs(None) is True
    assert node.define_schema().inputs[0].options == ["dit4sr", "instantir", "dreamsr", "instancersr"]
    before = node.fingerprint_inputs("dit4sr")
    (tmp_path / tiny.FILES["dit4sr"]).write_bytes(b"better")
    assert node.fingerprint_inputs("dit4sr") != before
    assert "no part 'flux'" in node.validate_inputs("flux")
