"""Linear probing of every block of an InstanceRSR network: which one knows most of the picture's instances (figure 4a)?

    python -m fourfold.trainers.probe_layers --model instancersr.safetensors --base DiT-XL-2-512 --dino dinov2-large \\
        --photographs VALIDATION --instances VALIDATION_instances --output probing
    python -m fourfold.trainers.probe_layers --model tiny --photographs BSDS/val/images --instances BSDS/val/segments

Writes probing.csv and probing.png. Nothing is trained by gradient: the probes are ridge regressions in closed form.

not in the paper: what exactly is probed. Here, of the features of clean pictures and maps under the noise of one late
timestep, which little but the LR picture is seen through,
- DINO: the cosine similarity of DINOv2's patch features and of their linear prediction from a block's tokens, fitted on
  the first half of the crops and measured on the other;
- instances: the share of a picture's tokens whose instance a linear classifier tells right, fitted on half of the
  tokens of the same picture, at random places, and measured on the other half.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import cosine_similarity, one_hot

from ..nodes.common.checkpoints import atomic_path
from ..nodes.common.codec import LinearCodec
from ..nodes.common.degradation import DEGRADATIONS
from ..nodes.common.devices import best_device
from ..nodes.common.images import SHEET_INK, SHEET_PAPER, from_pillow, write_image
from ..nodes.common.tiny import tiny_checkpoint
from ..nodes.common.vision import PAGE as DINO_PAGE
from ..nodes.common.vision import VisionEncoder
from ..nodes.instancersr.restore import load_system
from .config import option, parse
from .instancersr_study import InstanceRSRStudy, InstanceRSRTraining
from .labelled import LabelledPhotographs
from .order import generator_of, to_device

log = logging.getLogger(__name__)
RIDGE = 1e-3  # of the features' mean square
COLOURS = {"dino": (255, 176, 64), "instances": (96, 190, 255)}
WIDTH, HEIGHT = 640, 360  # pixels of the plot
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 34, 40  # pixels around its axes
_MOST_TICKS = 14


@dataclass(frozen=True)
class ProbeConfig:
    """Probes every block of an InstanceRSR network for DINOv2's features and for instances."""

    model: str = option("tiny", '"tiny", or a file or folder that a training exported')
    base: str | None = option(None, "full size: diffusers folder of the DiT, for its VAE; None = beside the model")
    dino: str | None = option(None, "full size: transformers folder of DINOv2; tiny: None = the family's")
    photographs: str = option("photographs", "folder of photographs that were not trained on, searched recursively")
    instances: str | None = option(None, "folder of their label maps; None = PNGs beside the photographs")
    output: str = option("probing", "path of the results without an ending: .csv and .png are written")
    crops: int = option(64, "crops, >= 2; half of them fit the DINO probe")
    crop: int | None = option(None, "pixels, side of the crops; None = 512, or 128 for a tiny network")
    batch_size: int = option(8, "crops at a time, >= 1")
    timestep: int = option(600, "of the noise, 0..999; the higher, the less of the clean picture and map is seen")
    degradation: str = option("real_esrgan", "settings of the LR pictures")
    seed: int = option(0, "of crops, degradations, noise and places")
    device: str | None = option(None, '"cpu", "cuda", ...; None = a GPU where there is one')

    def __post_init__(self) -> None:
        for name, low, high in (("crops", 2, None), ("batch_size", 1, None), ("timestep", 0, 999)):
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                raise ValueError(f"--{name} is {value}, but must be at least {low}" + (f" and at most {high}." if high
                                                                                       else "."))


class Probed(NamedTuple):
    """What a block knows: `dino`, a cosine in -1..1, and `instances`, a share in 0..1."""

    block: int
    dino: float
    instances: float


class RidgeRegression:
    """Linear regression with a constant term, fitted from sums over batches: what is kept does not grow with them."""

    def __init__(self) -> None:
        self.xx: Tensor | None = None
        self.xy: Tensor | None = None
        self.weight: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Takes rows x (N, D) and what they should give, y (N, E), into account."""
        x, y = _with_one(x), y.double()
        self.xx, self.xy = (new if old is None else old + new
                            for old, new in ((self.xx, x.T @ x), (self.xy, x.T @ y)))

    def __call__(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, E)."""
        if self.weight is None:
            penalty = RIDGE * self.xx.diagonal().mean() * torch.eye(len(self.xx)).to(self.xx)
            self.weight = torch.linalg.solve(self.xx + penalty, self.xy)
        return _with_one(x) @ self.weight


def told_right(features: Tensor, instances: Tensor, generator: torch.Generator) -> float:
    """The share of a picture's tokens whose instance a linear classifier tells right (ridge regression on one-hot
    labels), fitted on one random half of the tokens and measured on the other.

    Args:
        features: (N, D).
        instances: (N,) labels.
    """
    classes, places = instances.unique(return_inverse=True)[1], torch.randperm(len(instances), generator=generator)
    fitted, measured = places.to(features.device).chunk(2)
    probe = RidgeRegression()
    probe.add(features[fitted], one_hot(classes[fitted], int(classes.max()) + 1))
    return float((probe(features[measured]).argmax(dim=1) == classes[measured]).double().mean())


