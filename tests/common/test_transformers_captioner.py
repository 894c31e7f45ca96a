"""Captions by image-to-text models of transformers, with tiny random networks made here, and the captions' cache."""

import json
import shutil
import sys

import pytest
import torch
from fourfold.nodes.common import captions
from fourfold.nodes.common.captions import DESCRIBE, EmbeddedCaptioner, TransformersCaptioner, load_captioner
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertTokenizerFast,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

WORDS = ["a", "photo", "of", "bridge", "river", "sky", "stone", "red", "green", "blue", "over", "the", "with", "and",
         "leaves", "light", "describe", "USER", "ASSISTANT", ":", "."]
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 16, "patch_size": 8}
SQUARE = {"height": 16, "width": 16}
CHAT = ("{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}")


def save(model, folder, image_token=None) -> None:
    """Save with weights so large that pictures make a difference to the words; the image's token is never said."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            parameter.data.normal_(std=0.7, generator=generator)
    if image_token is not None:
        model.get_output_embeddings().weight.data[image_token] = 0
    model.save_pretrained(folder)


def bert_tokenizer(folder):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    (folder / "vocab.txt").write_text("\n".join(special + [word.lower() for word in WORDS]))
    return BertTokenizerFast.from_pretrained(folder), len(special) + len(WORDS)


def word_tokenizer(special, **roles):
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "</s>" in special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="</s> $A", special_tokens=[("</s>", special.index("</s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **roles), len(special) + len(WORDS)


def write_blip(folder):
    tokenizer, size = bert_tokenizer(folder)
    BlipProcessor(BlipImageProcessor(size=SQUARE), tokenizer).save_pretrained(folder)
    # as published: the first token is not in the tokenizer's vocabulary
    text = {**SMALL, "vocab_size": size + 2, "encoder_hidden_size": 16, "bos_token_id": size, "pad_token_id": 0,
            "eos_token_id": 3, "sep_token_id": 3, "projection_dim": 8, "max_position_embeddings": 64}
    save(BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION, projection_dim=8)), folder)


def write_git(folder):
    tokenizer, size = bert_tokenizer(folder)
    GitProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE), tokenizer).save_pretrained(folder)
    save(GitForCausalLM(GitConfig(vision_config=VISION, vocab_size=size, max_position_embeddings=64, bos_token_id=2,
                                  eos_token_id=3, pad_token_id=0, **SMALL)), folder)


def write_blip2(folder):
    tokenizer, size = word_tokenizer(["<pad>", "[UNK]", "</s>", "<image>"], bos_token="</s>", eos_token="</s>",
                                     pad_token="<pad>", additional_special_tokens=["<image>"])
    Blip2Processor(BlipImageProcessor(size=SQUARE), tokenizer, num_query_tokens=4).save_pretrained(folder)
    text = {"model_type": "opt", "vocab_size": size, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 64, "word_embed_proj_dim": 16, "bos_token_id": 2,
            "eos_token_id": 2, "pad_token_id": 0}
    qformer = {**SMALL, "vocab_size": size, "encoder_hidden_size": 16}
    config = Blip2Config(vision_config=VISION, qformer_config=qformer, text_config=text, num_query_tokens=4,
                         image_token_index=3)
    save(Blip2ForConditionalGeneration(config), folder)


def write_llava(folder, chat_template=CHAT):
    tokenizer, size = word_tokenizer(["<unk>", "[UNK]", "<s>", "<end>", "<image>", "<pad>"], bos_token="<s>",
                                     eos_token="<end>", pad_token="<pad>", additional_special_tokens=["<image>"])
    LlavaProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE), tokenizer, patch_size=8,
                   vision_feature_select_strategy="default", num_additional_image_tokens=1,
                   chat_template=chat_template).save_pretrained(folder)
    text = {"model_type": "llama", "vocab_size": size, "max_position_embeddings": 128, "bos_token_id": 2,
            "eos_token_id": 3, "pad_token_id": 5, **SMALL}
    vision = {"model_type": "clip_vision_model", "projection_dim": 8, **VISION}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=4)
    save(LlavaForConditionalGeneration(config), folder, image_token=4)


def write_encoder_decoder(folder):
    tokenizer, size = word_tokenizer(["[UNK]", "<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    ViTImageProcessor(size=SQUARE).save_pretrained(folder)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**VISION), GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1,
                                        eos_token_id=1))
    config.decoder_start_token_id = config.pad_token_id = config.eos_token_id = 1
    model = VisionEncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id = model.generation_config.pad_token_id = 1
    save(model, folder)


WRITERS = {"blip": write_blip, "git": write_git, "blip2": write_blip2, "llava": write_llava,
           "encoder-decoder": write_encoder_decoder}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("captioners")
    for name, write in WRITERS.items():
        (root / name).mkdir()
        write(root / name)
    return root


@pytest.fixture
def pictures():
    return (torch.rand(5, 3, 20, 30, generator=torch.Generator().manual_seed(0)) * 255).round() / 255


def as_picture(image):
    return Image.fromarray((image * 255).round().permute(1, 2, 0).to(torch.uint8).numpy())


def expected(name, captioner, image, prompt):
    """The caption as the model's own page tells to make it: one picture, plain calls or a greedy loop."""
    network, processor, tokenizer = captioner.network, captioner._processor, captioner._tokenizer
    picture = as_picture(image)
    if name == "encoder-decoder":
        tokens = network.generate(processor(picture, return_tensors="pt").pixel_values, max_new_tokens=6)
    elif name == "blip":
        tokens = network.generate(**processor(images=picture, text=prompt, return_tensors="pt"), max_new_tokens=6)
    elif name == "git":
        ids = torch.tensor([[2, *tokenizer(prompt or "", add_special_tokens=False).input_ids]])
        pixels = processor(images=picture, return_tensors="pt").pixel_values
        tokens = network.generate(pixel_values=pixels, input_ids=ids, max_new_tokens=6)[:, ids.shape[1]:]
    else:
        text = f"USER: <image> {prompt or DESCRIBE} ASSISTANT:" if name == "llava" else prompt or ""
        inputs = dict(processor(images=picture, text=text, return_tensors="pt"))
        inputs.pop("token_type_ids", None)
        start = inputs["input_ids"].shape[1]
        while inputs["input_ids"].shape[1] < start + 6:
            with torch.no_grad():
                following = network(**inputs).logits[:, -1].argmax(-1, keepdim=True)
            if following.item() == tokenizer.eos_token_id:
                break
            inputs["input_ids"] = torch.cat([inputs["input_ids"], following], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        tokens = inputs["input_ids"][:, start:]
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


@pytest.mark.parametrize(("name", "prompt"), [
    ("blip", None), ("blip", "a photo of"), ("git", None), ("git", "a photo of"), ("blip2", None),
    ("blip2", "a photo of"), ("llava", None), ("llava", "describe the sky"), ("encoder-decoder", None),
])
def test_captions_are_those_of_the_model(folders, pictures, name, prompt):
    captioner = load_captioner(folders / name, prompt=prompt, batch_size=2, max_new_tokens=6)
    texts = captioner(pictures)
    assert texts == [" ".join(expected(name, captioner, image, prompt).split()) for image in pictures]
    assert len(set(texts)) > 1, "pictures must make a difference, or this test shows nothing"
    if name == "blip" and prompt:
        assert all(text.startswith(prompt) for text in texts)


def test_older_llava_folder_without_template(tmp_path, pictures):
    write_llava(tmp_path, chat_template=None)
    captioner = TransformersCaptioner(tmp_path, prompt="describe the sky", max_new_tokens=6)
    with_template = tmp_path / "with"
    with_template.mkdir()
    write_llava(with_template)
    newer = TransformersCaptioner(with_template, prompt="describe the sky", max_new_tokens=6)
    assert captioner(pictures) == newer(pictures)


def counting(captioner, monkeypatch) -> list[int]:
    """Sizes of the batches that the network is given from now on."""
    sizes, generate = [], captioner._generate
    monkeypatch.setattr(captioner, "_generate", lambda batch: sizes.append(len(batch)) or generate(batch))
    return sizes


def test_a_picture_is_captioned_once(folders, pictures, monkeypatch):
    captioner = TransformersCaptioner(folders / "blip", batch_size=2, max_new_tokens=6)
    sizes = counting(captioner, monkeypatch)
    texts = captioner(pictures[[0, 1, 0, 2, 1]])
    assert sizes == [2, 1] and texts[0] == texts[2] and texts[1] == texts[4]
    assert captioner(pictures[[2, 0]]) == [texts[3], texts[0]] and sizes == [2, 1]
    assert captioner(pictures[:1] + 0.3 / 255) == texts[:1] and sizes == [2, 1], "less than an 8-bit level"
    captioner(pictures[:1].flip(3))
    assert sizes == [2, 1, 1]
    captioner(pictures[3:, :1])
    assert sizes == [2, 1, 1, 2], "grey pictures have captions too"


def test_captions_survive_in_a_file(folders, pictures, tmp_path, monkeypatch, caplog):
    path = tmp_path / "kept" / "captions.jsonl"
    texts = TransformersCaptioner(folders / "blip", max_new_tokens=6, cache_file=path)(pictures)
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 5
    with path.open("a") as file:
        file.write('{"key": "torn')  # a writer was killed here

    again = TransformersCaptioner(folders / "blip", max_new_tokens=6, cache_file=path)
    assert "line 6" in caplog.text
    monkeypatch.setattr(captions, "load_pretrained", lambda *args: pytest.fail("the network was loaded"))
    assert again(pictures) == texts
    monkeypatch.undo()
    other = TransformersCaptioner(folders / "blip", prompt="a photo of", max_new_tokens=6, cache_file=path)(pictures)
    assert all(text.startswith("a photo of") for text in other), "another prompt, another caption"
    last = TransformersCaptioner(folders / "blip", prompt="a photo of", max_new_tokens=6, cache_file=path)
    monkeypatch.setattr(captions, "load_pretrained", lambda *args: pytest.fail("the network was loaded"))
    assert last(pictures) == other, "what was written after the torn line is read"


def test_identity_follows_the_files(folders, tmp_path):
    first = shutil.copytree(folders / "blip", tmp_path / "one" / "blip")
    second = shutil.copytree(folders / "blip", tmp_path / "two" / "blip")
    assert TransformersCaptioner(first).identity == TransformersCaptioner(second).identity
    weights = bytearray((second / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (second / "model.safetensors").write_bytes(weights)
    assert TransformersCaptioner(first).identity != TransformersCaptioner(second).identity


def test_out_of_memory_halves_the_batch(folders, pictures, monkeypatch):
    captioner = TransformersCaptioner(folders / "blip", batch_size=4, max_new_tokens=6)
    texts = TransformersCaptioner(folders / "blip", batch_size=1, max_new_tokens=6)(pictures)
    sizes, released, generate = [], [], captioner._generate
    monkeypatch.setattr(captions, "release_cached_memory", lambda: released.append(sys.exc_info()[0]))

    def scarce(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.cuda.OutOfMemoryError("no memory")
        return generate(batch)

    monkeypatch.setattr(captioner, "_generate", scarce)
    assert captioner(pictures) == texts and sizes == [4, 2, 2, 1] and captioner.batch_size == 2
    assert released == [None], "outside the except block, whose traceback holds the failed tensors"

    def nothing(batch):
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(captioner, "_generate", nothing)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        captioner(pictures.flip(3))


def test_precision(folders, pictures):
    captioner = TransformersCaptioner(folders / "llava", dtype=torch.bfloat16, max_new_tokens=6)
    assert len(captioner(pictures[:1])) == 1 and captioner.network.dtype == torch.bfloat16
    assert TransformersCaptioner(folders / "llava").network.dtype == torch.float32


def test_embedded_by_name():
    assert isinstance(load_captioner("embedded"), EmbeddedCaptioner)


def test_wrong_folders_are_named(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*huggingface\.co/llava-hf"):
        load_captioner(tmp_path / "nowhere")
    empty = shutil.copytree(folders / "blip", tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights .*empty"):
        load_captioner(empty)
    BertConfig().save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"'bert' model, which does not write about pictures"):
        load_captioner(tmp_path / "bert")


def test_wrong_arguments_are_refused(folders):
    with pytest.raises(ValueError, match="takes no prompt"):
        TransformersCaptioner(folders / "encoder-decoder", prompt="a photo of")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        TransformersCaptioner(folders / "blip", batch_size=0)
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\)"):
        TransformersCaptioner(folders / "blip")(torch.zeros(1, 4, 8, 8))
