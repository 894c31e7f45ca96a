"""Trains the tiny family's vision encoder without labels: a small DINOv2 that sees through degradation.

    python -m fourfold.trainers.train_tiny_vision --photographs DIV2K --output_dir runs/tiny/vision

The result is <output_dir>/checkpoints/step-*/export/vision.safetensors. --resume latest continues a stopped training.
"""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from ..nodes.common.degradation import DEGRADATIONS, degrade
from ..nodes.common.images import resize, write_image
from ..nodes.common.tiny import FILES
from ..nodes.common.vision import Preprocessing, VisionEncoder
from .data import Photographs
from .fit import FitConfig, FitResult, fit, option, parse
from .order import generator_of, seed_of
from .self_distillation import PrototypeHead, block_mask, cross_entropy, koleo, sinkhorn

HELD_OUT = 10**12  # index of the first sample picture's crop: far beyond those that are trained on
SCALES = (4, 4, 2, 1)  # equally likely: how much smaller the poor view is taken before it is enlarged again


@dataclass(frozen=True)
class TinyVisionTraining(FitConfig):
    """Training of the tiny vision encoder."""

    photographs: str = option("photographs", "folder of clean photographs, searched recursively")
    crop: int = option(128, "pixels, side of the picture that the network sees")
    patch: int = option(8, "pixels, side of a patch")
    width: int = option(128, "channels of a token")
    layers: int = option(5, "transformer layers")
    heads: int = option(4, "attention heads")
    min_scale: float = option(0.4, "photographs are shrunk by a random factor from this to 1 before cropping")
    degradation: str = option("seesr", "settings of the poor views")
    clean: float = option(0.15, "share of the student's views that are clean, 0..1")
    masked: float = option(0.5, "share of the student's views with a rectangle hidden, 0..1 (iBOT 0.5)")
    prototypes: int = option(256, "prototypes of the class token, and as many of the patches")
    momentum: float = option(0.994, "of the teacher, the student's moving average (DINO 0.996)")
    teacher_temperature: float = option(0.05, "sharpness of the teacher's assignments (DINO 0.04 to 0.07)")
    student_temperature: float = option(0.1, "sharpness of the student's (DINO 0.1)")
    patch_weight: float = option(1.0, "of the patches' loss beside the class token's (iBOT 1)")
    koleo: float = option(0.1, "weight of the KoLeo regulariser (DINOv2 0.1)")
    samples: int = option(64, "crops that are told apart, and eight of them drawn, every --sample_every steps")

    output_dir: str = option("runs/tiny/vision", "folder for checkpoints, logs, samples and the final weights")
    max_steps: int = option(12_000, "optimizer steps")
    batch_size: int = option(32, "samples a micro step and process; assignments are balanced among these")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    weight_decay: float = option(0.04, "AdamW (DINO 0.04)")
    warmup_steps: int = option(300, "steps over which the learning rate rises linearly from 0")
    schedule: Literal["constant", "cosine"] = option("cosine", "learning rate after the warm-up")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("bf16", "autocast; fp16 needs a GPU")


class Views:
    """Endless stream of pairs: `hr` (3, crop, crop) clean, `view` the same made poor and enlarged again; 0..1."""

    def __init__(self, config: TinyVisionTraining):
        self.config, self.degradation = config, DEGRADATIONS[config.degradation]
        self.photographs = Photographs(config.photographs, config.crop, None, config.seed, captions=False,
                                       min_scale=config.min_scale)

    def __getitem__(self, index: int) -> dict[str, Any]:
        hr, seed = self.photographs[index]["hr"], self.config.seed
        draws = generator_of(seed, "view", index)
        scale = SCALES[int(torch.randint(len(SCALES), (), generator=draws))]
        clean = float(torch.rand((), generator=draws)) < self.config.clean
        poor = hr[None] if clean else degrade(hr[None], self.degradation, seed_of(seed, "degradation", index), scale)
        return {"hr": hr, "view": resize(poor, hr.shape[-2:])[0], "index": index}


