"""DiT4SR's way of a picture: `sample` on latents, `restore` on images.

    system = load_system("tiny")
    sr = restore(lr, system, scale=4, seed=0)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from ..common.autoencoder import KLAutoencoder, to_model, to_vae
from ..common.caption_cleaning import clean_caption
from ..common.captions import EmbeddedCaptioner
from ..common.codec import LinearCodec
from ..common.color_fix import METHODS as COLOR_FIXES
from ..common.color_fix import color_fix as fix_colors
from ..common.devices import best_device, must_offload, on_device
from ..common.images import crop, finish, prepare_lr
from ..common.sampling import OnStep, cpu_noise, flow_timesteps, guided
from ..common.sampling import sample as run_scheduler
from ..common.text import SD3TextEncoder, TextEmbedding
from ..common.tiling import Box, plan_tiles, tiled, whole
from ..common.tiny import FILES, load_codec, load_text_encoder, tiny_checkpoint
from ..common.tiny_text import TinyTextEncoder
from .config import PRESETS, Preset, Sampling, Variant
from .model import DiT4SRTransformer, find_network
from .prompts import positive_prompt

Captioner = Callable[[Tensor], list[str]]
Prompts = TextEmbedding | Sequence[tuple[TextEmbedding, float]]  # several: predictions averaged with these shares


def sample(
    model: DiT4SRTransformer,
    lr_latent: Tensor,
    noise: Tensor,
    positive: Prompts,
    negative: Prompts | None = None,
    *,
    steps: int = 40,
    guidance: float = 8.0,
    start_sigma: float = 1.0,
    shift: float | None = None,
    injection_scale: float | None = None,
    tile: int = 64,
    overlap: int = 24,
    tile_batch: int = 4,
    on_step: OnStep | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draws the restored latent: rectified flow from noise to picture, guided by the LR latent and the text.

    x_0 = (1 - start_sigma) z_lr + start_sigma noise, then `steps` Euler steps dx = v dsigma (DiT4SR section 3.1).
    Latents are scaled (`to_model`). Equal arguments give equal results; the noise is the only chance in it.

    Args:
        lr_latent: latent of the LR picture at the target size, (B, C, h, w).
        noise: standard normal, same shape; on any device.
        positive, negative: prompts, one row or B; no negative, or guidance 1, makes one evaluation a step. Of several
            prompts, each with its share, the predictions are averaged (a call each), as ComfyUI does.
        steps: network evaluations (paper 40).
        guidance: classifier-free guidance (paper 8).
        start_sigma: in (0, 1]; 1 = pure noise as published; below, the start keeps that much of the LR latent.
        shift: of the noise levels; None = the model's (published 3).
        injection_scale: factor of the LR injection; None = the model's.
        tile, overlap: latents; larger pictures are denoised in windows (published 64 and 24).
        tile_batch: windows per network call.
        on_step, on_window: see `common.sampling.sample` and `common.tiling.tiled`.
    Returns: (B, C, h, w), float32, on the device of `lr_latent`.
    Raises: ValueError for numbers or shapes that do not fit; NonFiniteLatentError.
    """
    if noise.shape != lr_latent.shape:
        raise ValueError(f"the noise is {tuple(noise.shape)}, the LR latent {tuple(lr_latent.shape)}; expected equal.")
    patch = model.config.patch_size
    if tile % patch:
        raise ValueError(f"the tile is {tile} latents; it must be a multiple of the network's patch size, {patch}.")
    z_lr, noise = lr_latent.float(), noise.to(lr_latent.device, torch.float32)

    def predict(x: Tensor, t: Tensor, prompts: list[tuple[TextEmbedding, float]], boxes: list[Box]) -> Tensor:
        z = torch.cat([box.crop(z_lr) for box in boxes])
        x, z, t = (tensor.to(model.device) for tensor in (x, z, t))
        return sum(share * model(x, z, t, text.prompt_embeds, text.pooled, injection_scale) for text, share in prompts)

    positive, negative = (_shares(prompts, model) for prompts in (positive, negative))
    height, width = z_lr.shape[-2:]
    fits = max(height, width) <= tile
    plan = whole(height, width) if fits else plan_tiles(height, width, tile, overlap)
    denoise = tiled(guided(predict, positive, negative, guidance), plan, tile_batch, on_window)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=model.config.shift if shift is None else shift)
    timesteps = flow_timesteps(scheduler, steps, start_sigma)
    start = (1 - start_sigma) * z_lr + start_sigma * noise
    return run_scheduler(denoise, start, scheduler, timesteps, on_step)


