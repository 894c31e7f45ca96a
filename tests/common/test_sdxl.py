"""SDXL's text encoders, autoencoder and UNet: from a folder as diffusers, from one file as from the folder."""

import shutil

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from fourfold.nodes.common.errors import CorruptCheckpointError, MismatchedKeysError, WrongFileError
from fourfold.nodes.common.sdxl_text import SDXLTextEncoder
from fourfold.nodes.common.sdxl_unet import read_sdxl_unet
from fourfold.nodes.common.sdxl_vae import read_sdxl_vae
from safetensors.torch import load_file, save_file

PROMPTS = ["a stone bridge over the river", "", "red leaves"]


@pytest.fixture
def altered(small_sdxl, tmp_path):
    """`altered(change)`: the single file with other weights, its tokenizer beside it."""

    def make(change):
        save_file(change(load_file(small_sdxl.file)), tmp_path / "sdxl.safetensors")
        shutil.copytree(small_sdxl.file.parent / "tokenizer", tmp_path / "tokenizer")
        return tmp_path / "sdxl.safetensors"

    return make


def test_text_equals_diffusers(small_sdxl):
    encoder = SDXLTextEncoder.from_pretrained(small_sdxl.folder)
    text = encoder.encode(PROMPTS)
    pipeline = StableDiffusionXLPipeline(
        vae=None, unet=None, scheduler=None, text_encoder=encoder.clip_l, text_encoder_2=encoder.clip_g,
        tokenizer=encoder.tokenizers[0], tokenizer_2=encoder.tokenizers[1])
    with torch.no_grad():
        prompt_embeds, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    assert text.prompt_embeds.shape == (3, 77, small_sdxl.width) and text.pooled.shape == (3, small_sdxl.pooled)
    torch.testing.assert_close(text.prompt_embeds, prompt_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text.pooled, pooled, atol=1e-5, rtol=0)
    assert not torch.allclose(text.pooled[0], text.pooled[2], atol=1e-3) and not text.pooled.requires_grad
    with pytest.raises(ValueError, match="list of at least one text"):
        encoder.encode("a bridge")


