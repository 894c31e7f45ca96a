"""Trains the tiny family's base for InstantIR: SDXL's UNet, very small, drawing photographs from captions.

    python -m fourfold.trainers.train_tiny_sdxl --photographs DIV2K --output_dir runs/tiny/sdxl

The result is <output_dir>/checkpoints/step-*/export/base.safetensors, which the training of the DCP starts from.
--resume latest continues a stopped training.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..nodes.common.sampling import cpu_noise, guidance_mix
from ..nodes.common.schedulers import make_scheduler
from ..nodes.common.tiny import FILES
from ..nodes.instantir.config import PRESETS, InstantIRConfig
from ..nodes.instantir.losses import diffusion_loss
from ..nodes.instantir.model import InstantIR
from .fit import FitResult, option, parse
from .instantir_parts import tiny_parts
from .instantir_study import TINY, InstantIRStudy, InstantIRTraining, run_training, stacked

SAMPLE_STEPS, SAMPLE_GUIDANCE = 25, 3.0  # DDIM, of the pictures that are drawn on the way


@dataclass(frozen=True)
class TinySDXLTraining(InstantIRTraining):
    """Training of the tiny family's text-to-image base."""

    preset: Literal["tiny"] = option("tiny", "the base at full size is SDXL itself")
    start: str | None = option(None, "an earlier base to go on from; None = random weights")
    null_prompt: float = option(0.12, "probability of an empty prompt, 0..1")
    train_text: bool = option(False, "train the text encoder, too (it is then exported beside the base)")
    output_dir: str = option("runs/tiny/sdxl", "folder for checkpoints, logs, samples and the final weights")
    max_steps: int = option(5000, "optimizer steps")


class BaseStudy(InstantIRStudy):
    part, file = "unet", "base.safetensors"

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Diffusion loss of photographs under their captions; every timestep alike."""
        rows = len(batch["hr"])
        z = self.latents(batch["hr"])
        noised = self.noised(z, self.timesteps(rows, generator), generator)
        text = self.prompts(batch["caption"], torch.rand(rows, generator=generator) < self.config.null_prompt)
        output = self.model(noised.x, noised.t, text.prompt_embeds, text.pooled, self.time_ids(rows))
        loss = diffusion_loss(output, z, noised.noise, noised.alpha, noised.sigma, self.model.config.prediction)
        return loss, {}

    def save(self, state: Mapping[str, Tensor], folder: Path, step: int) -> None:
        super().save(state, folder, step)  # with the text encoder that it started from
        if self.config.train_text:
            weights = {name: state[f"text.{name}"] for name in self.text.export_state()}
            self.text.save(folder / FILES["text"], weights, **self.described(step))

    @torch.no_grad()
    def sample(self, folder: Path, step: int) -> None:
        """Draws pictures from noise and the captions of the samples: sheets photograph | drawn."""
        network = self.model.config
        scheduler = make_scheduler("ddim", SAMPLE_STEPS, network.beta_start, network.beta_end, network.train_timesteps)
        hr, _, captions = stacked(self.samples, self.model.device)
        text, null = self.prompts(captions), self.prompts([""] * len(captions))
        x = cpu_noise(0, self.latents(hr).shape).to(hr)
        for t in scheduler.timesteps:
            eps = [self.model.denoise(x, t, p.prompt_embeds, p.pooled, self.time_ids(len(x))) for p in (text, null)]
            x = scheduler.step(guidance_mix(*eps, SAMPLE_GUIDANCE), t, x).prev_sample
        self.write_sheets(folder, step, [hr.cpu(), self.pixels(x).cpu()])


def build(config: TinySDXLTraining, network: InstantIRConfig | None = None) -> BaseStudy:
    """The base with random weights, or those of `--start`, ready for training.

    Args:
        network: sizes of a new network; None = the tiny preset's.
    """
    parts = tiny_parts(config, vision=False)
    parts.text.requires_grad_(config.train_text)
    if config.start:
        return BaseStudy(config, InstantIR.from_pretrained(config.start), parts)
    codec, network = parts.autoencoder, network or PRESETS["tiny"].network
    network = replace(network, resampler=None, previewer=None, aggregator=False, downscale=codec.downscale,
                      latent_shift=codec.shift, latent_scale=codec.scale)
    torch.manual_seed(config.seed)
    return BaseStudy(config, InstantIR(network), parts)


def train(config: TinySDXLTraining, network: InstantIRConfig | None = None) -> FitResult:
    """Trains the base (see `build` and `fit.fit`)."""
    return run_training(config, build(config, network))


def main(argv: list[str] | None = None) -> FitResult:
    defaults = [f"--{name}={value}" for name, value in TINY.items()]
    return train(parse(TinySDXLTraining, defaults + (sys.argv[1:] if argv is None else list(argv))))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