def _shares(prompts: Prompts | None, model: DiT4SRTransformer) -> list[tuple[TextEmbedding, float]] | None:
    """Prompts with their shares, where the model is."""
    if prompts is None:
        return None
    listed = [(prompts, 1.0)] if isinstance(prompts, TextEmbedding) else prompts
    return [(text.to(model.device, model.dtype), share) for text, share in listed]


@dataclass
class System:
    """All that turns a poor picture into a good one.

    Attributes:
        device: where everything is computed. offload: networks go there in turn, else they are there.
    """

    transformer: DiT4SRTransformer
    autoencoder: nn.Module  # a common.autoencoder.Autoencoder
    text: nn.Module  # encode(list of prompts) -> TextEmbedding
    captioner: Captioner
    sampling: Sampling
    added_prompt: str  # follows the caption
    negative_prompt: str
    device: torch.device
    offload: bool = False

    @classmethod
    def of(
        cls,
        preset: Preset,
        transformer: DiT4SRTransformer,
        autoencoder: nn.Module,
        text: nn.Module,
        captioner: Captioner | None = None,
    ) -> System:
        """A system that samples as the preset says, where the network is; captioner None = the embedded one."""
        prompts = preset.added_prompt, preset.negative_prompt
        captioner = captioner or EmbeddedCaptioner(as_good=True)
        return cls(transformer, autoencoder, text, captioner, preset.sampling, *prompts, transformer.device)


