"""FLUX's text encoders and autoencoder, from a diffusers folder and from single files, against diffusers itself."""

import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from fourfold.nodes.common.errors import MismatchedKeysError, WrongFileError
from fourfold.nodes.common.flux_encoders import FluxTextEncoder, load_flux_autoencoder
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, T5EncoderModel

PROMPTS = ["the quiet river in autumn", "red leaves and grey sky over the old stone bridge"]


@pytest.fixture(scope="module")
def encoder(small_flux):
    return FluxTextEncoder.from_pretrained(small_flux.folder)


def test_tokens_are_t5s_and_the_pooled_vector_is_clips(small_flux, encoder):
    text = encoder.encode(PROMPTS, t5_length=20)
    assert text.prompt_embeds.shape == (2, 20, small_flux.width) and text.pooled.shape == (2, small_flux.pooled)
    clip = CLIPTextModel.from_pretrained(small_flux.folder / "text_encoder").eval()
    t5 = T5EncoderModel.from_pretrained(small_flux.folder / "text_encoder_2").eval()
    ids = [tokenizer(PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
           for tokenizer, length in zip(encoder.tokenizers, (77, 20), strict=True)]
    with torch.no_grad():
        assert torch.equal(text.pooled, clip(ids[0]).pooler_output)
        assert torch.equal(text.prompt_embeds, t5(ids[1]).last_hidden_state)


def test_flux_reads_512_tokens_and_says_what_it_cuts(encoder, caplog):
    assert encoder.encode(PROMPTS[:1]).prompt_embeds.shape[1] == 512
    encoder.encode(PROMPTS[1:], t5_length=6)
    assert "FLUX's T5 reads 6 tokens" in caplog.text and "bridge" in caplog.text
    with pytest.raises(ValueError, match="list of at least one text"):
        encoder.encode("one text")


def test_single_files_encode_as_the_folder_does(small_flux, encoder):
    text, wanted = (e.encode(PROMPTS, t5_length=20) for e in
                    (FluxTextEncoder.from_pretrained(small_flux.files, torch.float32), encoder))
    assert torch.equal(text.pooled, wanted.pooled)
    torch.testing.assert_close(text.prompt_embeds, wanted.prompt_embeds, atol=1e-2, rtol=1e-2)  # T5's file is fp16
    assert not any(p.requires_grad for p in encoder.parameters())


def test_missing_encoders_and_tokenizers_are_named(small_flux, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CLIP-L, clip_l\.safetensors, is missing in .*flux_text_encoders"):
        FluxTextEncoder.from_pretrained(tmp_path)
    for name in ("clip_l", "t5xxl_fp16"):
        shutil.copy(small_flux.files / f"{name}.safetensors", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer of FLUX\.1 is missing: the folder .*tokenizer"):
        FluxTextEncoder.from_pretrained(tmp_path)
    shutil.copy(tmp_path / "clip_l.safetensors", tmp_path / "clip_l_2.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 files that could be CLIP-L"):
        FluxTextEncoder.from_pretrained(tmp_path)
    (tmp_path / "text_encoder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"text encoder of FLUX\.1 is missing.*config\.json"):
        FluxTextEncoder.from_pretrained(tmp_path)


def test_incomplete_single_files_are_refused(small_flux, tmp_path):
    folder = shutil.copytree(small_flux.files, tmp_path / "files")
    clip = load_file(folder / "clip_l.safetensors")
    clip.pop("text_model.encoder.layers.1.mlp.fc1.bias")
    save_file(clip, folder / "clip_l.safetensors")
    with pytest.raises(MismatchedKeysError, match=r"clip_l\.safetensors does not hold a complete.*fc1\.bias"):
        FluxTextEncoder.from_pretrained(folder)


@pytest.mark.parametrize("where", ["pipeline", "makers' folder", "makers' file"])
def test_the_autoencoder_of_every_layout_is_the_same(small_flux, where):
    path = {"pipeline": small_flux.folder, "makers' folder": small_flux.files,
            "makers' file": small_flux.files / "ae.safetensors"}[where]
    codec = load_flux_autoencoder(path)
    wanted = AutoencoderKL.from_pretrained(small_flux.folder / "vae").eval()
    assert (codec.downscale, codec.latent_channels, codec.shift, codec.scale) == (8, 16, 0.1159, 0.3611)
    pixels = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(codec.encode(pixels), wanted.encode(2 * pixels - 1).latent_dist.mean)
        latent = torch.randn(1, 16, 4, 6)
        torch.testing.assert_close(codec.decode(latent), (wanted.decode(latent).sample / 2 + 0.5).clamp(0, 1))


def test_decoding_lets_gradients_through(small_flux):
    latent = torch.randn(1, 16, 2, 2, requires_grad=True)
    load_flux_autoencoder(small_flux.files).decode(latent).square().mean().backward()
    assert latent.grad.abs().sum() > 0


def test_wrong_and_missing_autoencoders_are_named(small_flux, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"FLUX's autoencoder, ae\.safetensors, is missing in .*FLUX\.1-dev"):
        load_flux_autoencoder(tmp_path)
    with pytest.raises(WrongFileError, match=r"clip_l\.safetensors is a CLIP.*ae\.safetensors"):
        load_flux_autoencoder(small_flux.files / "clip_l.safetensors")
    state = load_file(small_flux.folder / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(WrongFileError, match="another layout than its makers'"):
        load_flux_autoencoder(tmp_path)
