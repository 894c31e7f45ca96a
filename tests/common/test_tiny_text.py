"""The tiny text encoder: padding, long and empty prompts, files."""

import logging

import pytest
import torch
from fourfold.nodes.common.checkpoints import read_header
from fourfold.nodes.common.tiny_text import TinyTextConfig, TinyTextEncoder


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    encoder = TinyTextEncoder(TinyTextConfig(width=16, layers=2, heads=4, hidden=24, length=24))
    return encoder.eval().requires_grad_(False)


def test_shapes_and_zeros_after_the_prompt(encoder):
    text = encoder.encode(["warm", ""])
    assert text.prompt_embeds.shape == (2, 24, 16) and text.pooled.shape == (2, 16)
    filled = text.prompt_embeds.abs().sum(-1) > 0
    assert filled.sum(-1).tolist() == [5, 1], "its bytes and the end-of-text token"
    torch.testing.assert_close(text.pooled[0], text.prompt_embeds[0, :5].mean(0))


def test_a_prompt_reads_the_same_in_any_batch(encoder):
    prompts = ["bright, warm", "", "a much longer one, cut", "grün ☃"]
    together = encoder.encode(prompts)
    for row, prompt in enumerate(prompts):
        alone = encoder.encode([prompt])
        torch.testing.assert_close(together.prompt_embeds[row], alone.prompt_embeds[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.pooled[row], alone.pooled[0], atol=1e-5, rtol=1e-5)


def test_the_length_of_the_padding_does_not_matter(encoder):
    longer = TinyTextEncoder(TinyTextConfig(width=16, layers=2, heads=4, hidden=24, length=60)).eval()
    longer.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        long, short = longer.encode(["bright, warm"]), encoder.encode(["bright, warm"])
    torch.testing.assert_close(long.prompt_embeds[:, :24], short.prompt_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(long.pooled, short.pooled, atol=1e-5, rtol=1e-5)
    assert long.prompt_embeds[:, 24:].eq(0).all()


def test_words_and_their_order_matter(encoder):
    pooled = encoder.encode(["warm, dark", "dark, warm", "cool, dark"]).pooled
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(pooled[a], pooled[b], atol=1e-3)


def test_long_prompts_are_cut_and_a_warning_says_what_is_lost(encoder, caplog):
    caplog.set_level(logging.WARNING)
    fits = "x" * 23
    kept = encoder.encode([fits])
    assert not caplog.records, "23 bytes and the end fill the 24 places"
    cut = encoder.encode([fits + " and vertical edges"])
    assert torch.equal(cut.prompt_embeds, kept.prompt_embeds) and torch.equal(cut.pooled, kept.pooled)
    (record,) = caplog.records
    assert "reads 23 bytes" in record.getMessage() and "' and vertical edges'" in record.getMessage()
    caplog.clear()
    encoder.encode(["ä" * 12])  # 24 bytes: the last letter loses its second half
    assert len(caplog.records) == 1


def test_captions_of_the_embedded_captioner_fit_the_default():
    from fourfold.nodes.common.captions import EmbeddedCaptioner

    pictures = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    longest = max(EmbeddedCaptioner()(pictures), key=len)
    assert len(longest.encode()) < TinyTextConfig().length


@pytest.mark.parametrize("prompts", ["a bridge", [], [None]])
def test_prompts_must_be_a_list_of_texts(encoder, prompts):
    with pytest.raises(ValueError, match="list of at least one text"):
        encoder.encode(prompts)


def test_saving_and_loading(encoder, tmp_path):
    encoder.save(tmp_path / "text.safetensors", step=4)
    again = TinyTextEncoder.load(tmp_path / "text.safetensors")
    assert again.config == encoder.config and not any(p.requires_grad for p in again.parameters())
    assert torch.equal(again.encode(["warm"]).prompt_embeds, encoder.encode(["warm"]).prompt_embeds)
    header = read_header(tmp_path / "text.safetensors")
    assert header.method == "text" and header.step == 4
    encoder.save(tmp_path / "half.safetensors", dtype=torch.float16)
    half = TinyTextEncoder.load(tmp_path / "half.safetensors")
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    torch.testing.assert_close(half.encode(["warm"]).pooled, encoder.encode(["warm"]).pooled, atol=0.01, rtol=0.01)


def test_everything_trains(encoder):
    encoder.train().requires_grad_(True)
    text = encoder.encode(["bright, warm", ""])
    (text.prompt_embeds.square().sum() + text.pooled.sum()).backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
