"""The three text encoders of Stable Diffusion 3.5 with their tokenizers, small and random, as a diffusers folder."""

import io
import json

import sentencepiece
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

SENTENCE = "a photograph of an old stone bridge over the quiet river in autumn with red leaves and grey sky"
T5_WIDTH = 64
POOLED_WIDTH = 12 + 20


def write(root) -> None:
    """Writes text_encoder, _2 and _3 and tokenizer, _2 and _3 into the folder."""
    torch.manual_seed(0)
    for suffix, width, projection, pad in (("", 16, 12, "<|endoftext|>"), ("_2", 24, 20, "!")):
        size = write_clip_tokenizer(root / f"tokenizer{suffix}", pad)
        config = CLIPTextConfig(
            vocab_size=size, hidden_size=width, intermediate_size=32, projection_dim=projection, num_hidden_layers=3,
            num_attention_heads=4, bos_token_id=size - 2, eos_token_id=size - 1,
            hidden_act="gelu" if suffix else "quick_gelu")
        CLIPTextModelWithProjection(config).save_pretrained(root / f"text_encoder{suffix}")
    write_t5_tokenizer(root / "tokenizer_3")
    T5EncoderModel(T5Config(vocab_size=80, d_model=T5_WIDTH, d_kv=16, d_ff=32, num_layers=2, num_heads=4,
                            feed_forward_proj="gated-gelu")).save_pretrained(root / "text_encoder_3")


def write_clip_tokenizer(folder, pad: str) -> int:
    """A byte-level BPE of single letters and a few merges, as CLIP's tokenizer files are laid out. Returns its size."""
    folder.mkdir()
    merges = [("s", "t"), ("r", "i"), ("o", "n"), ("st", "on"), ("t", "h"), ("th", "e</w>"), ("e", "d</w>")]
    letters = [chr(code) for code in range(33, 127)]
    vocab = ["!", *(c for c in letters if c != "!"), *(c + "</w>" for c in letters), *("".join(m) for m in merges)]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}))
    return len(vocab)


def write_t5_tokenizer(folder) -> None:
    folder.mkdir()
    model = io.BytesIO()
    words = SENTENCE.split()
    sentences = iter([" ".join(words[i:] + words[:i]) for i in range(len(words))])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, vocab_size=60, model_type="unigram", pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2)
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 4, "pad_token": "<pad>",
        "eos_token": "</s>", "unk_token": "<unk>"}))
