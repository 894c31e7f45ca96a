"""InstantIR's way of a picture: `sample` on latents, `restore` on images.

system = load_system("tiny")
sr = restore(lr, system, scale=4, seed=0)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.autoencoder import to_model, to_vae
from ..common.caption_cleaning import clean_caption
from ..common.captions import EmbeddedCaptioner
from ..common.codec import LinearCodec
from ..common.color_fix import METHODS as COLOR_FIXES
from ..common.color_fix import color_fix as fix_colors
from ..common.devices import best_device
from ..common.images import crop, finish
from ..common.sampling import OnStep, cpu_generators
from ..common.sdxl_text import SDXLTextEncoder
from ..common.sdxl_vae import read_sdxl_vae
from ..common.tiny import FILES, load_codec, load_text_encoder, tiny_checkpoint
from ..common.tiny_text import TinyTextEncoder
from ..common.vision import PAGE as VISION_PAGE
from ..common.vision import VisionEncoder
from .config import PRESETS, Preset, Sampling
from .model import InstantIR
from .preparation import prepare
from .sampler import OnWindow, Sampled, sample
from .weights import PARTS, find_part

__all__ = ["Sampled", "System", "load_system", "restore", "sample"]

Captioner = Callable[[Tensor], list[str]]
VISION_FOLDER = "dinov2-large"  # looked for beside the adapter and beside the base


@dataclass
class System:
    """All that turns a poor picture into a good one."""

    network: InstantIR
    autoencoder: nn.Module  # a common.autoencoder.Autoencoder
    text: nn.Module  # encode(list of prompts) -> TextEmbedding
    vision: VisionEncoder
    captioner: Captioner | None  # None = no captions, the prompt alone
    sampling: Sampling
    prompt: str  # where the user gives none; follows the caption
    negative_prompt: str

    @classmethod
    def of(
        cls,
        preset: Preset,
        network: InstantIR,
        autoencoder: nn.Module,
        text: nn.Module,
        vision: VisionEncoder,
        captioner: Captioner | None = None,
    ) -> System:
        """A system that samples as the preset says; captioner None = the embedded one where the preset captions."""
        if captioner is None and preset.captioned:
            captioner = EmbeddedCaptioner(as_good=True)
        prompts = preset.prompt, preset.negative_prompt
        return cls(network, autoencoder, text, vision, captioner, preset.sampling, *prompts)

    @property
    def device(self) -> torch.device:
        return self.network.device


def load_system(
    model: str | Path = "tiny",
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    captioner: Captioner | None = None,
    vision: str | Path | None = None,
) -> System:
    """Loads a network with its autoencoder, text encoders and vision encoder.

    Args:
        model: "tiny" (shipped), the folder `export` of a tiny training, or a folder with adapter.pt, aggregator.pt and
            previewer_lora_weights.bin (or the .safetensors of a training under the same names).
        base: SDXL 1.0: diffusers folder, or a full checkpoint (with the folder `tokenizer` beside it). Not used by
            tiny networks.
        device: None = cuda where there is one, else mps, else cpu.
        dtype: of the network; None = bfloat16 on a GPU, float32 on a CPU.
        captioner: bchw in 0..1 -> list of texts; None = the embedded one for tiny networks, else none.
        vision: folder of DINOv2 large; None = `dinov2-large` in `model`, or beside `base`.
    Raises: FileNotFoundError naming what is missing; WrongFileError, MismatchedKeysError, CorruptCheckpointError.
    """
    device = torch.device(device or best_device())
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    folder = Path(model).expanduser()
    if str(model) == "tiny":
        network = InstantIR.from_pretrained(tiny_checkpoint("instantir"), dtype)
        codec, text, eye = load_codec(), load_text_encoder(), tiny_checkpoint("vision")
        preset = PRESETS["tiny"]
    elif (folder / FILES["text"]).is_file():
        network = InstantIR.from_pretrained(folder / FILES["instantir"], dtype)
        codec, text = LinearCodec.load(folder / FILES["codec"]), TinyTextEncoder.load(folder / FILES["text"])
        preset, eye = PRESETS["tiny"], folder / FILES["vision"]
    else:
        parts = [find_part(folder, part) for part in PARTS]
        if base is None:
            raise FileNotFoundError(
                f"{folder} needs SDXL 1.0 beside it: give its diffusers folder or checkpoint as base, from "
                "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0."
            )
        eye = Path(vision).expanduser() if vision else _vision_folder(folder, Path(base).expanduser())
        network = InstantIR.load(base, *parts, dtype=dtype)
        codec, text = read_sdxl_vae(base, dtype), SDXLTextEncoder.from_pretrained(base, dtype)
        preset = PRESETS["full"]
    channels, takes = codec.latent_channels, network.config.unet["in_channels"]
    if channels != takes:
        raise ValueError(f"the autoencoder makes latents of {channels} channels, but the UNet takes {takes}.")
    dino = VisionEncoder.from_pretrained(eye, dtype).to(device)
    return System.of(preset, network.to(device), codec.to(device), text.to(device), dino, captioner)


def _vision_folder(model: Path, base: Path) -> Path:
    for place in (model / VISION_FOLDER, base.parent / VISION_FOLDER, base / VISION_FOLDER):
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"DINOv2 is missing: there is no folder {model / VISION_FOLDER}. Download all files of {VISION_PAGE} into it, "
        "or give its place as vision. Nothing is downloaded by itself."
    )


@torch.no_grad()
def restore(
    lr: Tensor,
    system: System,
    *,
    scale: float | None = 4,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    steps: int | None = None,
    prompt: str | list[str] | None = None,
    negative: str | None = None,
    guidance: float | None = None,
    color_fix: str | None = None,
    reference: Tensor | None = None,
    fit: str = "crop",
    on_step: OnStep | None = None,
    on_window: OnWindow | None = None,
    on_settings: Callable[[dict[str, Any]], None] | None = None,
    on_sampled: Callable[[Sampled], None] | None = None,
    **options: Any,
) -> Tensor:
    """Restores and enlarges pictures.

    Args:
        lr: (B, C, H, W) in 0..1, C in 1..4, any size.
        scale, size: the target: a factor, or exact (height, width), which then replaces the factor.
        seed: picture b of the batch draws its noise from seed + b.
        prompt: what the picture shows or is to show (one text, or one for each picture); None = the published prompt,
            behind a caption if the system has a captioner.
        negative: replaces the published negative prompt.
        steps, guidance, color_fix: None = the system's own.
        reference: (B, C, H, W) in 0..1, pictures that the Aggregator reads in place of previews.
        fit: how the vision encoder sees pictures that are not square, see `VisionEncoder.encode`.
        on_step, on_window: called as in `sample`.
        on_settings: called once before the drawing with what is used: the fields of `Sampling`, "negative" and, as a
            list, "prompt".
        on_sampled: called with the previews and deltas, see `Sampled`.
        options: other fields of `Sampling`; None = the system's own.
    Returns: (B, C, h, w) in 0..1, float32, on the CPU, of exactly the target size.
    Raises: ValueError for an option that there is not, or numbers that do not fit.
    """
    given = dict(steps=steps, guidance=guidance, color_fix=color_fix, **options)
    if unknown := sorted(set(given) - {f.name for f in fields(Sampling)}):
        raise ValueError(f"InstantIR has no option {', '.join(unknown)}.")
    chosen = replace(system.sampling, **{name: value for name, value in given.items() if value is not None})
    if chosen.color_fix not in COLOR_FIXES:
        raise ValueError(f"the colour fix is {chosen.color_fix!r}; expected one of {', '.join(COLOR_FIXES)}.")
    prepared = prepare(lr, chosen, None if size else scale, size)

    texts = _prompts(system, prepared.lr) if prompt is None else prompt
    texts = [texts] * len(lr) if isinstance(texts, str) else texts
    if len(texts) != len(lr):
        raise ValueError(f"{len(texts)} prompts for {len(lr)} pictures; give one text, or one for each picture.")
    unwanted = system.negative_prompt if negative is None else negative
    guides = chosen.guidance != 1
    if on_settings is not None:
        on_settings({**asdict(chosen), "prompt": list(texts), "negative": unwanted})

    network = system.network
    z_lq = _latent(system, prepared.pixels)
    generators = cpu_generators(seed, len(lr))
    noise = torch.stack([torch.randn(z_lq.shape[1:], generator=generator) for generator in generators])
    result = sample(
        network,
        z_lq,
        noise,
        network.perceive(system.vision.encode(prepared.pixels, fit)),
        system.text.encode(texts),
        system.text.encode([unwanted]) if guides else None,
        network.perceive(system.vision.null_features()) if guides else None,
        reference=None if reference is None else _latent(system, prepare(reference, chosen, size=prepared.size).pixels),
        previewer_text=None if chosen.text_guided else system.text.encode([""]),
        generator=generators,
        on_step=on_step,
        on_window=on_window,
        **{name: getattr(chosen, name) for name in _SAMPLE_OPTIONS},
    )
    if on_sampled is not None:
        on_sampled(result)
    config = network.config
    decoded = system.autoencoder.decode(to_vae(result.latent, config.latent_shift, config.latent_scale))
    return finish(fix_colors(crop(decoded.cpu().float(), prepared), prepared.lr, chosen.color_fix), prepared)


_SAMPLE_OPTIONS = ("steps", "guidance", "scheduler", "preview_start", "creative_start", "adaptive",
                   "conditioning_scale", "image_scale", "tile", "overlap", "tile_batch")  # fmt: skip


def _latent(system: System, pixels: Tensor) -> Tensor:
    """Scaled latent of a picture that has its working size."""
    config = system.network.config
    return to_model(
        system.autoencoder.encode(pixels.to(system.device)).float(), config.latent_shift, config.latent_scale
    )


def _prompts(system: System, pictures: Tensor) -> list[str]:
    """A prompt of each picture: its caption, without what it says of damage, if there is a captioner, and the
    published words."""
    if system.captioner is None:
        return [system.prompt] * len(pictures)
    captions = [caption.strip() for caption in system.captioner(pictures)]
    if not system.prompt:
        return captions
    captions = [clean_caption(caption) for caption in captions]
    return [f"{caption}{'' if caption[-1:] in '.!?' else '.'} {system.prompt}".strip() for caption in captions]
