"""Trains InstantIR's Aggregator, stage II: what joins the LQ latent and the preview, on frozen UNet, DCP and Previewer.

    accelerate launch -m fourfold.trainers.train_instantir_aggregator --photographs DIV2K --dino dinov2-large \\
        --sdxl stable-diffusion-xl-base-1.0 --adapter adapter.pt --previewer previewer_lora_weights.bin \\
        --output_dir runs/aggregator --mixed_precision bf16 --gradient_checkpointing True
    python -m fourfold.trainers.train_instantir_aggregator --preset tiny --photographs DIV2K \\
        --start runs/tiny/previewer/checkpoints/step-00001500/export/instantir_tiny.safetensors \\
        --output_dir runs/tiny/instantir

The result lies in <output_dir>/checkpoints/step-*/export: aggregator.safetensors, which InstantIR.load reads; of the
tiny network instantir_tiny.safetensors with all parts. --resume latest continues a stopped training.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..nodes.common.losses import edge_loss
from ..nodes.instantir.losses import diffusion_loss
from .fit import FitResult, option, parse
from .instantir_parts import load_start
from .instantir_study import TINY, InstantIRStudy, InstantIRTraining, Noised, run_training
from .train_dit4sr import with_preset_defaults


@dataclass(frozen=True)
class AggregatorTraining(InstantIRTraining):
    """Training of InstantIR's Aggregator. The defaults are the paper's, for one process (its global batch is 96)."""

    adapter: str | None = option(None, "full size: the DCP's file, published or trained here")
    previewer: str | None = option(None, "full size: the Previewer's LoRA, published or trained here")
    drop_image: float = option(0.15, "probability of losing the DINO condition, 0..1 (paper 0.15)")
    prompted: float = option(0.0, "share of the samples that get their caption, 0..1 (published 0: always empty)")
    alone: float = option(0.0, "share of the samples without the Aggregator, which train a trained base, 0..1 (not in "
                               "the paper); they get their caption, but for the share of drop_image")
    late: float = option(1.0, "density of the timesteps, t^(late - 1): 1 = all equally likely (paper), 3 = mostly "
                              "noisy ones, which a few steps of sampling are at")
    loss_weight: Literal["none", "x0"] = option("none", "weight of the diffusion loss (paper none)")
    l1: float = option(0.0, "share of the absolute error in the loss (not in the paper)")
    edge: float = option(0.0, "share of the error of the decoded picture's edges (not in the paper; tiny preset only)")
    output_dir: str = option("runs/instantir_aggregator", "folder for checkpoints, logs, samples and the final weights")
    max_steps: int = option(200_000, "optimizer steps (paper 200,000)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.edge and self.preset == "full":
            raise ValueError(f"--edge is {self.edge}, but only the tiny codec lets gradients through; leave it at 0.")
        if self.late < 1:
            raise ValueError(f"--late is {self.late}; 1 or more is expected.")
        if self.alone and not self.train_base:
            raise ValueError(f"--alone is {self.alone}, but without --train_base such samples train nothing.")


TINY_AGGREGATOR = TINY | {"train_base": True, "max_steps": 6000, "prompted": 0.5, "alone": 0.15, "late": 3.0,
                          "loss_weight": "x0", "l1": 0.3, "edge": 2.0}


class AggregatorStudy(InstantIRStudy):
    part = "aggregator"

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Diffusion loss through the residuals of the Aggregator, which reads the LQ latent and the preview."""
        config, rows = self.config, len(batch["hr"])
        chances = torch.tensor([config.drop_image, config.alone, config.prompted, config.drop_image])
        null_image, alone, prompted, null_text = torch.rand(4, rows, generator=generator) < chances[:, None]
        features = self.features(batch["lr"], null_image)
        z, z_lq = self.latents(batch["hr"]), self.latents(batch["lr"])
        noised = self.noised(z, self.timesteps(rows, generator, config.late), generator)
        text = self.prompts(batch["caption"], torch.where(alone, null_text, ~prompted))
        empty, sizes = self.prompts([""] * rows), self.time_ids(rows)
        with torch.no_grad():
            tokens = self.model.resample(features)
            preview = self.model.preview(noised.x, noised.t, empty.prompt_embeds, empty.pooled, sizes,
                                         self.model.resample(features, previewer=True))
        down, mid = self.model.aggregate(z_lq, preview, noised.t, empty.pooled, sizes)
        heard = (~alone).to(z.device)[:, None, None, None]
        residuals = [skip * heard.to(skip) for skip in down], mid * heard.to(mid)
        anchor = z_lq * heard.to(z_lq) if self.model.config.anchor == "lr" else None
        output = self.model(noised.x, noised.t, text.prompt_embeds, text.pooled, sizes, tokens, residuals,
                            anchor=anchor)
        return self.loss(output, z, noised, heard), {}

    def loss(self, output: Tensor, z: Tensor, noised: Noised, heard: Tensor) -> Tensor:
        """The diffusion loss and, of the tiny network's restored pictures, that of their edges."""
        config = self.config
        loss = diffusion_loss(output, z, noised.noise, noised.alpha, noised.sigma, self.model.config.prediction,
                              config.loss_weight, config.l1)
        if config.edge:
            restored = self.model.to_clean(output.float(), noised.x, noised.t)
            restored = torch.where(heard, restored, z)  # what is drawn without the LQ picture need not have its edges
            loss = loss + config.edge * edge_loss(self.pixels(restored), self.pixels(z))
        return loss


def build(config: AggregatorTraining) -> AggregatorStudy:
    """A network with DCP and Previewer and a fresh Aggregator, or the one that `--start` has, ready for training."""
    model, parts = load_start(config, ("adapter", "previewer"))
    torch.manual_seed(config.seed)
    if model.aggregator is None:
        model.add_aggregator()
    return AggregatorStudy(config, model, parts)


def train(config: AggregatorTraining) -> FitResult:
    """Trains the Aggregator (see `build` and `fit.fit`)."""
    return run_training(config, build(config))


def main(argv: list[str] | None = None) -> FitResult:
    return train(parse(AggregatorTraining, with_preset_defaults(argv, TINY_AGGREGATOR)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
