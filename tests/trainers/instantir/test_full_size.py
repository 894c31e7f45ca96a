"""InstantIR's trainings at full size, one after the other, with a small Stable Diffusion XL and a small DINOv2."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from fourfold.nodes.common.checkpoints import detect_family, load_state, read_header
from fourfold.nodes.instantir.config import TINY_UNET, PreviewerConfig, ResamplerConfig
from fourfold.nodes.instantir.model import InstantIR
from fourfold.nodes.instantir.restore import load_system, restore
from fourfold.trainers import instantir_study
from fourfold.trainers import train_instantir_aggregator as aggregator
from fourfold.trainers import train_instantir_dcp as dcp
from fourfold.trainers import train_instantir_previewer as previewer
from transformers import Dinov2Config, Dinov2Model

RESAMPLER = ResamplerConfig(embedding_dim=16, dim=16, depth=1, dim_head=8, heads=2, num_queries=3, output_dim=16,
                            ff_mult=2)
TEXT, POOLED = 16 + 24, 20  # widths of the small text encoders


@pytest.fixture(scope="module")
def sdxl(small_text_encoders, tmp_path_factory):
    """The whole diffusers folder of a small Stable Diffusion XL."""
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    for name in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"):
        shutil.copytree(small_text_encoders.folder / name, folder / name)
    torch.manual_seed(0)
    sizes = TINY_UNET | dict(
        in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=(1, 2),
        sample_size=8, cross_attention_dim=TEXT, addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=POOLED + 6 * 4)
    UNet2DConditionModel(**{k: v for k, v in sizes.items() if k != "_class_name"}).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, layers_per_block=1, scaling_factor=0.13025,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def dino(sdxl):
    folder = sdxl.parent / "dinov2-large"
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14,
                             image_size=28)).save_pretrained(folder)
    content = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def full(config, sdxl, dino, tmp_path, monkeypatch):
    """`full(training, **fields)`: settings at full size; sample pictures in one step."""
    preset = instantir_study.PRESETS["full"]
    quick = replace(preset, sampling=replace(preset.sampling, steps=1))
    monkeypatch.setitem(instantir_study.PRESETS, "full", quick)

    def make(training, **fields):
        settings = config(training, start=None, codec=None, text=None, vision=None)
        return replace(settings, preset="full", sdxl=str(sdxl), dino=str(dino), batch_size=2, max_steps=2, save_every=0,
                       sample_every=2, samples=1, export_dtype="float32", **fields)

    return make


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_one_training_after_the_other_gives_what_the_loader_reads(full, sdxl, dino, tmp_path, precision):
    model = tmp_path / "model"
    model.mkdir()
    for training, trains in (("dcp", lambda c: dcp.train(c, RESAMPLER)),
                             ("previewer", lambda c: previewer.train(c, PreviewerConfig(2))),
                             ("aggregator", aggregator.train)):
        found = {"adapter": "adapter", "previewer": "previewer_lora_weights"}
        fields = {part: str(model / f"{name}.safetensors") for part, name in found.items()
                  if part in type(full(training)).__dataclass_fields__}
        result = trains(full(training, mixed_precision=precision, gradient_checkpointing=True, **fields))
        (export,) = result.folder.iterdir()
        shutil.copy(export, model)
    assert {p.name for p in model.iterdir()} == {"adapter.safetensors", "previewer_lora_weights.safetensors",
                                                 "aggregator.safetensors"}
    families = {detect_family(p) for p in model.iterdir()}
    assert families == {"instantir_adapter", "instantir_previewer", "instantir_aggregator"}
    adapter = load_state(model / "adapter.safetensors")
    assert {name.split(".")[0] for name in adapter} == {"image_proj", "ip_adapter"}
    assert all(name.startswith("unet.") for name in load_state(model / "previewer_lora_weights.safetensors"))
    header = read_header(model / "aggregator.safetensors")
    assert "Open RAIL" in header.metadata["fourfold.licence"] and header.training["sdxl"] == "sdxl"
    assert str(tmp_path) not in json.dumps(header.metadata)

    whole = InstantIR.load(sdxl, *(model / f"{name}.safetensors" for name in (
        "adapter", "aggregator", "previewer_lora_weights")))
    base = load_state(sdxl / "unet")
    plain = InstantIR.load(sdxl)
    assert torch.equal(plain.unet.conv_in.weight, base["conv_in.weight"])
    assert whole.config.resampler == RESAMPLER and whole.config.previewer.rank == 2
    sr = restore(torch.rand(1, 3, 16, 16), load_system(model, sdxl, device="cpu", vision=dino), size=(64, 64), steps=1)
    assert sr.shape == (1, 3, 64, 64) and sr.isfinite().all()


def test_gradient_checkpointing_gives_the_same_losses(full, curve, tmp_path):
    """Of the Previewer above all, whose layers run again in backward: with the LoRA on."""
    dcp_result = dcp.train(full("dcp"), RESAMPLER)
    adapter = str(dcp_result.folder / "adapter.safetensors")
    for saves in (False, True):
        settings = full("previewer", adapter=adapter, gradient_checkpointing=saves)
        settings = replace(settings, output_dir=str(tmp_path / f"saves-{saves}"), max_steps=3, sample_every=0)
        previewer.train(settings, PreviewerConfig(2))
    plain, saving = (curve(tmp_path / f"saves-{saves}") for saves in (False, True))
    for step in (1, 2, 3):
        assert saving[step] == pytest.approx(plain[step], rel=1e-4)
