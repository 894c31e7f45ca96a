"""What InstantIR's trainings share: settings, parts, what photographs become, exports and sample pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..nodes.common.autoencoder import to_model, to_vae
from ..nodes.common.checkpoints import DEFAULT_LICENCE
from ..nodes.common.codec import LinearCodec
from ..nodes.common.images import resize
from ..nodes.common.text import TextEmbedding
from ..nodes.common.tiny import FILES, tiny_checkpoint
from ..nodes.common.tiny_text import TinyTextEncoder
from ..nodes.common.vision import VisionEncoder
from ..nodes.instantir.model import InstantIR
from .fit import FitConfig, option

LICENCES = {  # preset -> of the exported weights
    "tiny": DEFAULT_LICENCE, "full": "CreativeML Open RAIL++-M (derived from Stable Diffusion XL)"}
HELD_OUT = 10**12  # index of the first sample picture's crop: far beyond those that are trained on
_PLACES = ("output_dir", "resume")  # paths that say nothing about the weights
_FILES = ("photographs", "sdxl", "dino", "start", "codec", "text", "vision", "adapter", "previewer", "aggregator")


@dataclass(frozen=True)
class InstantIRTraining(FitConfig):
    """Settings of every training of InstantIR; the defaults are the paper's (section 4.1), for one process."""

    photographs: str = option("photographs", "folder of clean photographs, searched recursively")
    preset: Literal["full", "tiny"] = option("full", "size of the network")
    start: str | None = option(None, "tiny: file of the training before this one, e.g. RUN/checkpoints/STEP/export/*")
    codec: str | None = option(None, "tiny: the codec's file; None = the shipped one")
    text: str | None = option(None, "tiny: the text encoder's file; None = the shipped one")
    vision: str | None = option(None, "tiny: the vision encoder's file; None = the shipped one")
    samples: int = option(4, "pictures drawn every --sample_every steps")

    crop: int = option(1024, "pixels, side of the training crops (paper 1024)")
    min_scale: float = option(0.5, "photographs are shrunk by a random factor from this to 1 before cropping")
    degradation: str = option("real_esrgan", "settings of the LQ pictures (paper: Real-ESRGAN's defaults)")

    learning_rate: float = option(1e-4, "peak learning rate of AdamW (paper 1e-4)")
    export_dtype: Literal["float32", "bfloat16", "float16"] = option("float16", "precision of the exported weights")


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


@dataclass(frozen=True)
class Parts:
    """What turns photographs into the network's inputs; frozen."""

    autoencoder: nn.Module
    text: nn.Module
    vision: nn.Module | None = None


def tiny_parts(config: InstantIRTraining, vision: bool = True) -> Parts:
    """The tiny family's codec, text encoder and, if wanted, vision encoder: the given files or the shipped ones."""
    files = {part: getattr(config, part) or tiny_checkpoint(part)
             for part in ("codec", "text", "vision") if vision or part != "vision"}
    return Parts(LinearCodec.load(files["codec"]), TinyTextEncoder.load(files["text"]),
                 VisionEncoder.from_pretrained(files["vision"]) if vision else None)


class InstantIRStudy(nn.Module):
    """The network with what turns photographs into its inputs; only what is trained requires a gradient.

    Attributes:
        samples: photographs (items of `Photographs`) that sample pictures are drawn of.
    """

    file = FILES["instantir"]  # name of the exported file

    def __init__(self, config: InstantIRTraining, model: InstantIR, parts: Parts):
        super().__init__()
        self.config, self.model = config, model
        self.autoencoder, self.text, self.vision = parts.autoencoder, parts.text, parts.vision
        self.samples: list[dict[str, Any]] = []

    def train(self, mode: bool = True) -> InstantIRStudy:
        """As nn.Module's, but frozen parts stay as they are used."""
        super().train(mode)
        for part in (self.autoencoder, self.text, self.vision):
            if part is not None and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        """Scaled latents of pictures (B, 3, H, W) in 0..1, float32."""
        network = self.model.config
        with torch.autocast(pictures.device.type, enabled=False):
            return to_model(self.autoencoder.encode(pictures).float(), network.latent_shift, network.latent_scale)

    def pixels(self, z: Tensor) -> Tensor:
        """The pictures that scaled latents stand for, in float32; the tiny codec lets gradients through."""
        network = self.model.config
        with torch.autocast(z.device.type, enabled=False):
            return self.autoencoder.decode(to_vae(z.float(), network.latent_shift, network.latent_scale))

    def prompts(self, captions: list[str], null: Tensor) -> TextEmbedding:
        """The captions, empty where `null` (B,) says so."""
        with torch.set_grad_enabled(any(p.requires_grad for p in self.text.parameters())):
            return self.text.encode(["" if n else c for c, n in zip(captions, null.tolist(), strict=True)])

    @staticmethod
    def time_ids(hr: Tensor) -> Tensor:
        """SDXL's size conditioning (B, 6): height and width of the picture, its corner, height and width again."""
        height, width = hr.shape[-2:]
        return torch.tensor([height, width, 0, 0, height, width], device=hr.device).float().expand(len(hr), 6)

    def noised(self, z: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps (B,), all equally likely, noise, and x_t = alpha z + sigma noise, like z."""
        t = torch.randint(self.model.config.train_timesteps, (len(z),), generator=generator).to(z.device)
        noise = torch.randn(z.shape, generator=generator).to(z)
        alpha, sigma = (level[:, None, None, None] for level in self.model.alpha_sigma(t))
        return t, noise, alpha * z + sigma * noise

    def save(self, state: Mapping[str, Tensor], folder: Path, step: int) -> None:
        """Writes the tiny network, with all parts that it has by now, as one file that describes itself."""
        self.model.save_pretrained(folder / self.file, part_of(state, "model."), **self.described(step))

    def described(self, step: int) -> dict[str, Any]:
        """What the exported files say about themselves: of files and folders their names only."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in _PLACES}
        settings = {name: Path(value).name if name in _FILES and value else value for name, value in settings.items()}
        return {"step": step, "training": settings, "dtype": getattr(torch, self.config.export_dtype),
                "licence": LICENCES[self.config.preset]}

    def enlarged(self, lr: Tensor) -> Tensor:
        """LR pictures (B, 3, h, w) at the size of the crops."""
        return resize(lr, (self.config.crop, self.config.crop))


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
