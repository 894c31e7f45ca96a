"""Trains DiT4SR: the LR stream on a frozen SD3.5 (the paper), or the whole tiny network from scratch.

    accelerate launch -m fourfold.trainers.train_dit4sr --photographs DIV2K --sd3 stable-diffusion-3.5-medium \\
        --output_dir runs/dit4sr --mixed_precision bf16 --gradient_checkpointing True
    python -m fourfold.trainers.train_dit4sr --preset tiny --photographs DIV2K --output_dir runs/dit4sr_tiny

The result lies in <output_dir>/checkpoints/step-*/export: `transformer/` in the published format (and, for the tiny
network, `text.safetensors`). Continue a stopped training with --resume latest.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..nodes.common.autoencoder import KLAutoencoder, to_model
from ..nodes.common.degradation import DEGRADATIONS
from ..nodes.common.images import resize
from ..nodes.common.text import SD3TextEncoder, TextEmbedding
from ..nodes.common.tiny import load_codec
from ..nodes.common.tiny_text import TinyTextEncoder
from ..nodes.dit4sr.config import PRESETS, Ablations
from ..nodes.dit4sr.losses import LossWeight, add_noise, flow_matching_loss, logit_normal_sigma
from ..nodes.dit4sr.model import TIMESTEPS, DiT4SRTransformer
from .data import Photographs
from .fit import FitConfig, FitResult, fit, option, parse

@dataclass(frozen=True)
class DiT4SRTraining(FitConfig):
    """Training of DiT4SR. The defaults are the paper's, for one process (its global batch is 64)."""

    photographs: str = option("photographs", "folder of clean photographs, searched recursively")
    preset: Literal["full", "tiny"] = option("full", "size of the network")
    sd3: str | None = option(None, "diffusers folder of Stable Diffusion 3.5 medium; needed at full size")
    train_base: bool | None = option(None, "train all weights, not the LR stream alone; None = at tiny size only")
    cache: str | None = option(None, "folder for latents and prompt embeddings, computed once; None = on the fly")
    cached_crops: int = option(100_000, "crops in the cache")

    crop: int = option(512, "pixels, side of the training crops (paper 512)")
    min_scale: float = option(0.5, "photographs are shrunk by a random factor from this to 1 before cropping")
    degradation: str = option("seesr", "settings of the LR pictures (paper: Real-ESRGAN's pipeline as SeeSR sets it)")
    null_prompt: float = option(0.2, "probability of an empty prompt, 0..1 (published 0.2)")
    t5_length: int = option(77, "T5 tokens of a prompt (paper 77)")

    sigma_mean: float = option(0.0, "mean of the logit-normal noise level")
    sigma_std: float = option(1.0, "its standard deviation")
    sigma_shift: float = option(3.0, "shift of the schedule it is looked up in (published 3)")
    loss_weight: LossWeight = option("sigma2", "weight of the velocity loss (published sigma2)")
    l1: float = option(0.0, "share of the absolute error in the loss (not in the paper)")

    lr_integration: bool = option(True, "False = case A of table 3: the LR stream attends only to itself")
    lr_residual: bool = option(True, "False = case B: no LR residual")
    lr_injection: bool = option(True, "False = case C: no LR injection between the MLPs")
    injection_layer: Literal["conv", "linear"] = option("conv", "linear = case D")

    output_dir: str = option("runs/dit4sr", "folder for checkpoints, logs, samples and the final weights")
    learning_rate: float = option(5e-5, "peak learning rate of AdamW (paper 5e-5)")
    max_steps: int = option(150_000, "optimizer steps")
    export_dtype: Literal["float32", "bfloat16", "float16"] = option("bfloat16", "precision of the exported weights")

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
    "sigma_mean": -0.6,
    "sigma_std": 1.2,
    "sigma_shift": 1.0,
    "l1": 0.3,
    "beta2": 0.99,
    "export_dtype": "float16",
}