def probe(study: InstanceRSRStudy, photographs: LabelledPhotographs, config: ProbeConfig) -> list[Probed]:
    """Probes every block (see the head of this file)."""
    device = study.network.device
    exact = "cpu" if device.type == "mps" else device  # regressions are solved in float64
    count = study.network.config.num_layers
    regressions = [RidgeRegression() for _ in range(count)]
    cosines, shares = ([[] for _ in range(count)] for _ in range(2))
    half, first = config.crops // 2, 0
    while first < config.crops:
        end = min(first + config.batch_size, half if first < half else config.crops)
        items = [photographs[i] for i in range(first, end)]
        inputs = study.encode(to_device(torch.utils.data.default_collate(items), device))
        t, draws = torch.full((len(items),), config.timestep), generator_of(config.seed, "probe", first)
        noised = study.noised(inputs["latent"], t, draws)
        with torch.no_grad():
            blocks = study.network.block_features(noised.x, inputs["lr_latent"], noised.t)
        dino, instances = inputs["features"].flatten(0, -2).to(exact), inputs["instances"].to(exact)
        for block, features in enumerate(blocks):
            features = features.to(exact)
            rows = features.flatten(0, 1)
            if first < half:
                regressions[block].add(rows, dino)
            else:
                cosines[block] += cosine_similarity(regressions[block](rows), dino.double(), dim=-1).tolist()
            for index, (own, labels) in enumerate(zip(features, instances, strict=True), start=first):
                shares[block].append(told_right(own, labels, generator_of(config.seed, "places", index)))
        log.info("%d of %d crops", end, config.crops)
        first = end
    return [Probed(block + 1, _mean(cosines[block]), _mean(shares[block])) for block in range(count)]


def write_table(path: Path, probed: Sequence[Probed]) -> None:
    """A CSV of one line a block."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(Probed._fields)
    table.writerows([row.block, f"{row.dino:.4f}", f"{row.instances:.4f}"] for row in probed)
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def draw_plot(probed: Sequence[Probed]) -> Tensor:
    """The curves of `dino` and `instances` over the blocks, 0..1 each: (1, 3, 360, 640) in 0..1."""
    sheet = Image.new("RGB", (WIDTH, HEIGHT), SHEET_PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    right, bottom, last = WIDTH - RIGHT, HEIGHT - BOTTOM, max(len(probed) - 1, 1)

    def point(i: int, value: float) -> tuple[float, float]:
        return LEFT + i / last * (right - LEFT), bottom - min(max(value, 0.0), 1.0) * (bottom - TOP)

    for quarter in range(5):
        y = point(0, quarter / 4)[1]
        draw.line([(LEFT, y), (right, y)], fill=(70, 70, 70))
        draw.text((LEFT - 6, y), f"{quarter / 4:.2f}", fill=SHEET_INK, font=font, anchor="rm")
    for i in range(0, len(probed), -(-len(probed) // _MOST_TICKS)):
        draw.text((point(i, 0)[0], bottom + 6), str(probed[i].block), fill=SHEET_INK, font=font, anchor="mt")
    draw.text((right, HEIGHT - 4), "block", fill=SHEET_INK, font=font, anchor="rs")
    for place, (name, label) in enumerate((("dino", "DINO: cosine"), ("instances", "instances: told right"))):
        points = [point(i, getattr(row, name)) for i, row in enumerate(probed)]
        draw.text((LEFT + 200 * place, 8), label, fill=COLOURS[name], font=font)
        draw.line(points, fill=COLOURS[name], width=2)
        for x, y in points:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=COLOURS[name])
    return from_pillow(sheet)


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x.double(), torch.ones_like(x[:, :1], dtype=torch.float64)], dim=1)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main(argv: list[str] | None = None) -> list[Probed]:
    config = parse(ProbeConfig, argv)
    system = load_system(config.model, config.base, config.device or best_device(), torch.float32)
    if config.dino is None and not isinstance(system.autoencoder, LinearCodec):
        raise ValueError(f"--dino is missing: the folder of {DINO_PAGE}.")
    crop = config.crop or system.sampling.min_short_side
    vision = VisionEncoder.from_pretrained(config.dino or tiny_checkpoint("vision")).to(system.device)
    settings = InstanceRSRTraining(crop=crop, mask_modelling=system.network.config.ablations.mask_modelling)
    study = InstanceRSRStudy(settings, system.network, system.autoencoder, vision).eval()
    photographs = LabelledPhotographs(config.photographs, crop, DEGRADATIONS[config.degradation], study.grid,
                                      config.instances, seed=config.seed, captions=False)
    probed = probe(study, photographs, config)
    write_table(Path(f"{config.output}.csv"), probed)
    write_image(Path(f"{config.output}.png"), draw_plot(probed), {"model": Path(config.model).name})
    best = max(probed, key=lambda row: row.instances)
    log.info("block %d tells instances best: %.3f; wrote %s.csv and .png", best.block, best.instances, config.output)
    return probed


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
