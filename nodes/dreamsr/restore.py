"""DreamSR's way of a picture: `sample` on latents, `restore` on images.

    system = load_system("tiny")
    sr = restore(lr, system, scale=4, seed=0)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.autoencoder import to_model, to_vae
from ..common.caption_cache import CaptionCache
from ..common.captions import EmbeddedCaptioner
from ..common.codec import LinearCodec
from ..common.color_fix import METHODS as COLOR_FIXES
from ..common.color_fix import color_fix as fix_colors
from ..common.devices import best_device, must_offload, on_device
from ..common.flux import PAGE as FLUX_PAGE
from ..common.flux_encoders import FluxTextEncoder, load_flux_autoencoder
from ..common.images import crop, finish, prepare_lr
from ..common.sampling import OnStep, cpu_noise
from ..common.tiling import Box
from ..common.tiny import FILES, load_codec, load_text_encoder, tiny_checkpoint
from ..common.tiny_text import TinyTextEncoder
from .config import PRESETS, Preset, Sampling
from .model import DreamSR
from .patches import PatchText, plan_patches
from .prompts import Captioner, PatchPrompts, parse_prompts, write_prompts
from .sampling import OnWindow, generate_texture, remove_degradation, sample
from .weights import find_network, read_config

__all__ = ["System", "generate_texture", "load_system", "remove_degradation", "restore", "sample"]


@dataclass
class System:
    """All that turns a poor picture into a good one.

    Attributes:
        device: where everything is computed. offload: networks go there in turn, else they are there.
    """

    network: DreamSR
    autoencoder: nn.Module  # a common.autoencoder.Autoencoder
    text: nn.Module  # encode(list of prompts) -> TextEmbedding
    captioner: Captioner
    sampling: Sampling
    clean_captions: bool  # leave out what captions say of damage
    negative_prompt: str  # used where cfg is not 1
    device: torch.device
    offload: bool = False
    captions: CaptionCache = field(default_factory=CaptionCache)

    @classmethod
    def of(
        cls,
        preset: Preset,
        network: DreamSR,
        autoencoder: nn.Module,
        text: nn.Module,
        captioner: Captioner | None = None,
    ) -> System:
        """A system that samples as the preset says; captioner None = the embedded one."""
        captioner = captioner or EmbeddedCaptioner(as_good=True)
        sampling = replace(preset.sampling, removal=preset.sampling.removal and bool(network.config.lora_rank))
        behaviour = sampling, preset.clean_captions, preset.negative_prompt
        return cls(network, autoencoder, text, captioner, *behaviour, network.device)


def load_system(
    model: str | Path = "tiny",
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    captioner: Captioner | None = None,
    ra_lora: str | Path | None = None,
    offload: bool | None = None,
) -> System:
    """Loads a network with its autoencoder and text encoders.

    Args:
        model: "tiny" (shipped), the folder `export` of a tiny training, or a file (or its folder) with adapters.
        base: FLUX.1-dev for adapters: the diffusers folder, or a folder with the makers' files (flux1-dev, ae, clip_l
            and t5xxl, and the folders tokenizer and tokenizer_2). Not used by tiny networks.
        device: None = cuda where there is one, else mps, else cpu.
        dtype: of the networks; None = bfloat16 on a GPU, float32 on a CPU.
        captioner: bchw in 0..1 -> list of texts; None = the embedded one.
        ra_lora: file whose RA-LoRA is used instead of the one in `model`.
        offload: keep text encoders, autoencoder and network on the CPU and bring each to the device for its part;
            None = where they do not fit on it together.
    Raises: FileNotFoundError naming what is missing; WrongFileError, MismatchedKeysError, CorruptCheckpointError.
    """
    device = torch.device(device or best_device())
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if str(model) == "tiny":
        file, codec, text = tiny_checkpoint("dreamsr"), load_codec(), load_text_encoder()
        preset = PRESETS["tiny"]
    elif (Path(model) / FILES["text"]).is_file():
        file, codec = find_network(model), LinearCodec.load(Path(model) / FILES["codec"])
        text, preset = TinyTextEncoder.load(Path(model) / FILES["text"]), PRESETS["tiny"]
    else:
        file, preset = find_network(model), PRESETS["full"]
        read_config(file)  # a wrong file is named before FLUX is loaded
        if base is None:
            raise FileNotFoundError(
                f"{file} needs FLUX.1-dev beside it: give its diffusers folder as base, from {FLUX_PAGE}."
            )
        codec = load_flux_autoencoder(base, dtype)
        text = FluxTextEncoder.from_pretrained(base, dtype)
    network = DreamSR.from_pretrained(file, base, ra_lora, dtype)
    channels, takes = codec.latent_channels, network.config.latent_channels
    if channels != takes:
        raise ValueError(f"the autoencoder makes latents of {channels} channels, but {file} takes {takes}.")
    system = System.of(preset, network, codec, text, captioner)
    system.device, system.offload = device, must_offload((network, codec, text), device) if offload is None else offload
    if not system.offload:
        for part in (network, codec, text):
            part.to(device)
    return system


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
    patch_prompts: str | Sequence[PatchPrompts] | None = None,
    negative: str | None = None,
    start: float | None = None,
    guidance: float | None = None,
    spacing: str | None = None,
    cfg: float | None = None,
    removal: bool | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    tile_batch: int | None = None,
    color_fix: str | None = None,
    on_step: OnStep | None = None,
    on_window: OnWindow | None = None,
    on_settings: Callable[[dict[str, Any]], None] | None = None,
) -> Tensor:
    """Restores and enlarges pictures.

    Args:
        lr: (B, C, H, W) in 0..1, C in 1..4, any size.
        scale, size: the target: a factor, or exact (height, width), which then replaces the factor.
        seed: picture b of the batch draws its noise from seed + b.
        prompt: replaces the global caption (one text, or one for each picture).
        patch_prompts: global and local prompts instead of captions: text as `prompts.parse_prompts` reads it, or the
            prompts of each picture. None = the captioner describes the picture and every patch.
        negative: replaces the preset's negative prompt, which is read where cfg is not 1.
        steps, start, guidance, spacing, cfg, removal, tile, overlap, tile_batch, color_fix: None = the system's own
            (see `Sampling`).
        on_step, on_window: called as in `sample`.
        on_settings: called once before the drawing with what is used: the fields of `Sampling`, "negative", "patches"
            (their number) and as "prompt" a list of the global prompts.
    Returns: (B, C, h, w) in 0..1, float32, on the CPU, of exactly the target size.
    """
    given = dict(
        steps=steps, start=start, guidance=guidance, spacing=spacing, cfg=cfg, removal=removal, tile=tile,
        overlap=overlap, tile_batch=tile_batch, color_fix=color_fix,
    )
    chosen = replace(system.sampling, **{name: value for name, value in given.items() if value is not None})
    if chosen.color_fix not in COLOR_FIXES:
        raise ValueError(f"the colour fix is {chosen.color_fix!r}; expected one of {', '.join(COLOR_FIXES)}.")
    prepared = prepare_lr(lr, None if size else scale, size, chosen.multiple, chosen.min_short_side)
    codec, config = system.autoencoder, system.network.config
    sides = (side // codec.downscale for side in prepared.pixels.shape[-2:])
    plan = plan_patches(*sides, chosen.tile, chosen.overlap)

    prompts = _prompts(system, prepared.pixels, plan, prompt, patch_prompts)
    unwanted = system.negative_prompt if negative is None else negative
    with on_device(system.text, system.device, system.offload) as text:
        positive = text.encode([picture.whole for picture in prompts])
        local = PatchText.encode([picture.patches for picture in prompts], plan, text.encode, system.network.dtype)
        low = text.encode([unwanted]) if chosen.cfg != 1 else None
    if on_settings is not None:
        described = {"prompt": [picture.whole for picture in prompts], "negative": unwanted, "patches": len(plan)}
        on_settings({**asdict(chosen), **described})

    with on_device(codec, system.device, system.offload):
        latent = codec.encode(prepared.pixels.to(system.device))
    z_lq = to_model(latent.float(), config.latent_shift, config.latent_scale)
    if len(plan) > 1:
        z_lq = z_lq.cpu()  # the size of the picture then takes no memory of the card
    with on_device(system.network, system.device, system.offload) as network:
        z = sample(
            network,
            z_lq,
            cpu_noise(seed, z_lq.shape),
            positive,
            local,
            low,
            steps=chosen.steps,
            start=chosen.start,
            guidance=chosen.guidance,
            spacing=chosen.spacing,
            cfg=chosen.cfg,
            removal=chosen.removal,
            tile_batch=chosen.tile_batch,
            on_step=on_step,
            on_window=on_window,
        )
    z = to_vae(z.to(system.device), config.latent_shift, config.latent_scale)
    with on_device(codec, system.device, system.offload):
        sr = crop(codec.decode(z).cpu().float(), prepared)
    return finish(fix_colors(sr, prepared.lr, chosen.color_fix), prepared)


def _prompts(
    system: System,
    pixels: Tensor,
    plan: list[Box],
    prompt: str | list[str] | None,
    patch_prompts: str | Sequence[PatchPrompts] | None,
) -> list[PatchPrompts]:
    """The prompts of each picture, captioned where none are given."""
    batch = len(pixels)
    if patch_prompts is None:
        downscale = system.autoencoder.downscale
        prompts = write_prompts(pixels, plan, downscale, system.captioner, clean=system.clean_captions,
                                cache=system.captions)
    elif isinstance(patch_prompts, str):
        prompts = parse_prompts(patch_prompts, len(plan), batch)
    else:
        prompts = list(patch_prompts)
    if prompt is not None:
        wholes = [prompt] * batch if isinstance(prompt, str) else prompt
        prompts = [replace(picture, whole=whole) for picture, whole in zip(prompts, wholes, strict=False)]
        if len(wholes) != batch:
            raise ValueError(f"{len(wholes)} prompts for {batch} pictures; give one text, or one for each picture.")
    if len(prompts) != batch:
        raise ValueError(f"patch prompts of {len(prompts)} pictures for {batch} pictures; one for each is expected.")
    return prompts