class DiT4SRStudy(nn.Module):
    """The network with what turns photographs into its inputs; only what is trained requires a gradient."""

    def __init__(self, config: DiT4SRTraining, transformer: DiT4SRTransformer, autoencoder: nn.Module, text: nn.Module):
        super().__init__()
        self.config = config
        self.transformer, self.autoencoder, self.text = transformer, autoencoder, text

    def enable_gradient_checkpointing(self) -> None:
        self.transformer.gradient_checkpointing = True

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Flow-matching loss (section 3.1) of a batch of photographs, or of what `encode` made of them.

        Args:
            batch: `hr` (B, 3, H, W) and `lr` (B, 3, H/4, W/4) in 0..1 and `caption` (B texts); or `latent`,
                `lr_latent`, `prompt_embeds`, `pooled` from the cache.
            generator: of the CPU; all draws come from it.
        """
        config = self.config
        z, z_lr = (batch["latent"], batch["lr_latent"]) if "latent" in batch else self.latents(batch["hr"], batch["lr"])
        sigma = logit_normal_sigma(len(z), generator, config.sigma_mean, config.sigma_std, config.sigma_shift)
        noise = torch.randn(z.shape, generator=generator).to(z)
        null = torch.rand(len(z), generator=generator) < config.null_prompt
        sigma = sigma.to(z.device)
        text = self.prompts(batch, null)
        velocity = self.transformer(
            add_noise(z, noise, sigma), z_lr, sigma * TIMESTEPS, text.prompt_embeds, text.pooled, injection_scale=1.0
        )
        return flow_matching_loss(velocity, z, noise, sigma, config.loss_weight, config.l1)

    @torch.no_grad()
    def latents(self, hr: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled latents of the clean crops and of the LR crops enlarged to their size, float32."""
        network = self.transformer.config
        with torch.autocast(hr.device.type, enabled=False):
            encoded = [self.autoencoder.encode(x) for x in (hr, resize(lr, hr.shape[-2:]))]
        return tuple(to_model(z.float(), network.latent_shift, network.latent_scale) for z in encoded)

    def prompts(self, batch: dict[str, Any], null: Tensor) -> TextEmbedding:
        """The batch's prompts, empty where `null` (B,) says so."""
        if "prompt_embeds" not in batch:
            return self.encode_text(["" if n else c for c, n in zip(batch["caption"], null.tolist(), strict=True)])
        empty, keep = self.encode_text([""]), ~null.to(batch["pooled"].device)
        return TextEmbedding(
            torch.where(keep[:, None, None], batch["prompt_embeds"], empty.prompt_embeds.to(batch["prompt_embeds"])),
            torch.where(keep[:, None], batch["pooled"], empty.pooled.to(batch["pooled"])),
        )

    def encode_text(self, prompts: list[str]) -> TextEmbedding:
        if isinstance(self.text, TinyTextEncoder):
            return self.text.encode(prompts)
        with torch.no_grad():
            return self.text.encode(prompts, t5_length=self.config.t5_length)

    @torch.no_grad()
    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the cache holds of a batch of photographs."""
        z, z_lr = self.latents(batch["hr"], batch["lr"])
        text = self.encode_text(batch["caption"])
        return {"latent": z, "lr_latent": z_lr, "prompt_embeds": text.prompt_embeds, "pooled": text.pooled}

    def save(self, state: dict[str, Tensor], folder: Path, step: int) -> None:
        """Writes `transformer/` in the published format and, where it was trained, `text.safetensors`."""
        summary = {"step": step, "training": asdict(self.config), "dtype": getattr(torch, self.config.export_dtype)}
        self.transformer.save_pretrained(folder / "transformer", _part(state, "transformer."), **summary)
        if isinstance(self.text, TinyTextEncoder):
            self.text.save(folder / "text.safetensors", _part(state, "text."), **summary)


def build(config: DiT4SRTraining) -> DiT4SRStudy:
    """Network, autoencoder and text encoder, ready for a new training."""
    if config.preset == "tiny":
        codec = load_codec()
        network = replace(
            PRESETS["tiny"].network, latent_shift=codec.shift, latent_scale=codec.scale, ablations=config.ablations
        )
        torch.manual_seed(config.seed)
        transformer, text = DiT4SRTransformer(network), TinyTextEncoder()
        transformer.init_from_scratch()
        transformer.requires_grad_(config.trains_base)
        study = DiT4SRStudy(config, transformer, codec, text.requires_grad_(config.trains_base))
    elif config.sd3 is None:
        raise ValueError("--sd3 is missing: the folder of Stable Diffusion 3.5 medium, which the training starts from.")
    else:
        dtype = torch.float32 if config.mixed_precision == "no" else torch.bfloat16
        transformer = DiT4SRTransformer.from_base(Path(config.sd3) / "transformer", config.ablations, dtype)
        transformer.requires_grad_(config.trains_base)
        autoencoder = KLAutoencoder.from_pretrained(config.sd3, dtype)
        text = SD3TextEncoder.from_pretrained(config.sd3, dtype=dtype)
        study = DiT4SRStudy(config, transformer, autoencoder, text.requires_grad_(False))
    for parameter in study.transformer.control_parameters():
        parameter.requires_grad_(True)
    for parameter in study.transformer.unused_parameters():
        parameter.requires_grad_(False)
    return study


def main(argv: list[str] | None = None) -> FitResult:
    config = parse(DiT4SRTraining, with_preset_defaults(argv, TINY))
    study = build(config)
    photographs = Photographs(
        config.photographs, config.crop, DEGRADATIONS[config.degradation], config.seed, min_scale=config.min_scale
    )
    return fit(config, study, photographs, lambda model, batch, draws, _: (model(batch, draws), {}), study.save)


def with_preset_defaults(argv: list[str] | None, tiny: dict[str, Any]) -> list[str]:
    """Command-line arguments with the tiny preset's own defaults put first, where `--preset tiny` is asked for."""
    argv = sys.argv[1:] if argv is None else list(argv)
    chosen = argv[argv.index("--preset") + 1 : argv.index("--preset") + 2] if "--preset" in argv else []
    is_tiny = chosen == ["tiny"] or "--preset=tiny" in argv
    return [f"--{name}={value}" for name, value in tiny.items()] + argv if is_tiny else argv


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
