"""DiT4SR's files: every published layout, what is written, what is said of wrong and broken ones."""

import json
import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel
from fourfold.nodes.common.checkpoints import read_header
from fourfold.nodes.common.errors import CorruptCheckpointError, MismatchedKeysError, WrongFileError
from fourfold.nodes.dit4sr.config import Ablations
from fourfold.nodes.dit4sr.model import DiT4SRTransformer, guess_variant
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def published(recorded, tmp_path):
    """A published folder to take apart, with the record of one forward and the model's answer to it."""
    folder, io = recorded("v1")
    copy = shutil.copytree(folder / "transformer", tmp_path / "dit4sr_q" / "transformer")
    names = ("latent", "lr_latent", "timestep", "prompt_embeds", "pooled")
    return copy, lambda model: model(*(io[f"forward1.{name}"] for name in names)), io["forward1.output"]


def shard(folder):
    """Splits the weights into three shards with an index, as large models are published."""
    state = load_file(folder / WEIGHTS)
    names = sorted(state)
    index = {}
    for part in range(3):
        file = f"diffusion_pytorch_model-{part + 1:05d}-of-00003.safetensors"
        save_file({name: state[name] for name in names[part::3]}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names[part::3], file)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("layout", ["folder", "pipeline", "shards", "file", "file alone"])
def test_every_published_layout_loads_with_its_variant(published, tmp_path, relative_error, layout):
    folder, run, output = published
    path = folder
    if layout == "pipeline":
        path = folder.parent
    elif layout == "shards":
        shard(folder)
    elif layout == "file":
        path = folder / WEIGHTS
    elif layout == "file alone":  # no config anywhere: the shapes say the sizes
        state = load_file(folder / WEIGHTS)
        path = tmp_path / "dit4sr_f.safetensors"
        save_file({name: value for name, value in state.items()}, path)
    model = DiT4SRTransformer.from_pretrained(path)
    assert model.config.variant == "v1" == guess_variant(path)
    assert relative_error(run(model), output) < 1e-4
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_saving_and_loading_gives_the_same_network(network, inputs, tmp_path):
    model = network(ablations=Ablations(lr_residual=False, injection_layer="linear"), anchor="lr", latent_shift=0.25)
    model.save_pretrained(tmp_path / "transformer", step=7, training={"photographs": 3})
    for path in (tmp_path, tmp_path / "transformer", tmp_path / "transformer" / WEIGHTS):
        again = DiT4SRTransformer.from_pretrained(path)
        assert again.config == model.config
        assert torch.equal(again(*inputs()), model(*inputs()))
    moved = shutil.move(tmp_path / "transformer" / WEIGHTS, tmp_path / "mine.safetensors")
    assert DiT4SRTransformer.from_pretrained(moved).config == model.config
    header = read_header(moved)
    assert header.method == "dit4sr" and header.step == 7 and header.training == {"photographs": 3}


def test_weights_load_in_the_precision_asked_for(network, inputs, tmp_path):
    model = network()
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert DiT4SRTransformer.from_pretrained(tmp_path).dtype == torch.float32
    half = DiT4SRTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    velocity = half(*inputs())
    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, model(*inputs()), atol=0.5, rtol=0.1)


def test_diffusers_reads_the_folder_that_is_written(network, tmp_path):
    """The published programs build on diffusers' class: the config must be its own, the added keys the only surplus."""
    network().save_pretrained(tmp_path)
    base = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(tmp_path))
    names = set(load_file(tmp_path / WEIGHTS))
    added = {n for n in names if "control" in n or ".attn2.add_" in n or ".attn2.to_add" in n or ".attn2.norm_add" in n}
    assert set(base.state_dict()) == names - added


def test_wrong_missing_and_broken_files_are_named(published, sd3_folder, tmp_path):
    folder, _, _ = published
    with pytest.raises(WrongFileError, match=r"Stable Diffusion 3\.5 medium checkpoint, but a DiT4SR transformer"):
        DiT4SRTransformer.from_pretrained(sd3_folder)
    with pytest.raises(FileNotFoundError, match=r"DiT4SR transformer is missing.*nowhere.*huggingface\.co/acceptee"):
        DiT4SRTransformer.from_pretrained(tmp_path / "nowhere")
    (folder / "config.json").rename(folder / "config.txt")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json.*acceptee/DiT4SR"):
        DiT4SRTransformer.from_pretrained(folder)
    (folder / "config.txt").rename(folder / "config.json")

    state = load_file(folder / WEIGHTS)
    broken = {name: value for name, value in state.items() if name != "transformer_blocks.1.ff.control_conv.bias"}
    save_file(broken | {"extra": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(MismatchedKeysError, match=r"missing: transformer_blocks\.1\.ff\.control_conv\.bias.*extra"):
        DiT4SRTransformer.from_pretrained(folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(CorruptCheckpointError, match="truncated"):
        DiT4SRTransformer.from_pretrained(folder)


def test_an_unknown_variant_is_refused(published):
    with pytest.raises(ValueError, match="variant is 'v3'"):
        DiT4SRTransformer.from_pretrained(published[0], variant="v3")
