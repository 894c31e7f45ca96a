"""Captioners: what turns a photograph into a prompt.

A captioner is called with images (B, 3, H, W) in 0..1 and returns B texts. `EmbeddedCaptioner` measures and needs no
weights; `TransformersCaptioner` runs any image-to-text model of transformers from a local folder.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

from .caption_cache import CaptionCache, content_key
from .embedded_captioner import EmbeddedCaptioner, eight_bit, sentence
from .memory import OutOfMemory, release_cached_memory
from .pretrained import load_pretrained, require_model_folder

__all__ = ["DESCRIBE", "EmbeddedCaptioner", "TransformersCaptioner", "load_captioner", "sentence"]

log = logging.getLogger(__name__)

PAGE = "https://huggingface.co/llava-hf/llava-1.5-7b-hf (or of another image-to-text model, e.g. " \
       "https://huggingface.co/Salesforce/blip-image-captioning-large)"
# not in the papers: what a model that takes instructions is asked; DreamSR and DiT4SR name LLaVA, not the question
DESCRIBE = "Describe this photograph in two or three sentences: subject, materials, textures, colours and light."
_TEMPLATES = {"llava": "USER: <image>\n{prompt} ASSISTANT:"}  # of models whose older folders hold no chat template
_SMALL = 1 << 24  # bytes; files up to this size take part in a captioner's identity with their content


def load_captioner(name_or_folder: str | Path, **options) -> EmbeddedCaptioner | TransformersCaptioner:
    """The captioner called "embedded", or the image-to-text model in a local folder.

    Args:
        options: of `TransformersCaptioner`.
    Raises: FileNotFoundError if there is no model in the folder.
    """
    if str(name_or_folder) == "embedded":
        return EmbeddedCaptioner()
    return TransformersCaptioner(name_or_folder, **options)


class TransformersCaptioner:
    """Captions by an image-to-text model of transformers: LLaVA and others that chat, BLIP, BLIP-2, GIT, ViT-GPT2 ...

    The network is loaded when the first picture has to be described, never downloaded, and decodes greedily, so that
    a picture always gets the same caption. Captions are kept by content.

    Attributes:
        identity: what the captions depend on beside the picture; part of the key under which they are kept.
    """

    def __init__(self, folder: str | Path, prompt: str | None = None, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None, batch_size: int = 4, max_new_tokens: int = 128,
                 cache_file: str | Path | None = None):
        """
        Args:
            folder: local folder as downloaded from its page: config.json, weights, processor and tokenizer.
            prompt: the question for models that chat (None: `DESCRIBE`); for others, the caption's beginning or what
                the model's page says (None: nothing).
            device: where the network is put when it is loaded; None = CPU. Later it runs wherever it is moved.
            dtype: None = float32 on the CPU (28 GB for LLaVA 1.5 7B), elsewhere as stored.
            batch_size: pictures a call of the network; halved when memory does not suffice.
            max_new_tokens: length at which captions are cut, in tokens.
            cache_file: JSON-lines file that keeps the captions between runs; None = memory only.
        Raises: FileNotFoundError that names folder and page; ValueError if the folder holds another kind of model.
        """
        if batch_size < 1 or max_new_tokens < 1:
            raise ValueError("batch_size and max_new_tokens must be at least 1, got "
                             f"{batch_size} and {max_new_tokens}.")
        self.folder = require_model_folder(folder, "the captioner", PAGE)
        self.config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        self._model_class = _model_class(self.config, self.folder)
        self.prompt, self.batch_size, self.max_new_tokens = prompt, batch_size, max_new_tokens
        self._device = torch.device(device or "cpu")
        self._dtype = torch.float32 if dtype is None and self._device.type == "cpu" else dtype
        self._network: nn.Module | None = None
        self._processor, self._tokenizer = _load_processor(self.folder)
        self._text = self._prompt_text()
        self._cache = CaptionCache(cache_file)
        self.identity = f"{_fingerprint(self.folder)} {max_new_tokens} {self._dtype} {self._text!r}"

    @property
    def network(self) -> nn.Module:
        """The model, loaded at the first use; move it to run it elsewhere."""
        if self._network is None:
            log.info("loading the captioner %s", self.folder)
            self._network = load_pretrained(self._model_class, self.folder, self._dtype).to(self._device)
        return self._network

    def __call__(self, images: Tensor) -> list[str]:
        """Caption of each image.

        Args:
            images: (B, 3, H, W) or (B, 1, H, W) in 0..1.
        Returns: B texts on one line each.
        Raises: ValueError for another shape or for NaN; torch.OutOfMemoryError if not even one picture fits.
        """
        pictures = list(eight_bit(images).permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy())
        keys = [content_key(picture, self.identity) for picture in pictures]
        new = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in self._cache}
        while new:
            batch, captions = dict(list(new.items())[:self.batch_size]), None
            try:
                captions = self._generate(list(batch.values()))
            except OutOfMemory:
                if len(batch) == 1:
                    raise
            if captions is None:
                self.batch_size = len(batch) // 2
                release_cached_memory()
                log.warning("out of memory: captioning %d pictures at a time from now on.", self.batch_size)
                continue
            self._cache.update(dict(zip(batch, captions, strict=True)))
            new = {key: picture for key, picture in new.items() if key not in batch}
        return [self._cache[key] for key in keys]

    @torch.no_grad()
    def _generate(self, pictures: list[np.ndarray]) -> list[str]:
        network = self.network
        inputs = self._inputs([Image.fromarray(picture) for picture in pictures])
        parameter = next(network.parameters())
        inputs = {name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
                  for name, value in inputs.items()}
        tokens = network.generate(**inputs, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
                                  max_new_tokens=self.max_new_tokens)
        prompt = inputs.get("input_ids")
        if prompt is not None and torch.equal(tokens[:, :prompt.shape[1]], prompt):
            tokens = tokens[:, prompt.shape[1]:]  # decoders alone repeat the question before they answer
        return [" ".join(text.split()) for text in self._tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _inputs(self, pictures: list[Image.Image]) -> dict[str, Tensor]:
        """What the network's `generate` takes for these pictures and the prompt."""
        if self._text is None:
            return dict(self._processor(images=pictures, return_tensors="pt"))
        inputs = dict(self._processor(images=pictures, text=[self._text] * len(pictures), return_tensors="pt",
                                      padding=True))
        if "token_type_ids" not in inspect.signature(self.network.forward).parameters:
            inputs.pop("token_type_ids", None)  # some tokenizers write them for models that do not read them
        if self.config.model_type == "git":  # it continues the text, so the text must not be closed
            inputs |= {name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")}
        return inputs

    def _prompt_text(self) -> str | None:
        """The prompt as the model was trained to see it; None if it is shown pictures only."""
        template = getattr(self._processor, "chat_template", None) or getattr(self._tokenizer, "chat_template", None)
        if template:
            content = [{"type": "image"}, {"type": "text", "text": self.prompt or DESCRIBE}]
            return self._processor.apply_chat_template([{"role": "user", "content": content}], chat_template=template,
                                                       add_generation_prompt=True, tokenize=False)
        if self.config.model_type in _TEMPLATES:
            return _TEMPLATES[self.config.model_type].format(prompt=self.prompt or DESCRIBE)
        if self.prompt and not hasattr(self._processor, "tokenizer"):
            raise ValueError(f"the captioner in {self.folder} ({self.config.model_type}) takes no prompt, got "
                             f"{self.prompt!r}; leave the prompt empty or choose another model.")
        if getattr(self._processor, "num_query_tokens", None):  # BLIP-2: the text also holds the places of the picture
            return self.prompt or ""
        return self.prompt or None


def _model_class(config, folder: Path) -> type:
    """The class of transformers that writes text about pictures with this config, under its old or its new name."""
    for mapping, auto in (("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "AutoModelForImageTextToText"),
                          ("MODEL_FOR_VISION_2_SEQ_MAPPING", "AutoModelForVision2Seq")):
        if type(config) in getattr(transformers, mapping, ()):
            return getattr(transformers, auto)
    raise ValueError(f"{folder} holds a {config.model_type!r} model, which does not write about pictures (as far as "
                     f"transformers {transformers.__version__} knows); download an image-to-text model from {PAGE}.")


def _load_processor(folder: Path):
    """(processor or image processor, tokenizer) of the folder."""
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:  # an encoder-decoder put together from two models has no processor of its own
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # answers begin where the prompts end
    return processor, tokenizer


def _fingerprint(folder: Path) -> str:
    """16 hexadecimal digits that change with any file of the folder: small files by content, weights by size."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        if size <= _SMALL:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