def test_one_file_gives_the_same_text(small_sdxl):
    folder, file = (SDXLTextEncoder.from_pretrained(path) for path in (small_sdxl.folder, small_sdxl.file))
    for ours, theirs in zip(vars(file.encode(PROMPTS)).values(), vars(folder.encode(PROMPTS)).values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    half = SDXLTextEncoder.from_pretrained(small_sdxl.file, torch.bfloat16)
    assert {(p.dtype, p.requires_grad) for p in half.parameters()} == {(torch.bfloat16, False)}


def test_what_is_missing_of_the_text_is_named(small_sdxl, altered, tmp_path):
    shutil.copytree(small_sdxl.folder, tmp_path / "sdxl")
    shutil.rmtree(tmp_path / "sdxl" / "tokenizer_2")
    with pytest.raises(FileNotFoundError, match="tokenizer_2"):
        SDXLTextEncoder.from_pretrained(tmp_path / "sdxl")
    shutil.rmtree(tmp_path / "sdxl" / "text_encoder")
    with pytest.raises(FileNotFoundError, match="text_encoder"):
        SDXLTextEncoder.from_pretrained(tmp_path / "sdxl")
    file = altered(lambda state: {k: v for k, v in state.items() if not k.startswith("conditioner.")})
    with pytest.raises(FileNotFoundError, match="without text encoders"):
        SDXLTextEncoder.from_pretrained(file)
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        SDXLTextEncoder.from_pretrained(small_sdxl.file, tokenizer=tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["transformer.text_model.embeddings.token_embedding.weight", "model.ln_final.weight",
                                  "transformer.text_model.final_layer_norm.bias", "model.text_projection"])
def test_incomplete_text_encoders_are_refused(altered, name):
    file = altered(lambda state: {k: v for k, v in state.items() if not k.endswith(name)})
    with pytest.raises(MismatchedKeysError, match=r"complete|missing"):
        SDXLTextEncoder.from_pretrained(file)


def test_the_autoencoder_from_a_folder_and_from_one_file(small_sdxl):
    theirs, pixels = AutoencoderKL.from_pretrained(small_sdxl.folder / "vae"), torch.rand(1, 3, 32, 40)
    with torch.no_grad():
        latent = theirs.encode(2 * pixels - 1).latent_dist.mean
        picture = (theirs.decode(latent).sample / 2 + 0.5).clamp(0, 1)
    for path in (small_sdxl.folder, small_sdxl.folder / "vae", small_sdxl.file):
        ours = read_sdxl_vae(path)
        assert (ours.downscale, ours.latent_channels, ours.scale, ours.shift) == (8, 4, 0.13025, 0)
        torch.testing.assert_close(ours.encode(pixels), latent, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.decode(latent), picture, atol=1e-5, rtol=0)
    assert read_sdxl_vae(small_sdxl.file, torch.bfloat16).vae.dtype == torch.bfloat16
    assert read_sdxl_vae(small_sdxl.file, torch.float16).vae.dtype == torch.float32, "half precision overflows in it"


def test_an_autoencoders_own_file(small_sdxl, altered):
    file = altered(lambda state: {k.removeprefix("first_stage_model."): v for k, v in state.items() if "first" in k})
    latent = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(read_sdxl_vae(file).decode(latent), read_sdxl_vae(small_sdxl.file).decode(latent))


def test_a_file_without_autoencoder_is_named(small_sdxl, altered):
    file = altered(lambda state: {k: v for k, v in state.items() if "first_stage" not in k})
    with pytest.raises(FileNotFoundError, match="no autoencoder"):
        read_sdxl_vae(file)
    with pytest.raises(WrongFileError, match="full SDXL checkpoint"):
        read_sdxl_vae(small_sdxl.folder / "text_encoder" / "model.safetensors")


def test_an_incomplete_autoencoder_is_refused(altered):
    file = altered(lambda state: {k: v for k, v in state.items() if not k.endswith("decoder.conv_out.bias")})
    with pytest.raises(MismatchedKeysError, match=r"decoder\.conv_out\.bias"):
        read_sdxl_vae(file)


def test_the_unet_from_a_folder_and_from_one_file(small_sdxl):
    theirs, config = read_sdxl_unet(small_sdxl.folder)
    pooled = {"addition_time_embed_dim": small_sdxl.size_width}
    ours, read = read_sdxl_unet(small_sdxl.file, pooled)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())
    same = ("block_out_channels", "layers_per_block", "cross_attention_dim", "projection_class_embeddings_input_dim",
            "down_block_types", "up_block_types", "in_channels", "use_linear_projection", "addition_embed_type")
    assert all(list(read[name]) == list(config[name]) if isinstance(read[name], tuple) else read[name] == config[name]
               for name in same)
    assert read_sdxl_unet(small_sdxl.folder, {"sample_size": 3})[1]["sample_size"] == 3


def test_a_bare_network_in_the_makers_layout(small_sdxl, altered):
    prefix = "model.diffusion_model."
    file = altered(lambda state: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    assert read_sdxl_unet(file)[0].keys() == read_sdxl_unet(small_sdxl.file)[0].keys()


def test_what_is_no_sdxl_unet_is_named(small_sdxl, tmp_path):
    with pytest.raises(WrongFileError, match="SDXL base model"):
        read_sdxl_unet(small_sdxl.folder / "vae")
    with pytest.raises(FileNotFoundError, match="stable-diffusion-xl-base"):
        read_sdxl_unet(tmp_path / "sdxl.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(small_sdxl.file.read_bytes()[:9999])
    with pytest.raises(CorruptCheckpointError, match="truncated"):
        read_sdxl_unet(tmp_path / "cut.safetensors")
