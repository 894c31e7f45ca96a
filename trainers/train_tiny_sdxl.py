"""Trains the tiny family's base for InstantIR: SDXL's UNet, very small, drawing photographs from captions.

    python -m fourfold.trainers.train_tiny_sdxl --preset tiny --photographs DIV2K --output_dir runs/tiny/sdxl

The result is <output_dir>/checkpoints/step-*/export/base.safetensors, which the trainings of InstantIR start from.
--resume latest continues a stopped training.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..nodes.common.images import write_image
from ..nodes.common.sampling import cpu_noise, guidance_mix
from ..nodes.common.tiny import FILES
from ..nodes.instantir.config import PRESETS, InstantIRConfig
from ..nodes.instantir.losses import diffusion_loss
from ..nodes.instantir.model import InstantIR
from .data import Photographs
from .fit import FitResult, fit, option, parse
from .instantir_study import HELD_OUT, TINY, InstantIRStudy, InstantIRTraining, part_of, tiny_parts

SAMPLE_STEPS, SAMPLE_GUIDANCE = 25, 3.0  # DDIM, of the pictures that are drawn on the way


@dataclass(frozen=True)
class TinySDXLTraining(InstantIRTraining):
    """Training of the tiny family's text-to-image base."""

    preset: Literal["tiny"] = option("tiny", "the base at full size is SDXL itself")
    null_prompt: float = option(0.12, "probability of an empty prompt, 0..1")
    train_text: bool = option(False, "train the text encoder, too (it is then exported beside the base)")
    output_dir: str = option("runs/tiny/sdxl", "folder for checkpoints, logs, samples and the final weights")
    max_steps: int = option(6000, "optimizer steps")
    samples: int = option(8, "pictures drawn every --sample_every steps")


class BaseStudy(InstantIRStudy):
    file = "base.safetensors"

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """|output - target|^2 over photographs under their captions; every timestep alike (DDPM's simple loss)."""
        z = self.latents(batch["hr"])
        t, noise, x = self.noised(z, generator)
        null = torch.rand(len(z), generator=generator) < self.config.null_prompt
        text = self.prompts(batch["caption"], null)
        output = self.model(x, t, text.prompt_embeds, text.pooled, self.time_ids(batch["hr"]))
        return diffusion_loss(output, z, noise, *self.model.alpha_sigma(t), self.model.config.prediction)

    def save(self, state: dict[str, Tensor], folder: Path, step: int) -> None:
        super().save(state, folder, step)
        if self.config.train_text:
            own = self.text.export_state()
            self.text.save(folder / FILES["text"], {k: v for k, v in part_of(state, "text.").items() if k in own},
                           **self.described(step))

    @torch.no_grad()
    def sample(self, folder: Path, step: int) -> None:
        """Draws pictures from the captions of held-out photographs, beneath these."""
        network, hr = self.model.config, torch.stack([item["hr"] for item in self.samples])
        scheduler = DDIMScheduler(network.train_timesteps, network.beta_start, network.beta_end, "scaled_linear",
                                  clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        scheduler.set_timesteps(SAMPLE_STEPS)
        device = self.model.device
        text, null = (self.text.encode(p) for p in ([item["caption"] for item in self.samples], [""] * len(hr)))
        sizes = self.time_ids(hr).to(device)
        side = self.config.crop // self.autoencoder.downscale
        x = cpu_noise(0, (len(hr), network.unet["in_channels"], side, side)).to(device)
        for t in scheduler.timesteps:
            eps = [self.model.denoise(x, t, p.prompt_embeds, p.pooled, sizes) for p in (text, null)]
            x = scheduler.step(guidance_mix(*eps, SAMPLE_GUIDANCE), t, x).prev_sample
        rows = [torch.cat(list(pictures.cpu()), dim=-1) for pictures in (hr, self.pixels(x))]
        write_image(folder / f"step-{step:08d}.png", torch.cat(rows, dim=-2)[None],
                    {"captions": " | ".join(item["caption"] for item in self.samples)})


def build(config: TinySDXLTraining, network: InstantIRConfig | None = None) -> BaseStudy:
    """The base with random weights, or those of `--start`, ready for training.

    Args:
        network: sizes of a new network; None = the tiny preset's.
    """
    parts = tiny_parts(config, vision=False)
    parts.text.requires_grad_(config.train_text)
    if config.start:
        model = InstantIR.from_pretrained(config.start)
    else:
        codec = parts.autoencoder
        torch.manual_seed(config.seed)
        network = network or PRESETS["tiny"].network
        model = InstantIR(replace(network, resampler=None, previewer=None, aggregator=False,
                                  downscale=codec.downscale, latent_shift=codec.shift, latent_scale=codec.scale))
    model.unet.requires_grad_(True).to(memory_format=torch.channels_last)  # what CPUs convolve fastest
    return BaseStudy(config, model, parts)


def train(config: TinySDXLTraining, network: InstantIRConfig | None = None) -> FitResult:
    """Trains the base (see `build` and `fit.fit`)."""
    study = build(config, network)
    photographs = Photographs(config.photographs, config.crop, None, config.seed, min_scale=config.min_scale)
    if config.sample_every:
        study.samples = [photographs[HELD_OUT + i] for i in range(config.samples)]
    return fit(config, study, photographs, lambda model, batch, draws, _: (model(batch, draws), {}), study.save,
               BaseStudy.sample)


def main(argv: list[str] | None = None) -> FitResult:
    defaults = [f"--{name}={value}" for name, value in TINY.items()]
    return train(parse(TinySDXLTraining, defaults + (sys.argv[1:] if argv is None else list(argv))))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
