"""Trains InstantIR's DCP, stage I: the resampler and the time-aware cross-attentions on a frozen SDXL and DINOv2.

    accelerate launch -m fourfold.trainers.train_instantir_dcp --photographs JourneyDB --dino dinov2-large \\
        --sdxl stable-diffusion-xl-base-1.0 --output_dir runs/dcp --mixed_precision bf16 --gradient_checkpointing True
    python -m fourfold.trainers.train_instantir_dcp --preset tiny --photographs DIV2K --output_dir runs/tiny/dcp \\
        --start runs/tiny/sdxl/checkpoints/step-00005000/export/base.safetensors

The result lies in <output_dir>/checkpoints/step-*/export: adapter.safetensors, which InstantIR.load reads; of the tiny
network instantir_tiny.safetensors, base and adapter. --resume latest continues a stopped training.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..nodes.instantir.config import PRESETS, ResamplerConfig
from ..nodes.instantir.losses import diffusion_loss, drop_conditions
from .fit import FitResult, option, parse
from .instantir_parts import load_start
from .instantir_study import TINY, InstantIRStudy, InstantIRTraining, run_training
from .train_dit4sr import with_preset_defaults


@dataclass(frozen=True)
class DCPTraining(InstantIRTraining):
    """Training of InstantIR's DCP. The defaults are the paper's, for one process (its global batch is 256)."""

    drop_image: float = option(0.05, "probability of losing the picture, 0..1 (published 0.05; the three exclude "
                                     "each other, paper 0.15 in all)")
    drop_text: float = option(0.05, "probability of losing the prompt, 0..1 (published 0.05)")
    drop_both: float = option(0.05, "probability of losing both, 0..1 (published 0.05)")
    output_dir: str = option("runs/instantir_dcp", "folder for checkpoints, logs, samples and the final weights")
    max_steps: int = option(200_000, "optimizer steps (paper 200,000)")


TINY_DCP = TINY | {"train_base": True, "max_steps": 3000}


class DCPStudy(InstantIRStudy):
    part = "adapter"

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Diffusion loss (equation 1) under the prompt and the tokens of the degraded picture."""
        config, rows = self.config, len(batch["hr"])
        null = drop_conditions(rows, generator, config.drop_image, config.drop_text, config.drop_both)
        z = self.latents(batch["hr"])
        noised = self.noised(z, self.timesteps(rows, generator), generator)
        text = self.prompts(batch["caption"], null[1])
        tokens = self.model.resample(self.features(batch["lr"], null[0]))
        output = self.model(noised.x, noised.t, text.prompt_embeds, text.pooled, self.time_ids(rows), tokens)
        loss = diffusion_loss(output, z, noised.noise, noised.alpha, noised.sigma, self.model.config.prediction)
        return loss, {}


def build(config: DCPTraining, resampler: ResamplerConfig | None = None) -> DCPStudy:
    """A base with a fresh DCP, ready for training.

    Args:
        resampler: sizes; None = the preset's.
    """
    model, parts = load_start(config)
    torch.manual_seed(config.seed)
    model.add_adapter(resampler or PRESETS[config.preset].network.resampler)
    return DCPStudy(config, model, parts)


def train(config: DCPTraining, resampler: ResamplerConfig | None = None) -> FitResult:
    """Trains the DCP (see `build` and `fit.fit`)."""
    return run_training(config, build(config, resampler))


def main(argv: list[str] | None = None) -> FitResult:
    return train(parse(DCPTraining, with_preset_defaults(argv, TINY_DCP)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