def load_system(
    model: str | Path = "tiny",
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    variant: Variant | None = None,
    captioner: Captioner | None = None,
    offload: bool | None = None,
) -> System:
    """Loads a network with its autoencoder and text encoder.

    Args:
        model: "tiny" (shipped), a DiT4SR folder (`transformer/` or what lies in it), or the folder `export` of a
            tiny training.
        base: diffusers folder of Stable Diffusion 3.5 medium, whose VAE and text encoders are used; None = the
            folder that `transformer/` lies in. Not used by tiny networks.
        device: None = cuda where there is one, else mps, else cpu.
        dtype: of the network; None = bfloat16 on a GPU, float32 on a CPU.
        variant: see `DiT4SRTransformer.from_pretrained`.
        captioner: bchw in 0..1 -> list of texts; None = the embedded one.
        offload: keep text encoders, autoencoder and network on the CPU and bring each to the device for its part;
            None = where the device does not hold them all at once.
    Raises: FileNotFoundError naming what is missing; WrongFileError, MismatchedKeysError, CorruptCheckpointError.
    """
    device = torch.device(device or best_device())
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if str(model) == "tiny":
        network, codec, text = tiny_checkpoint("dit4sr"), load_codec(), load_text_encoder()
        preset = PRESETS["tiny"]
    elif (Path(model) / FILES["text"]).is_file():
        network, codec = find_network(model), LinearCodec.load(Path(model) / FILES["codec"])
        text, preset = TinyTextEncoder.load(Path(model) / FILES["text"]), PRESETS["tiny"]
    else:
        network = find_network(model)
        base = Path(base) if base else network.parent
        codec = KLAutoencoder.from_pretrained(base, dtype)
        text, preset = SD3TextEncoder.from_pretrained(base, dtype=dtype), PRESETS["full"]
    transformer = DiT4SRTransformer.from_pretrained(network, variant, dtype)
    channels, takes = codec.latent_channels, transformer.config.in_channels
    if channels != takes:
        raise ValueError(f"the autoencoder makes latents of {channels} channels, but {network} takes {takes}.")
    system = System.of(preset, transformer, codec, text, captioner)
    parts = transformer, codec, text
    system.device, system.offload = device, must_offload(parts, device) if offload is None else offload
    if not system.offload:
        for part in parts:
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
    negative: str | None = None,
    guidance: float | None = None,
    start_sigma: float | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    tile_batch: int | None = None,
    color_fix: str | None = None,
    on_step: OnStep | None = None,
    on_window: Callable[[int, int], None] | None = None,
    on_settings: Callable[[dict[str, Any]], None] | None = None,
) -> Tensor:
    """Restores and enlarges pictures.

    Args:
        lr: (B, C, H, W) in 0..1, C in 1..4, any size.
        scale, size: the target: a factor, or exact (height, width), which then replaces the factor.
        seed: picture b of the batch draws its noise from seed + b.
        prompt: replaces the caption (one text, or one for each picture); None = captions by the system's captioner.
        negative: replaces the published negative prompt.
        steps, guidance, start_sigma, tile, overlap, tile_batch, color_fix: None = the system's own (see `Sampling`).
        on_step: called as in `sample`.
        on_settings: called once before the drawing with what is used: the fields of `Sampling`, "negative", and as
            "prompt" a list with what each picture is said to show.
    Returns: (B, C, h, w) in 0..1, float32, on the CPU, of exactly the target size.
    """
    given = dict(
        steps=steps, guidance=guidance, start_sigma=start_sigma, tile=tile, overlap=overlap, tile_batch=tile_batch,
        color_fix=color_fix,
    )
    chosen = replace(system.sampling, **{name: value for name, value in given.items() if value is not None})
    if chosen.color_fix not in COLOR_FIXES:
        raise ValueError(f"the colour fix is {chosen.color_fix!r}; expected one of {', '.join(COLOR_FIXES)}.")
    prepared = prepare_lr(lr, None if size else scale, size, chosen.multiple, chosen.min_short_side)
    config = system.transformer.config

    texts = _captions(system, prepared.lr) if prompt is None else prompt
    texts = [texts] * len(lr) if isinstance(texts, str) else texts
    if len(texts) != len(lr):
        raise ValueError(f"{len(texts)} prompts for {len(lr)} pictures; give one text, or one for each picture.")
    unwanted = system.negative_prompt if negative is None else negative
    if on_settings is not None:
        on_settings({**asdict(chosen), "prompt": list(texts), "negative": unwanted})

    with on_device(system.text, system.device, system.offload) as text_encoder:
        positive = text_encoder.encode([positive_prompt(text, system.added_prompt) for text in texts])
        low = text_encoder.encode([unwanted]) if chosen.guidance != 1 else None
    with on_device(system.autoencoder, system.device, system.offload) as autoencoder:
        latent = autoencoder.encode(prepared.pixels.to(system.device))
    z_lr = to_model(latent.float(), config.latent_shift, config.latent_scale)
    with on_device(system.transformer, system.device, system.offload) as transformer:
        z = sample(
            transformer,
            z_lr,
            cpu_noise(seed, z_lr.shape),
            positive,
            low,
            steps=chosen.steps,
            guidance=chosen.guidance,
            start_sigma=chosen.start_sigma,
            tile=chosen.tile,
            overlap=chosen.overlap,
            tile_batch=chosen.tile_batch,
            on_step=on_step,
            on_window=on_window,
        )
    with on_device(system.autoencoder, system.device, system.offload) as autoencoder:
        decoded = autoencoder.decode(to_vae(z, config.latent_shift, config.latent_scale)).cpu().float()
    sr = crop(decoded, prepared)
    return finish(fix_colors(sr, prepared.lr, chosen.color_fix), prepared)


def _captions(system: System, pictures: Tensor) -> list[str]:
    """A caption of each picture; at full size without the sentences that describe damage."""
    captions = system.captioner(pictures)
    return [clean_caption(caption) for caption in captions] if system.added_prompt else captions
