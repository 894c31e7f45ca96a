"""The networks that an InstantIR training starts from, at both sizes."""

from __future__ import annotations

from pathlib import Path

import torch

from ..nodes.common.codec import LinearCodec
from ..nodes.common.sdxl_text import SDXLTextEncoder
from ..nodes.common.sdxl_vae import read_sdxl_vae
from ..nodes.common.tiny import tiny_checkpoint
from ..nodes.common.tiny_text import TinyTextEncoder
from ..nodes.common.vision import PAGE as DINO_PAGE
from ..nodes.common.vision import VisionEncoder
from ..nodes.instantir.model import InstantIR
from .instantir_study import InstantIRTraining, Parts


def tiny_parts(config: InstantIRTraining, vision: bool = True) -> Parts:
    """The tiny family's codec, text encoder and, if wanted, vision encoder: the given files or the shipped ones."""
    files = {part: Path(getattr(config, part) or tiny_checkpoint(part))
             for part in ("codec", "text", "vision") if vision or part != "vision"}
    return Parts(LinearCodec.load(files["codec"]), TinyTextEncoder.load(files["text"]),
                 VisionEncoder.from_pretrained(files["vision"]) if vision else None, files)


def load_start(config: InstantIRTraining, needed: tuple[str, ...] = ()) -> tuple[InstantIR, Parts]:
    """What a training starts from: the tiny file and family, or SDXL, DINOv2 and files of the trainings before.

    Args:
        needed: parts of InstantIR that must be there already: "adapter", "previewer", "aggregator". At full size the
            config has a field of that name for each.
    Raises: ValueError that says which option is missing or which part the file lacks.
    """
    if config.preset == "tiny":
        if config.start is None:
            raise ValueError("--start is missing: the file that the training before this one exported.")
        model = InstantIR.from_pretrained(config.start)
        there = {"adapter": model.resampler, "previewer": model.switch, "aggregator": model.aggregator}
        if lacking := [part for part in needed if there[part] is None]:
            raise ValueError(f"--start {config.start} has no {' and no '.join(lacking)}: give the export of the "
                             "training that comes before this one (base, DCP, Previewer, Aggregator).")
        return model, tiny_parts(config)
    asked = {"sdxl": "the diffusers folder of Stable Diffusion XL, or its checkpoint",
             "dino": f"the folder of {DINO_PAGE}",
             **{part: f"the {part}'s file, published or trained here" for part in needed}}
    for name, what in asked.items():
        if getattr(config, name) is None:
            raise ValueError(f"--{name} is missing: {what}.")
    dtype = torch.float32 if config.mixed_precision == "no" else torch.bfloat16
    files = {"previewer_lora" if part == "previewer" else part: getattr(config, part) for part in needed}
    model = InstantIR.load(unet=config.sdxl, **files, dtype=dtype)
    parts = Parts(read_sdxl_vae(config.sdxl, dtype), SDXLTextEncoder.from_pretrained(config.sdxl, dtype),
                  VisionEncoder.from_pretrained(config.dino, dtype))
    for part in parts[:3]:
        part.requires_grad_(False)
    return model, parts
