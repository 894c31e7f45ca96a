"""Trains InstantIR's Previewer, stage I: a LoRA on the UNet and the DCP by consistency distillation.

    accelerate launch -m fourfold.trainers.train_instantir_previewer --photographs JourneyDB \\
        --sdxl stable-diffusion-xl-base-1.0 --dino dinov2-large --adapter runs/dcp/.../export/adapter.safetensors \\
        --output_dir runs/previewer --mixed_precision bf16 --gradient_checkpointing True
    python -m fourfold.trainers.train_instantir_previewer --preset tiny --photographs DIV2K \\
        --start runs/tiny/dcp/checkpoints/step-00003000/export/instantir_tiny.safetensors \\
        --output_dir runs/tiny/previewer

The result lies in <output_dir>/checkpoints/step-*/export: previewer.safetensors, a LoRA under diffusers' names; of the
tiny network instantir_tiny.safetensors with all parts so far. --resume latest continues a stopped training.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nodes.common.images import resize
from ..nodes.common.text import TextEmbedding
from ..nodes.instantir.config import PRESETS, PreviewerConfig
from ..nodes.instantir.losses import distilled_timesteps, guided_step, pseudo_huber
from .fit import FitResult, option, parse
from .instantir_parts import load_start
from .instantir_study import TINY, InstantIRStudy, InstantIRTraining, Noised, run_training, stacked
from .order import generator_of
from .train_dit4sr import with_preset_defaults

SAMPLE_TIMESTEP = 799  # of the latents that the Previewer is shown on the way


@dataclass(frozen=True)
class PreviewerTraining(InstantIRTraining):
    """Training of InstantIR's Previewer. The defaults are the published ones, for one process (global batch 256)."""

    adapter: str | None = option(None, "full size: the DCP's file, published or trained here")
    lowest_guidance: float = option(3.0, "w of the teacher, c + w (c - u), is uniform from this (published 3)")
    highest_guidance: float = option(15.0, "to this (published 15)")
    huber_c: float = option(0.001, "c of the pseudo-Huber distance (published 0.001)")
    clean: float = option(0.0, "share of the preview's distance to the clean latent itself in the loss (not in the "
                               "paper: it keeps a short training from agreeing on a blur)")
    output_dir: str = option("runs/instantir_previewer", "folder for checkpoints, logs, samples and the final weights")
    max_steps: int = option(30_000, "optimizer steps (paper 30,000)")


# not in the paper: the tiny network is sampled with a guidance near 1, and so it is distilled
TINY_PREVIEWER = TINY | {"max_steps": 1500, "lowest_guidance": 0.0, "highest_guidance": 1.0, "clean": 1.0}


class PreviewerStudy(InstantIRStudy):
    part = "previewer"

    def train(self, mode: bool = True) -> PreviewerStudy:
        """As the study's; while it trains the LoRA stays on, so that backward passes may run layers again."""
        super().train(mode)
        self.model.switch.turn(mode)
        return self

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Distance of the previews of z_s and of the teacher's next latent z_t (equation 5)."""
        rows, c = len(batch["hr"]), self.config.huber_c
        z = self.latents(batch["hr"])
        s, t = distilled_timesteps(rows, generator, self.model.config.train_timesteps)
        at_s = self.noised(z, s, generator)
        w = torch.rand(rows, generator=generator)
        w = self.config.lowest_guidance + (self.config.highest_guidance - self.config.lowest_guidance) * w
        features, empty = self.features(batch["lr"]), self.prompts([""] * rows)
        x_t = self.teach(at_s, t.to(s.device), w, batch, features, empty)
        preview = self.preview(at_s.x, at_s.t, features, empty)
        with torch.no_grad():
            target = self.preview(x_t, t.to(x_t.device), features, empty)
        distance, error = pseudo_huber(preview, target, c), pseudo_huber(preview, z, c)
        loss = distance + self.config.clean * error if self.config.clean else distance
        return loss, {"distance": distance.item(), "error": error.item()}

    @torch.no_grad()
    def teach(self, at_s: Noised, t: Tensor, w: Tensor, batch: dict[str, Any], features: Tensor,
              empty: TextEmbedding) -> Tensor:
        """One guided DDIM step of the base with its DCP from s to t; its negative: no prompt, the all-zero picture."""
        rows = len(features)
        sides = (self.prompts(batch["caption"]), features), (empty, self.vision.null_features(rows))
        clean = []
        with self.model.previewing(False):
            for text, seen in sides:
                output = self.model(at_s.x, at_s.t, text.prompt_embeds, text.pooled, self.time_ids(rows),
                                    self.model.resample(seen))
                clean.append(self.model.to_clean(output, at_s.x, at_s.t))
        at_t = self.model.schedule.alpha_sigma(t.to(at_s.x.device))
        return guided_step(at_s.x, *clean, w.to(at_s.x.device), (at_s.alpha, at_s.sigma), at_t)

    def preview(self, x: Tensor, t: Tensor, features: Tensor, empty: TextEmbedding) -> Tensor:
        """The Previewer's clean latent: it sees the picture's tokens, by its own resampler, and an empty prompt."""
        tokens = self.model.resample(features, previewer=True)
        return self.model.preview(x, t, empty.prompt_embeds, empty.pooled, self.time_ids(len(x)), tokens)

    @torch.no_grad()
    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """Sheets LR | preview of the clean latent noised to a late timestep | clean."""
        hr, lr, _ = stacked(self.samples, self.model.device)
        noised = self.noised(self.latents(hr), torch.full((len(hr),), SAMPLE_TIMESTEP), generator_of("samples"))
        with self.mixed():
            preview = self.preview(noised.x, noised.t, self.features(lr), self.prompts([""] * len(hr)))
        shown = resize(lr, hr.shape[-2:]), self.pixels(preview), hr
        return self.write_sheets(folder, step, [picture.cpu() for picture in shown])


def build(config: PreviewerTraining, previewer: PreviewerConfig | None = None) -> PreviewerStudy:
    """A base with its DCP and a fresh LoRA over both, or the one that `--start` has, ready for training.

    Args:
        previewer: rank and alpha; None = the preset's.
    """
    model, parts = load_start(config, ("adapter",))
    torch.manual_seed(config.seed)
    if model.switch is None:
        model.add_previewer(previewer or PRESETS[config.preset].network.previewer)
    return PreviewerStudy(config, model, parts)


def train(config: PreviewerTraining, previewer: PreviewerConfig | None = None) -> FitResult:
    """Trains the Previewer (see `build` and `fit.fit`)."""
    return run_training(config, build(config, previewer))


def main(argv: list[str] | None = None) -> FitResult:
    return train(parse(PreviewerTraining, with_preset_defaults(argv, TINY_PREVIEWER)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
