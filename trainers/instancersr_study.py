"""What the InstanceRSR training computes: its settings, its inputs from photographs and label maps, its loss, its
exports and its sample pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..nodes.common.autoencoder import to_model, to_vae
from ..nodes.common.checkpoints import DEFAULT_LICENCE
from ..nodes.common.images import resize, write_image
from ..nodes.common.losses import edge_loss
from ..nodes.common.tiny import FILES
from ..nodes.common.vision import VisionEncoder
from ..nodes.instancersr.config import PRESETS, Ablations
from ..nodes.instancersr.diffusion import TIMESTEPS, add_noise, clean_latent
from ..nodes.instancersr.losses import (
    ALIGNMENT_WEIGHT,
    SCALE_WEIGHT,
    alignment_loss,
    denoising_loss,
    instance_scale_loss,
    instance_targets,
    total_loss,
)
from ..nodes.instancersr.model import InstanceRSR
from ..nodes.instancersr.restore import System, restore_with_map
from .fit import FitConfig, option
from .order import seed_of

LICENCES = {  # preset -> of the exported weights, which at full size hold those of the base
    "tiny": DEFAULT_LICENCE, "full": "CC-BY-NC 4.0 (derived from DiT-XL/2)"}
_PLACES = ("output_dir", "cache", "resume")  # paths that say nothing about the weights
_NAMED = ("photographs", "instances", "base", "dino", "codec", "vision", "start")


@dataclass(frozen=True)
class InstanceRSRTraining(FitConfig):
    """Training of InstanceRSR. The defaults are the paper's (section 3.1)."""

    photographs: str = option("photographs", "folder of clean photographs, searched recursively")
    instances: str | None = option(None, "folder of their label maps; None = PNGs beside the photographs")
    preset: Literal["full", "tiny"] = option("full", "size of the network")
    base: str | None = option(None, "full size: diffusers folder of DiT-XL/2")
    dino: str | None = option(None, "full size: transformers folder of DINOv2")
    codec: str | None = option(None, "tiny: the codec's file; None = the shipped one")
    vision: str | None = option(None, "tiny: the vision encoder's file; None = the shipped one")
    start: str | None = option(None, "tiny: file or folder of an earlier training's export to start from")
    train_base: bool | None = option(None, "train all weights, not the added ones alone; None = at tiny size only")
    cache: str | None = option(None, "folder for latents and features, computed once (full size, DINOv2 large: 2.3 MB "
                                     "a crop); None = on the fly")
    cached_crops: int = option(100_000, "crops in the cache, >= 1")
    samples: int = option(4, "pictures drawn every --sample_every steps, as sheets LR | restored | clean and maps")

    crop: int = option(512, "pixels, side of the training crops (paper 512)")
    min_scale: float = option(0.5, "photographs are shrunk by a random factor from this to 1 before cropping")
    degradation: str = option("real_esrgan", "settings of the LR pictures (paper: Real-ESRGAN's pipeline)")
    alignment_weight: float = option(ALIGNMENT_WEIGHT, "of equation 5 (paper 0.5)")
    scale_weight: float = option(SCALE_WEIGHT, "of equation 6 (paper 0.1)")
    loss_weight: Literal["none", "x0"] = option("none", "x0 = of equation 4 the error of the clean latent (not in the "
                                                        "paper; for networks that emit it)")
    map_weight: float = option(1.0, "of the map's half in equation 4 (paper 1)")
    l1: float = option(0.0, "share of the absolute error in equation 4 (not in the paper)")
    edge: float = option(0.0, "share of the error of the decoded picture's edges (not in the paper; tiny preset only)")
    representation_learning: bool = option(True, "False = case 1 of table 2: equation 4 alone")
    mask_modelling: bool = option(True, "False = case 2 of table 2: the latent is the picture's alone")

    output_dir: str = option("runs/instancersr", "folder for checkpoints, logs, samples and the final weights")
    batch_size: int = option(256, "samples a micro step and process (paper: 256 in all)")
    learning_rate: float = option(1e-4, "peak learning rate of AdamW (DiT 1e-4)")
    weight_decay: float = option(0.0, "AdamW (DiT 0)")
    ema_decay: float = option(0.9999, "memory of the moving average that is sampled and exported (DiT 0.9999)")
    max_steps: int = option(200_000, "optimizer steps (paper: 72 hours of an H100)")
    export_dtype: Literal["float32", "bfloat16", "float16"] = option("bfloat16", "precision of the exported weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset == "full" and (self.start or self.edge):
            raise ValueError("--start and --edge are for the tiny preset: at full size a training goes on with "
                             "--resume, and the autoencoder lets no gradients through.")
        if self.map_weight != 1 and not self.mask_modelling:
            raise ValueError(f"--map_weight is {self.map_weight}, but without mask modelling there is no map's half.")

    @property
    def ablations(self) -> Ablations:
        return Ablations(self.representation_learning, self.mask_modelling)

    @property
    def trains_base(self) -> bool:
        return self.preset == "tiny" if self.train_base is None else self.train_base


TINY = {  # what the tiny family's training changes
    "crop": 128, "min_scale": 0.6, "degradation": "seesr", "batch_size": 16, "learning_rate": 6e-4, "beta2": 0.99,
    "warmup_steps": 200, "schedule": "cosine", "mixed_precision": "bf16", "max_steps": 5000, "ema_decay": 0.998,
    "loss_weight": "x0", "alignment_weight": 0.05, "scale_weight": 0.0005, "map_weight": 0.1, "l1": 0.3, "edge": 2.0,
    "export_dtype": "float16",
}  # fmt: skip


class Noised(NamedTuple):
    """A joint latent on its way to noise (equation 2); (B, 2C, h, w), and t (B,)."""

    x: Tensor
    t: Tensor
    noise: Tensor


class InstanceRSRStudy(nn.Module):
    """The network with what turns photographs into its inputs; only what is trained requires a gradient.

    Attributes:
        vision: DINOv2; None without representation learning, and where a cache holds its features.
        samples: photographs (items of `LabelledPhotographs`) that sample pictures are drawn of.
    """

    def __init__(
        self, config: InstanceRSRTraining, network: InstanceRSR, autoencoder: nn.Module, vision: VisionEncoder | None
    ):
        super().__init__()
        self.config, self.network = config, network
        self.autoencoder, self.vision = autoencoder.requires_grad_(False), vision
        if vision is not None:
            vision.requires_grad_(False)
        network.requires_grad_(config.trains_base)
        for parameter in network.added_parameters():
            parameter.requires_grad_(True)
        self.samples: list[dict[str, Any]] = []

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens of a crop, (h, w)."""
        return (self.config.crop // self.autoencoder.downscale // self.network.config.patch_size,) * 2

    def enable_gradient_checkpointing(self) -> None:
        self.network.gradient_checkpointing = True

    def train(self, mode: bool = True) -> InstanceRSRStudy:
        """As nn.Module's, but frozen parts stay as they are used."""
        super().train(mode)
        for part in (self.autoencoder, self.vision):
            if part is not None:
                part.eval()
        return self

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Equations 4 to 6 for a batch of labelled photographs, or of what `encode` made of them.

        Args:
            batch: items of `LabelledPhotographs`, collated; or what `encode` gives.
            generator: of the CPU; all draws come from it.
        Returns: the loss, and its parts, unweighted: the squared errors of picture and map, and what else there is.
        """
        config, channels = self.config, self.network.config.in_channels
        inputs = batch if "latent" in batch else self.encode(batch)
        z, z_lr = inputs["latent"].float(), inputs["lr_latent"].float()
        noised = self.noised(z, torch.randint(TIMESTEPS, (len(z),), generator=generator), generator)
        eps, _, features = self.network(noised.x, z_lr, noised.t)
        weights = config.loss_weight, config.l1
        denoising = denoising_loss(eps, noised.noise, noised.t, *weights, config.map_weight)
        halves = {"picture": slice(0, channels), "map": slice(channels, None)}
        numbers = {name: denoising_loss(eps[:, part].detach(), noised.noise[:, part], noised.t, weights[0]).item()
                   for name, part in halves.items() if name == "picture" or config.mask_modelling}
        alignment = scale = None
        if config.representation_learning:
            alignment = alignment_loss(self.network.align(features), inputs["features"])
            scale = instance_scale_loss(features, inputs["instances"], self.targets(inputs))
            numbers |= {"alignment": alignment.item(), "instance_scale": scale.item()}
        loss = total_loss(denoising, alignment, scale, config.alignment_weight, config.scale_weight)
        if config.edge:
            restored = clean_latent(noised.x, eps, noised.t)[:, :channels]
            edges = edge_loss(self.pixels(restored), self.pixels(z[:, :channels]))
            loss, numbers["edges"] = loss + config.edge * edges, edges.item()
        return loss, numbers

    # What photographs become

    @torch.no_grad()
    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the network and its losses need of a batch, which is also what the cache holds: the joint latent, the
        latent of the LR picture enlarged to the crop's size, DINOv2's features of the clean picture, instances."""
        hr = batch["hr"]
        clean = [hr, batch["map"]] if self.config.mask_modelling else [hr]
        latents = {"latent": torch.cat([self.latents(pictures) for pictures in clean], dim=1),
                   "lr_latent": self.latents(resize(batch["lr"], hr.shape[-2:]))}
        if not self.config.representation_learning:
            return latents
        with torch.autocast(hr.device.type, enabled=False):
            features = self.vision.patches(hr, self.grid)
        return latents | {"features": features, "instances": batch["instances"], "picture": batch["picture"]}

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        """Scaled latents of pictures in 0..1, float32."""
        network = self.network.config
        with torch.autocast(pictures.device.type, enabled=False):
            z = self.autoencoder.encode(pictures).float()
        return to_model(z, network.latent_shift, network.latent_scale)

    def pixels(self, z: Tensor) -> Tensor:
        """The pictures that scaled latents stand for, in float32; the tiny codec lets gradients through."""
        network = self.network.config
        with torch.autocast(z.device.type, enabled=False):
            return self.autoencoder.decode(to_vae(z.float(), network.latent_shift, network.latent_scale))

    def noised(self, z: Tensor, t: Tensor, generator: torch.Generator) -> Noised:
        """Joint latents at timesteps t (B,) with fresh noise."""
        noise = torch.randn(z.shape, generator=generator).to(z)
        return Noised(add_noise(z, noise, t.to(z.device)), t.to(z.device), noise)

    def targets(self, inputs: dict[str, Any]) -> Tensor:
        """The norms s_k for each picture of the batch, by label."""
        seeds = [seed_of(self.config.seed, "instances", which) for which in inputs["picture"].tolist()]
        return instance_targets(seeds, int(inputs["instances"].max()), self.network.config.width)

    # What is written

    def save(self, state: Mapping[str, Tensor], folder: Path, step: int) -> None:
        """Writes the network and, for a tiny one, its codec beside it: a folder that `load_system` takes."""
        prefix = "network."
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        settings = {name: value for name, value in asdict(self.config).items() if name not in _PLACES}
        settings = {name: Path(value).name if name in _NAMED and value else value for name, value in settings.items()}
        self.network.save_pretrained(folder, weights, step=step, training=settings,
                                     dtype=getattr(torch, self.config.export_dtype),
                                     licence=LICENCES[self.config.preset])
        if self.config.preset == "tiny":
            self.autoencoder.save(folder / FILES["codec"])

    @torch.no_grad()
    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """Restores the samples as users will, and writes sheets LR | restored | clean, and below them the map drawn
        and the true one.

        Returns: `sample_psnr`, the mean over the samples in dB.
        """
        system = System.of(PRESETS[self.config.preset], self.network, self.autoencoder)
        mixed = any(p.dtype != torch.float32 for p in self.network.parameters())  # a base in half precision
        psnr = []
        for index, item in enumerate(self.samples):
            hr, lr, true = item["hr"][None], item["lr"][None], item["map"][None]
            with torch.autocast(system.device.type, dtype=torch.bfloat16, enabled=mixed):
                drawn = restore_with_map(lr, system, size=tuple(hr.shape[-2:]), seed=index, labels=False)
            rows = [[resize(lr, hr.shape[-2:]), drawn.picture, hr]]
            if drawn.map is not None:
                rows.append([torch.zeros_like(hr), drawn.map, true])
            sheet = torch.cat([torch.cat(row, dim=-1) for row in rows], dim=-2)
            write_image(folder / f"step-{step:08d}-{index}.png", sheet, {"step": str(step)})
            psnr.append(-10 * float((drawn.picture - hr).square().mean().clamp(min=1e-10).log10()))
        return {"sample_psnr": sum(psnr) / len(psnr)} if psnr else {}
