"""SD3's three text encoders against diffusers, with tiny random networks and tokenizers."""

import logging
import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from fourfold.nodes.common.errors import MismatchedKeysError
from fourfold.nodes.common.text import SD3TextEncoder, TextEmbedding
from safetensors.torch import load_file, save_file

PROMPTS = ["a stone bridge over the river", "", "grey sky, red leaves"]
T5_WIDTH = 64


@pytest.fixture(scope="module")
def folder(small_text_encoders):
    """A diffusers folder of SD3 at tiny size: random text encoders, their tokenizers, the transformer's config."""
    return small_text_encoders.folder


def reference(encoder: SD3TextEncoder, prompts, t5_length):
    """What diffusers' pipeline makes of the prompts."""
    transformer = SD3Transformer2DModel(sample_size=4, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8,
                                        num_attention_heads=1, joint_attention_dim=T5_WIDTH, caption_projection_dim=8,
                                        pooled_projection_dim=32, out_channels=4, pos_embed_max_size=4)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=None, vae=None,
        text_encoder=encoder.clip_l, text_encoder_2=encoder.clip_g, text_encoder_3=encoder.t5,
        tokenizer=encoder.tokenizers[0], tokenizer_2=encoder.tokenizers[1], tokenizer_3=encoder.tokenizers[2])
    with torch.no_grad():
        prompt_embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=t5_length)
    return prompt_embeds, pooled


@pytest.mark.parametrize("t5_length", [16, 77])
def test_equals_diffusers(folder, t5_length):
    encoder = SD3TextEncoder.from_pretrained(folder)
    text = encoder.encode(PROMPTS, t5_length=t5_length)
    prompt_embeds, pooled = reference(encoder, PROMPTS, t5_length)
    assert text.prompt_embeds.shape == (3, 77 + t5_length, T5_WIDTH) and text.pooled.shape == (3, 12 + 20)
    torch.testing.assert_close(text.prompt_embeds, prompt_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text.pooled, pooled, atol=1e-5, rtol=0)
    assert not torch.allclose(text.pooled[0], text.pooled[2], atol=1e-3), "different prompts, different vectors"
    assert not text.prompt_embeds.requires_grad


def test_without_t5_its_tokens_are_zero(folder, tmp_path, caplog):
    root = shutil.copytree(folder, tmp_path / "clip only")
    shutil.rmtree(root / "text_encoder_3")
    encoder = SD3TextEncoder.from_pretrained(root)
    assert "text_encoder_3" in caplog.text
    text = encoder.encode(PROMPTS, t5_length=77)
    prompt_embeds, pooled = reference(encoder, PROMPTS, 77)  # older diffusers give 77 whatever is asked for
    torch.testing.assert_close(text.prompt_embeds, prompt_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text.pooled, pooled, atol=1e-5, rtol=0)
    assert text.prompt_embeds[:, 77:].eq(0).all() and text.prompt_embeds[:, :77, :40].abs().sum() > 0
    shutil.rmtree(root / "transformer")
    assert SD3TextEncoder.from_pretrained(root).encode([""]).prompt_embeds.shape == (1, 77 + 256, 4096)


def test_long_prompt_is_cut_with_a_warning_that_says_what(folder, caplog):
    encoder = SD3TextEncoder.from_pretrained(folder)
    short, long = "leaves " * 10, "leaves " * 16 + "quiet"
    caplog.set_level(logging.WARNING)
    encoder.encode([short], t5_length=256)
    assert not caplog.records
    text = encoder.encode([short, long], t5_length=256)
    warnings = [record.getMessage() for record in caplog.records]
    assert [message.split(" reads ")[0] for message in warnings] == ["text encoder 1", "text encoder 2"]
    assert all("77 tokens" in message and message.endswith("quiet'") for message in warnings), warnings
    torch.testing.assert_close(text.prompt_embeds, reference(encoder, [short, long], 256)[0], atol=1e-5, rtol=0)
    caplog.clear()
    encoder.encode(["red leaves and grey sky"], t5_length=4)
    assert [r.getMessage().split(" reads ")[0] for r in caplog.records] == ["text encoder 3"]
    assert "grey sky" in caplog.text


def test_dtype_and_batch(folder):
    encoder = SD3TextEncoder.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    text = encoder.encode(PROMPTS, t5_length=8)
    assert text.prompt_embeds.dtype == text.pooled.dtype == torch.bfloat16
    whole = SD3TextEncoder.from_pretrained(folder)
    single = whole.encode(PROMPTS[2:], t5_length=8)
    third = whole.encode(PROMPTS, t5_length=8).prompt_embeds[2:]
    torch.testing.assert_close(third, single.prompt_embeds, atol=1e-5, rtol=0)


def test_half_precision_only_folder_loads(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "fp16")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        (root / name / "model.safetensors").rename(root / name / "model.fp16.safetensors")
    expected = SD3TextEncoder.from_pretrained(folder).encode(PROMPTS, t5_length=8)
    assert torch.equal(SD3TextEncoder.from_pretrained(root).encode(PROMPTS, t5_length=8).prompt_embeds,
                       expected.prompt_embeds)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist.*huggingface.co/stabilityai"):
        SD3TextEncoder.from_pretrained(tmp_path / "nowhere")
    root = shutil.copytree(folder, tmp_path / "sd3")
    shutil.rmtree(root / "tokenizer_2")
    with pytest.raises(FileNotFoundError, match="tokenizer_2 does not exist"):
        SD3TextEncoder.from_pretrained(root)
    (root / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights.*text_encoder"):
        SD3TextEncoder.from_pretrained(root)


def test_incomplete_weights_are_refused(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "sd3")
    path = root / "text_encoder_2" / "model.safetensors"
    state = load_file(path)
    del state["text_projection.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(MismatchedKeysError, match=r"text_projection\.weight"):
        SD3TextEncoder.from_pretrained(root)


def test_prompts_must_be_a_list_of_texts(folder):
    encoder = SD3TextEncoder.from_pretrained(folder)
    for prompts in ("a bridge", [], [None]):
        with pytest.raises(ValueError, match="list of at least one text"):
            encoder.encode(prompts)


def test_embedding_expands_whole():
    text = TextEmbedding(torch.rand(2, 3, 4), torch.rand(2, 5))
    wide = text.expand(6)
    assert torch.equal(wide.prompt_embeds, text.prompt_embeds[[0, 1, 0, 1, 0, 1]])
    assert torch.equal(wide.pooled, text.pooled[[0, 1, 0, 1, 0, 1]])
    assert text.expand(2) is text
    assert text.to(dtype=torch.float64).pooled.dtype == torch.float64 and text.to("meta").prompt_embeds.is_meta
    with pytest.raises(ValueError, match="2 prompts cannot be spread over a batch of 3"):
        text.expand(3)
    with pytest.raises(ValueError, match=r"\(1, 3, 4\) and \(2, 5\)"):
        TextEmbedding(torch.rand(1, 3, 4), torch.rand(2, 5))
