"""What InstantIR's trainings share: settings, parts, what photographs become, exports and sample pictures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..nodes.common.autoencoder import to_model, to_vae
from ..nodes.common.checkpoints import DEFAULT_LICENCE
from ..nodes.common.degradation import DEGRADATIONS
from ..nodes.common.images import resize, write_image
from ..nodes.common.sampling import cpu_noise
from ..nodes.common.text import TextEmbedding
from ..nodes.common.tiny import FILES
from ..nodes.instantir.config import PRESETS
from ..nodes.instantir.model import InstantIR
from ..nodes.instantir.sampler import sample
from ..nodes.instantir.weights import PARTS
from .data import Photographs
from .fit import FitConfig, FitResult, fit, option

LICENCES = {  # preset -> of the exported weights
    "tiny": DEFAULT_LICENCE, "full": "CreativeML Open RAIL++-M (derived from Stable Diffusion XL)"}
HELD_OUT = 10**12  # index of the first sample picture's crop: far beyond those that are trained on
_UNSAID = ("output_dir", "resume")  # paths that say nothing about the weights
_NAMED = ("photographs", "start", "codec", "text", "vision", "sdxl", "dino", "adapter", "previewer", "aggregator")


@dataclass(frozen=True)
class InstantIRTraining(FitConfig):
    """Settings of every training of InstantIR; the defaults are the paper's (section 4.1), for one process."""

    photographs: str = option("photographs", "folder of clean photographs, searched recursively")
    preset: Literal["full", "tiny"] = option("full", "size of the network")
    samples: int = option(4, "pictures drawn every --sample_every steps")

    sdxl: str | None = option(None, "full size: Stable Diffusion XL, its diffusers folder or checkpoint")
    dino: str | None = option(None, "full size: transformers folder of DINOv2 large")
    start: str | None = option(None, "tiny: the file that the training before this one exported")
    codec: str | None = option(None, "tiny: the codec's file; None = the shipped one")
    text: str | None = option(None, "tiny: the text encoder's file; None = the shipped one")
    vision: str | None = option(None, "tiny: the vision encoder's file; None = the shipped one")

    crop: int = option(1024, "pixels, side of the training crops (paper 1024)")
    min_scale: float = option(0.5, "photographs are shrunk by a random factor from this to 1 before cropping")
    degradation: str = option("real_esrgan", "settings of the LQ pictures (paper: Real-ESRGAN's defaults)")
    train_base: bool = option(False, "train the UNet, too (the tiny family's; not in the paper)")

    learning_rate: float = option(1e-4, "peak learning rate of AdamW (paper 1e-4)")
    export_dtype: Literal["float32", "bfloat16", "float16"] = option("float16", "precision of the exported weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset == "full" and self.train_base:
            raise ValueError("--train_base is for the tiny preset: at full size SDXL stays as it is.")


TINY = {  # what the tiny family's trainings change
    "crop": 128,
    "min_scale": 0.6,
    "degradation": "seesr",
    "batch_size": 16,
    "learning_rate": 5e-4,
    "beta2": 0.99,
    "warmup_steps": 200,
    "schedule": "cosine",
    "mixed_precision": "bf16",
}


class Parts(NamedTuple):
    """What turns photographs into the network's inputs; the files of the tiny family's parts, which go with exports."""

    autoencoder: nn.Module
    text: nn.Module
    vision: nn.Module | None = None
    files: Mapping[str, Path] = {}


class Noised(NamedTuple):
    """A latent on its way to noise, x = alpha z + sigma noise; (B, C, h, w), and t, alpha, sigma (B,)."""

    x: Tensor
    t: Tensor
    noise: Tensor
    alpha: Tensor
    sigma: Tensor


class InstantIRStudy(nn.Module):
    """The network with what turns photographs into its inputs; only what is trained requires a gradient.

    Attributes:
        part: what is trained, a name of `InstantIR.part_parameters`.
        file: name of the tiny network's export.
        samples: photographs (items of `Photographs`) that sample pictures are drawn of.
    """

    part: str
    file = FILES["instantir"]

    def __init__(self, config: InstantIRTraining, model: InstantIR, parts: Parts):
        super().__init__()
        self.config, self.model = config, model
        self.autoencoder, self.text, self.vision, self.files = parts
        self.samples: list[dict[str, Any]] = []
        model.requires_grad_(False)
        for part in (self.part, "unet") if config.train_base else (self.part,):
            for parameter in model.part_parameters(part).values():
                parameter.requires_grad_(True)
        if config.preset == "tiny":
            model.to(memory_format=torch.channels_last)  # what CPUs convolve fastest

    def train(self, mode: bool = True) -> InstantIRStudy:
        """As nn.Module's, but frozen parts stay as they are used."""
        super().train(mode)
        for part in (self.autoencoder, self.text, self.vision):
            if part is not None and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        self.model.unet.enable_gradient_checkpointing()
        if self.model.aggregator is not None:
            self.model.aggregator.enable_gradient_checkpointing()

    # What photographs become

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        """Scaled latents of pictures (B, 3, h, w) in 0..1, which are enlarged to the crop's size first; float32."""
        network, side = self.model.config, self.config.crop
        with torch.autocast(pictures.device.type, enabled=False):
            z = self.autoencoder.encode(resize(pictures, (side, side))).float()
        return to_model(z, network.latent_shift, network.latent_scale)

    def pixels(self, z: Tensor) -> Tensor:
        """The pictures that scaled latents stand for, in float32; the tiny codec lets gradients through."""
        network = self.model.config
        with torch.autocast(z.device.type, enabled=False):
            return self.autoencoder.decode(to_vae(z.float(), network.latent_shift, network.latent_scale))

    def prompts(self, captions: list[str], null: Tensor | None = None) -> TextEmbedding:
        """The captions, empty where `null` (B,) says so."""
        null = [False] * len(captions) if null is None else null.tolist()
        with torch.set_grad_enabled(any(p.requires_grad for p in self.text.parameters())):
            return self.text.encode(["" if n else c for c, n in zip(captions, null, strict=True)])

    @torch.no_grad()
    def features(self, lr: Tensor, null: Tensor | None = None) -> Tensor:
        """The vision encoder's tokens of LR pictures, those of the all-zero picture where `null` (B,) says so."""
        features = self.vision.encode(lr)
        if null is None:
            return features
        return torch.where(null.to(features.device)[:, None, None], self.vision.null_features(len(lr)), features)

    def time_ids(self, rows: int) -> Tensor:
        """SDXL's size conditioning (rows, 6): height and width of the crop, its corner, height and width again."""
        side = self.config.crop
        return torch.tensor([side, side, 0, 0, side, side], device=self.model.device).float().expand(rows, 6)

    def noised(self, z: Tensor, t: Tensor, generator: torch.Generator) -> Noised:
        """Latents at timesteps t (B,) with fresh noise."""
        noise = torch.randn(z.shape, generator=generator).to(z)
        alpha, sigma = self.model.schedule.alpha_sigma(t.to(z.device))
        return Noised(alpha[:, None, None, None] * z + sigma[:, None, None, None] * noise, t.to(z.device), noise,
                      alpha, sigma)

    def timesteps(self, rows: int, generator: torch.Generator, late: float = 1.0) -> Tensor:
        """Timesteps (rows,), with a density that grows as t^(late - 1): 1 = all equally likely, more = noisier ones."""
        u = torch.rand(rows, generator=generator) ** (1 / late)
        return (u * self.model.config.train_timesteps).long().clamp(max=self.model.config.train_timesteps - 1)

    # What is written

    def save(self, state: Mapping[str, Tensor], folder: Path, step: int) -> None:
        """Writes a full network's trained part under its published name; a tiny network with all parts that it has by
        now as one file, and beside it the codec and the encoders that it was trained with."""
        weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        if self.config.preset == "full":
            name = Path(PARTS[self.part][1]).with_suffix(".safetensors")
            self.model.save_part(folder / name, self.part, weights, **self.described(step))
            return
        self.model.save_pretrained(folder / self.file, weights, **self.described(step))
        for part, file in self.files.items():
            shutil.copyfile(file, folder / FILES[part])

    def described(self, step: int) -> dict[str, Any]:
        """What the exported files say about themselves: of files and folders their names only."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in _UNSAID}
        settings = {name: Path(value).name if name in _NAMED and value else value for name, value in settings.items()}
        return {"step": step, "training": settings, "dtype": getattr(torch, self.config.export_dtype),
                "licence": LICENCES[self.config.preset]}

    @torch.no_grad()
    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """Restores the samples with the parts that there are, and writes sheets LR | restored (| preview) | clean.

        Returns: `sample_psnr`, the mean over the samples in dB.
        """
        hr, lr, captions = stacked(self.samples, self.model.device)
        z_lq, preset = self.latents(lr), PRESETS[self.config.preset].sampling
        with self.mixed():
            run = sample(
                self.model, z_lq, cpu_noise(0, z_lq.shape), self.features(lr), self.prompts(captions),
                self.prompts([""]), self.vision.null_features(), steps=preset.steps, guidance=preset.guidance,
                time_ids=self.time_ids(1), tile=0,
            )
        shown = [resize(lr, hr.shape[-2:]), self.pixels(run.latent), *map(self.pixels, run.previews[:1]), hr]
        return self.write_sheets(folder, step, [picture.cpu() for picture in shown])

    def mixed(self) -> torch.autocast:
        """Autocast for sample pictures of a base in half precision under adapters in float32."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.model.dtype != torch.float32)

    def write_sheets(self, folder: Path, step: int, shown: list[Tensor]) -> dict[str, float]:
        """One sheet a sample, `shown` (B, 3, H, W) side by side. Returns the PSNR of the second against the last."""
        for index, row in enumerate(zip(*shown, strict=True)):
            write_image(folder / f"step-{step:08d}-{index}.png", torch.cat(row, dim=-1)[None],
                        {"caption": self.samples[index]["caption"]})
        error = (shown[1] - shown[-1]).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        return {"sample_psnr": float(-10 * error.log10().mean())}


def run_training(config: InstantIRTraining, study: InstantIRStudy) -> FitResult:
    """Trains a study on the photographs (see `fit.fit`)."""
    photographs = Photographs(config.photographs, config.crop, DEGRADATIONS[config.degradation], config.seed,
                              min_scale=config.min_scale)
    if config.sample_every:
        study.samples = [photographs[HELD_OUT + i] for i in range(config.samples)]
    return fit(config, study, photographs, _loss, study.save, type(study).sample)


def _loss(model: nn.Module, batch: dict[str, Any], draws: torch.Generator, _: int) -> tuple[Tensor, dict[str, float]]:
    return model(batch, draws)


def stacked(samples: list[dict[str, Any]], device: torch.device) -> tuple[Tensor, Tensor, list[str]]:
    """Clean pictures, LR pictures and captions of items of `Photographs`."""
    hr, lr = (torch.stack([item[name] for item in samples]).to(device) for name in ("hr", "lr"))
    return hr, lr, [item["caption"] for item in samples]