class VisionStudy(nn.Module):
    """Student, teacher and their heads. The teacher is no trained parameter: the training carries it along."""

    def __init__(self, config: TinyVisionTraining):
        super().__init__()
        self.config = config
        torch.manual_seed(config.seed)
        network = {"image_size": config.crop, "patch_size": config.patch, "hidden_size": config.width,
                   "num_hidden_layers": config.layers, "num_attention_heads": config.heads, "mlp_ratio": 4}
        encoder = VisionEncoder.new(network, Preprocessing(resize=config.crop, crop=config.crop))
        encoder.network.set_attn_implementation("eager")  # faster than the fused one on a CPU, forward and back
        nn.init.trunc_normal_(encoder.network.embeddings.position_embeddings, std=0.02)
        self.student = nn.ModuleDict({"encoder": encoder, "of_class": PrototypeHead(config.width, config.prototypes),
                                      "of_patch": PrototypeHead(config.width, config.prototypes)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.samples: list[dict[str, Any]] = []
        self._followed = -1

    def carried_state(self) -> dict[str, Tensor]:
        """What the training changes beside its parameters (see `fit.fit`)."""
        return dict(self.teacher.named_parameters())

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """teacher <- m teacher + (1 - m) student, once an optimizer step."""
        if step != self._followed:
            own, followed = list(self.student.parameters()), list(self.teacher.parameters())
            torch._foreach_lerp_(followed, [p.detach() for p in own], 1 - self.config.momentum)
            self._followed = step

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator, step: int) -> tuple[Tensor, dict]:
        """Loss of a batch of views, and what tells a collapse: see the numbers' names below."""
        config, encoder, teacher = self.config, self.student["encoder"], self.teacher["encoder"]
        self.follow(step)
        grid = (config.crop // config.patch,) * 2
        mask = block_mask(len(batch["hr"]), grid, config.masked, 0.1, 0.5, generator).to(batch["hr"].device)
        with torch.no_grad():
            taught = teacher(batch["hr"])
            class_targets = sinkhorn(self.teacher["of_class"](taught[:, 0]), config.teacher_temperature)
            patch_targets = sinkhorn(self.teacher["of_patch"](taught[:, 1:].flatten(0, 1)), config.teacher_temperature)
        network = encoder.network
        seen = network(pixel_values=encoder.normalise(batch["view"]), bool_masked_pos=mask).last_hidden_state
        of_class, of_patch = self.student["of_class"](seen[:, 0]), self.student["of_patch"](seen[:, 1:].flatten(0, 1))
        class_loss = cross_entropy(class_targets, of_class, config.student_temperature).mean()
        patch_loss = cross_entropy(patch_targets, of_patch, config.student_temperature).mean()
        loss = class_loss + config.patch_weight * patch_loss + config.koleo * koleo(seen[:, 0])
        with torch.no_grad():
            agreement = cosine_similarity(seen[:, 1:].float(), taught[:, 1:].float(), dim=-1)[~mask].mean()
            numbers = {"class_loss": class_loss, "patch_loss": patch_loss, "agreement": agreement,
                       "class_spread": _spread(taught[:, 0]), "patch_spread": _spread(taught[:, 1:].flatten(0, 1)),
                       "class_entropy": _entropy(of_class, config.student_temperature),
                       "patch_entropy": _entropy(of_patch, config.student_temperature)}
        return loss, {name: number.item() for name, number in numbers.items()}

    def save(self, state: dict[str, Tensor], folder: Path, step: int) -> None:
        """Writes the student's encoder (its average over the last steps)."""
        prefix = "student.encoder.network."
        weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        settings = {k: v for k, v in asdict(self.config).items() if k not in ("output_dir", "resume")}
        settings["photographs"] = Path(self.config.photographs).name
        self.student["encoder"].save(folder / FILES["vision"], weights, step=step, training=settings,
                                     dtype=torch.float16)

    @torch.no_grad()
    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """Tells the held-out crops apart by their poor views, and draws the first three components of the patches.

        Returns: `found`, the share of poor views whose nearest class token among the clean crops is their own crop's.
        """
        encoder = self.student["encoder"]
        clean, poor = (torch.stack([item[name] for item in self.samples]) for name in ("hr", "view"))
        tokens = [encoder.encode(pictures) for pictures in (clean, poor)]
        points = [normalize(t[:, 0].float(), dim=-1) for t in tokens]
        nearest = (points[1] @ points[0].T).argmax(dim=1).cpu()
        patches = torch.cat([t[:8, 1:].float() for t in tokens])
        _, _, axes = torch.pca_lowrank(patches.flatten(0, 1), q=3)
        colours = (patches - patches.mean(dim=(0, 1))) @ axes
        colours = (0.5 + colours / (4 * colours.std(dim=(0, 1)))).clamp(0, 1).cpu()
        side = self.config.crop // self.config.patch
        maps = resize(colours.transpose(1, 2).unflatten(2, (side, side)), clean.shape[-2:])
        count = len(maps) // 2
        rows = [torch.cat(list(row), dim=-1) for row in (clean[:count], maps[:count], poor[:count], maps[count:])]
        write_image(folder / f"step-{step:08d}.png", torch.cat(rows, dim=-2)[None], {"step": str(step)})
        return {"found": float((nearest == torch.arange(len(nearest))).float().mean())}


def _spread(tokens: Tensor) -> Tensor:
    """How far the normalised tokens (N, C) lie from their mean: 0 = collapsed, 1 = in all directions."""
    return normalize(tokens.float(), dim=-1).std(dim=0, correction=0).square().sum().sqrt()


def _entropy(scores: Tensor, temperature: float) -> Tensor:
    """Entropy of the mean assignment (N, K), as a share of the highest: 0 = one prototype takes all, 1 = all alike."""
    mean = (scores / temperature).softmax(dim=-1).mean(dim=0)
    return -(mean * mean.clamp(min=1e-12).log()).sum() / math.log(len(mean))


def train(config: TinyVisionTraining) -> FitResult:
    """Trains the encoder from nothing (see `fit.fit`)."""
    study, views = VisionStudy(config), Views(config)
    if config.sample_every:
        study.samples = [views[HELD_OUT + i] for i in range(config.samples)]
    return fit(config, study, views, lambda model, *rest: model(*rest), study.save, VisionStudy.sample)


def main(argv: list[str] | None = None) -> FitResult:
    return train(parse(TinyVisionTraining, argv))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
