"""Trains DiT4SR: the LR stream on a frozen SD3.5 (the paper), or the whole tiny network from scratch.

    accelerate launch -m fourfold.trainers.train_dit4sr --photographs DIV2K --sd3 stable-diffusion-3.5-medium \\
        --output_dir runs/dit4sr --mixed_precision bf16 --gradient_checkpointing True
    python -m fourfold.trainers.train_dit4sr --preset tiny --photographs DIV2K --output_dir runs/dit4sr_tiny

The result lies in <output_dir>/checkpoints/step-*/export: `transformer/` in the published format (and, for the tiny
network, `text.safetensors` and `codec.safetensors`). Continue a stopped training with --resume latest.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor, nn

from ..nodes.common.autoencoder import KLAutoencoder
from ..nodes.common.checkpoints import load_state, load_strict
from ..nodes.common.codec import LinearCodec
from ..nodes.common.degradation import DEGRADATIONS
from ..nodes.common.memory import release_cached_memory
from ..nodes.common.text import SD3TextEncoder
from ..nodes.common.tiny import FILES, load_codec
from ..nodes.common.tiny_text import TinyTextConfig, TinyTextEncoder
from ..nodes.dit4sr.config import PRESETS, Ablations, DiT4SRConfig
from ..nodes.dit4sr.model import DiT4SRTransformer, find_network
from .cache import CachedItems, fingerprint
from .data import Photographs
from .dit4sr_cache import StoredPrompts, files_identity, fill_crops, open_cache
from .dit4sr_study import DiT4SRStudy
from .fit import FitConfig, FitResult, fit, has_gpu, option, parse

HELD_OUT = 10**12  # index of the first sample picture's crop: far beyond those that are trained on


@dataclass(frozen=True)
class DiT4SRTraining(FitConfig):
    """Training of DiT4SR. The defaults are the paper's, for one process (its global batch is 64)."""

    photographs: str = option("photographs", "folder of clean photographs, searched recursively")
    preset: Literal["full", "tiny"] = option("full", "size of the network")
    sd3: str | None = option(None, "diffusers folder of Stable Diffusion 3.5 medium; needed at full size")
    codec: str | None = option(None, "tiny: the codec's file; None = the shipped one")
    start: str | None = option(None, "tiny: folder that an earlier training exported; layers that it lacks start anew")
    train_base: bool | None = option(None, "train all weights, not the LR stream alone; None = at tiny size only")
    cache: str | None = option(None, "folder for latents and prompt embeddings, computed once (full size: 1.8 MB a "
                                     "crop); None = on the fly")
    cached_crops: int = option(100_000, "crops in the cache, >= 1")
    samples: int = option(4, "pictures drawn every --sample_every steps, as sheets LR | restored | clean")

    crop: int = option(512, "pixels, side of the training crops (paper 512)")
    min_scale: float = option(0.5, "photographs are shrunk by a random factor from this to 1 before cropping")
    degradation: str = option("seesr", "settings of the LR pictures (paper: Real-ESRGAN's pipeline as SeeSR sets it)")
    null_prompt: float = option(0.2, "probability of an empty prompt, 0..1 (published 0.2)")
    t5_length: int = option(77, "T5 tokens of a prompt (paper 77)")

    sigma_mean: float = option(0.0, "mean of the logit-normal noise level")
    sigma_std: float = option(1.0, "its standard deviation")
    sigma_shift: float = option(3.0, "shift of the schedule it is looked up in (published 3)")
    loss_weight: Literal["none", "sigma2"] = option("sigma2", "weight of the velocity loss (published sigma2)")
    l1: float = option(0.0, "share of the absolute error in the loss (not in the paper)")
    edge: float = option(0.0, "share of the error of the decoded picture's edges (not in the paper; tiny preset only)")

    lr_integration: bool = option(True, "False = case A of table 3: the LR stream attends only to itself")
    lr_residual: bool = option(True, "False = case B: no LR residual")
    lr_injection: bool = option(True, "False = case C: no LR injection between the MLPs")
    injection_layer: Literal["conv", "linear"] = option("conv", "linear = case D")

    output_dir: str = option("runs/dit4sr", "folder for checkpoints, logs, samples and the final weights")
    learning_rate: float = option(5e-5, "peak learning rate of AdamW (paper 5e-5)")
    max_steps: int = option(150_000, "optimizer steps")
    export_dtype: Literal["float32", "bfloat16", "float16"] = option("bfloat16", "precision of the exported weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start and self.preset == "full":
            raise ValueError("--start is for the tiny preset; at full size a training goes on with --resume.")
        if self.edge and self.preset == "full":
            raise ValueError(f"--edge is {self.edge}, but only the tiny codec lets gradients through; leave it at 0.")

    @property
    def ablations(self) -> Ablations:
        return Ablations(self.lr_integration, self.lr_residual, self.lr_injection, self.injection_layer)

    @property
    def trains_base(self) -> bool:
        return self.preset == "tiny" if self.train_base is None else self.train_base


TINY = {  # what the tiny family's training changes
    "crop": 128,
    "min_scale": 0.6,
    "batch_size": 8,
    "learning_rate": 6e-4,
    "warmup_steps": 300,
    "schedule": "cosine",
    "mixed_precision": "bf16",
    "max_steps": 12_000,
    "sigma_mean": 0.3,
    "sigma_std": 1.6,
    "sigma_shift": 1.5,
    "l1": 0.3,
    "edge": 2.0,
    "beta2": 0.99,
    "export_dtype": "float16",
}


def build(config: DiT4SRTraining, network: DiT4SRConfig | None = None) -> DiT4SRStudy:
    """Network, autoencoder and text encoder, ready for a new training.

    Args:
        network: sizes of the tiny network; None = the preset's. At full size the base's folder says them.
    """
    if config.preset == "tiny":
        autoencoder = LinearCodec.load(config.codec) if config.codec else load_codec()
        network = replace(
            network or PRESETS["tiny"].network,
            latent_shift=autoencoder.shift,
            latent_scale=autoencoder.scale,
            ablations=config.ablations,
        )
        torch.manual_seed(config.seed)
        transformer, text = DiT4SRTransformer(network), TinyTextEncoder(TinyTextConfig(network.joint_attention_dim))
        transformer.init_from_scratch()
        if config.start:
            start_from(Path(config.start), transformer, text)
        text.requires_grad_(config.trains_base)
    elif config.sd3 is None:
        raise ValueError("--sd3 is missing: the folder of Stable Diffusion 3.5 medium, which the training starts from.")
    else:
        dtype = torch.float32 if config.mixed_precision == "no" else torch.bfloat16
        transformer = DiT4SRTransformer.from_base(config.sd3, config.ablations, dtype)
        autoencoder = KLAutoencoder.from_pretrained(config.sd3, dtype)
        text = None if config.cache else load_text_encoders(config)
    transformer.requires_grad_(config.trains_base)
    for parameter in transformer.control_parameters():
        parameter.requires_grad_(True)
    for parameter in transformer.unused_parameters():
        parameter.requires_grad_(False)
    return DiT4SRStudy(config, transformer, autoencoder, text)


def start_from(folder: Path, transformer: DiT4SRTransformer, text: TinyTextEncoder) -> None:
    """Loads what an earlier tiny training exported; a head that it had none of keeps its first values.

    Raises: FileNotFoundError, MismatchedKeysError.
    """
    earlier = load_state(find_network(folder))
    head = {name: value for name, value in transformer.state_dict().items() if name.startswith("head.")}
    load_strict(transformer, head | earlier, source=folder)
    load_strict(text, load_state(folder / FILES["text"]), source=folder)


def load_text_encoders(config: DiT4SRTraining) -> SD3TextEncoder:
    dtype = torch.float32 if config.mixed_precision == "no" else torch.bfloat16
    return SD3TextEncoder.from_pretrained(config.sd3, dtype=dtype).requires_grad_(False)


def cached(config: DiT4SRTraining, study: DiT4SRStudy, photographs: Photographs) -> CachedItems:
    """The first `cached_crops` crops from the cache, which is filled first where it is not complete.

    At full size the text encoders are loaded for that only; afterwards `study.text` answers from the cache.
    """
    state = PartialState(cpu=config.cpu or not has_gpu())
    settings = {
        "photographs and degradation": photographs.identity(),
        "autoencoder": fingerprint(study.autoencoder),
        "precision": "float32" if config.mixed_precision == "no" else "bfloat16",
    }
    if config.preset == "full":
        encoders = sorted(f for f in Path(config.sd3).iterdir() if f.name.startswith(("text_encoder", "tokenizer")))
        settings |= {"text encoders": files_identity(encoders), "t5_length": str(config.t5_length)}
    else:
        settings |= {"prompt bytes": str(study.text.config.length)}
    cache = open_cache(config.cache, settings)

    def text() -> SD3TextEncoder:
        if study.text is None:
            study.text = load_text_encoders(config).to(state.device)
        return study.text

    def encode(batch: dict[str, Any]) -> dict[str, Tensor]:
        text()
        return study.encode(batch)

    study.autoencoder.to(state.device)
    items = fill_crops(
        cache, photographs, config.cached_crops, encode, state, batch_size=config.batch_size,
        num_workers=config.num_workers,
    )
    if config.preset == "full":
        study.text = StoredPrompts(cache, [("", config.t5_length), *study.sample_prompts()], text, state)
        release_cached_memory()
    return items


def train(config: DiT4SRTraining, network: DiT4SRConfig | None = None) -> FitResult:
    """Builds what `config` asks for and trains it (see `build` and `fit.fit`)."""
    study = build(config, network)
    photographs = Photographs(
        config.photographs, config.crop, DEGRADATIONS[config.degradation], config.seed, min_scale=config.min_scale
    )
    if config.sample_every:
        study.samples = [photographs[HELD_OUT + i] for i in range(config.samples)]
    dataset = cached(config, study, photographs) if config.cache else photographs
    return fit(config, study, dataset, loss_fn, study.save, DiT4SRStudy.sample)


def loss_fn(model: nn.Module, batch: dict[str, Any], draws: torch.Generator, _: int) -> tuple[Tensor, dict]:
    return model(batch, draws), {}


def main(argv: list[str] | None = None) -> FitResult:
    return train(parse(DiT4SRTraining, with_preset_defaults(argv, TINY)))


def with_preset_defaults(argv: list[str] | None, tiny: dict[str, Any]) -> list[str]:
    """Command-line arguments with the tiny preset's own defaults put first, where `--preset tiny` is asked for."""
    argv = sys.argv[1:] if argv is None else list(argv)
    chosen = argv[argv.index("--preset") + 1 : argv.index("--preset") + 2] if "--preset" in argv else []
    is_tiny = chosen == ["tiny"] or "--preset=tiny" in argv
    return [f"--{name}={value}" for name, value in tiny.items()] + argv if is_tiny else argv


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
