"""FLUX's tokens and positions as diffusers' pipeline makes them, and its weights in both layouts."""

import json
import math

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from fourfold.nodes.common import flux
from fourfold.nodes.common.errors import CorruptCheckpointError, MismatchedKeysError, WrongFileError
from safetensors.torch import load_file, save_file


def test_tokens_and_positions_are_those_of_diffusers_pipeline():
    latent = torch.randn(2, 16, 6, 10)
    tokens = flux.pack(latent)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latent, 2, 16, 6, 10))
    assert torch.equal(flux.unpack(tokens, 6, 10), latent)
    theirs = FluxPipeline._prepare_latent_image_ids(2, 3, 5, torch.device("cpu"), torch.float32)
    ids = flux.position_ids(4, 6, 10)
    assert torch.equal(ids[4:], theirs) and ids.shape == (19, 3) and not ids[:4].any()


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_resolution_shift_is_that_of_diffusers(tokens):
    assert flux.resolution_shift(tokens) == pytest.approx(math.exp(calculate_shift(tokens)))


@pytest.fixture(scope="module")
def wanted(small_flux):
    return FluxTransformer2DModel.from_pretrained(small_flux.folder / "transformer")


@pytest.mark.parametrize("where", ["pipeline", "transformer", "weights", "makers' file", "makers' folder"])
def test_every_layout_gives_the_same_network(small_flux, wanted, where):
    path = {"pipeline": small_flux.folder, "transformer": small_flux.folder / "transformer",
            "weights": small_flux.folder / "transformer" / "diffusion_pytorch_model.safetensors",
            "makers' file": small_flux.files / "flux1-dev.safetensors", "makers' folder": small_flux.files}[where]
    sizes, state = flux.load_flux(path)
    assert {name: wanted.config[name] for name in sizes} | {"axes_dims_rope": (2, 2, 4)} == sizes | {
        "axes_dims_rope": (2, 2, 4)}
    assert set(state) == set(wanted.state_dict())
    assert all(torch.equal(state[name], value) for name, value in wanted.state_dict().items())


def test_a_folders_own_rotary_axes_are_kept_and_a_files_follow_flux(small_flux):
    assert flux.load_flux(small_flux.folder)[0]["axes_dims_rope"] == (2, 2, 4)
    shapes = {name: tuple(value.shape) for name, value in small_flux.transformer().state_dict().items()}
    assert flux.flux_sizes(shapes)["axes_dims_rope"] == (1, 3, 3)  # 16 : 56 : 56 of a head of 8


def test_a_file_with_everything_in_it_and_a_precision(small_flux, wanted, tmp_path):
    """As the all-in-one checkpoints of ComfyUI: names prefixed, text encoders and autoencoder along."""
    state = load_file(small_flux.files / "flux1-dev.safetensors")
    file, prefix = tmp_path / "all.safetensors", "model.diffusion_model."
    more = {"text_encoders.t5xxl.shared.weight": torch.zeros(2, 2), "vae.decoder.conv_in.bias": torch.ones(1)}
    save_file({f"{prefix}{name}": value for name, value in state.items()} | more, file)
    _, loaded = flux.load_flux(file, torch.bfloat16)
    assert all(torch.equal(loaded[name], value.bfloat16()) for name, value in wanted.state_dict().items())
    assert set(loaded) == set(wanted.state_dict())


def test_the_conversion_at_full_size(small_flux):
    """FLUX.1-dev's own header: 19 and 38 blocks, width 3072. No numbers, only names and shapes."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(guidance_embeds=True)
        made = small_flux.makers_layout(network.state_dict())
        assert made["single_blocks.37.linear1.weight"].shape == (21504, 3072) and len(made) == 780
        converted = flux.from_makers_layout(made)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in converted.items()} == shapes
    sizes = flux.flux_sizes(shapes)
    assert sizes == {name: network.config[name] for name in sizes} and sizes["axes_dims_rope"] == (16, 56, 56)


def test_missing_and_unknown_weights_of_a_single_file_are_named(small_flux, tmp_path):
    state = load_file(small_flux.files / "flux1-dev.safetensors")
    file = tmp_path / "flux1.safetensors"
    save_file({name: value for name, value in state.items() if name != "single_blocks.1.linear2.bias"}, file)
    with pytest.raises(MismatchedKeysError, match=r"flux1\.safetensors lacks .*'single_blocks\.1\.linear2\.bias'"):
        flux.load_flux(file)
    save_file(state | {"double_blocks.0.surplus.weight": torch.zeros(1)}, file)
    with pytest.raises(MismatchedKeysError, match=r"1 weights that FLUX\.1 has not: double_blocks\.0\.surplus\.weight"):
        flux.load_flux(file)
    save_file(state | {"double_blocks.0.img_attn.proj.scale_weight": torch.ones(())}, file)
    with pytest.raises(WrongFileError, match=r"scales apart.*scale_weight"):
        flux.load_flux(file)


def test_what_is_no_flux_is_refused_before_it_is_loaded(small_flux, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"FLUX transformer is missing.*nothing\.safetensors.*FLUX\.1-dev"):
        flux.load_flux(tmp_path / "nothing.safetensors")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 1), "single_blocks.0.linear1.weight":
               torch.zeros(7, 1), "img_in.weight": torch.zeros(1, 6), "final_layer.linear.weight": torch.zeros(1, 1)},
              tmp_path / "fill.safetensors")
    with pytest.raises(WrongFileError, match=r"fill\.safetensors is a FLUX\.1 transformer with further inputs"):
        flux.load_flux(tmp_path / "fill.safetensors")
    whole = (small_flux.files / "flux1-dev.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CorruptCheckpointError, match=r"cut\.safetensors is truncated"):
        flux.load_flux(tmp_path / "cut.safetensors")


def test_sizes_of_a_folder_are_read_off_its_weights(small_flux, tmp_path):
    """config.json may say less than diffusers writes today."""
    folder = tmp_path / "transformer"
    small_flux.transformer(num_layers=1, num_single_layers=1).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    sizes, _ = flux.load_flux(folder)
    assert (sizes["num_layers"], sizes["num_single_layers"], sizes["guidance_embeds"]) == (1, 1, True)
