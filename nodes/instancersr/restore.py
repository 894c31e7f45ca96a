"""InstanceRSR's way of a picture: `sample` on latents, `restore` on images.

    system = load_system("tiny")
    sr = restore(lr, system, scale=4, seed=0)
    picture, instances, labels = restore_with_map(lr, system, scale=4, seed=0)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.autoencoder import KLAutoencoder, to_model, to_vae
from ..common.codec import LinearCodec
from ..common.color_fix import METHODS as COLOR_FIXES
from ..common.color_fix import color_fix as fix_colors
from ..common.devices import best_device
from ..common.images import Prepared, crop, finish, prepare_lr, resize
from ..common.sampling import OnStep, cpu_noise
from ..common.sampling import sample as run_scheduler
from ..common.tiling import Box, plan_tiles, tiled, whole
from ..common.tiny import FILES, load_codec, tiny_checkpoint
from .config import PRESETS, Preset, Sampling
from .diffusion import TIMESTEPS, add_noise, ddim
from .instances import resize_labels
from .model import InstanceRSR, find_network
from .palette import labels_of_map

log = logging.getLogger(__name__)


def sample(
    model: InstanceRSR,
    lr_latent: Tensor,
    noise: Tensor,
    *,
    steps: int = 10,
    start: float = 1.0,
    spacing: str = "leading",
    tile: int | None = 64,
    overlap: int = 24,
    tile_batch: int = 4,
    on_step: OnStep | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draws the joint latent [z_x, z_m] with DDIM, led by the LR latent (equation 3).

    Latents are scaled (`to_model`). Equal arguments give equal results; the noise is the only chance in it.

    Args:
        lr_latent: z_y of the LR picture at the target size, (B, C, h, w).
        noise: standard normal, (B, 2C, h, w), (B, C, h, w) without mask modelling; on any device.
        steps: network evaluations, 1..1000 (paper 10; 5 match its baselines).
        start: in (0, 1]; 1 = pure noise. not in the paper: below, z_x starts as the LR latent, and z_m as zero, noised
            to this share of the schedule, and all steps are spent below it.
        spacing: of the timesteps, see `Sampling`.
        tile, overlap: latents; larger pictures are denoised in windows (512 px = 64). None = never.
        tile_batch: windows per network call.
        on_step, on_window: see `common.sampling.sample` and `common.tiling.tiled`.
    Returns: (B, 2C, h, w), float32, on the device of `lr_latent`; `halves` takes it apart.
    Raises: ValueError for numbers or shapes that do not fit; NonFiniteLatentError.
    """
    batch, channels, height, width = lr_latent.shape
    joint = model.config.joint_channels
    if tuple(noise.shape) != (batch, joint, height, width):
        raise ValueError(
            f"the noise is {tuple(noise.shape)}, the LR latent {tuple(lr_latent.shape)}; expected "
            f"{(batch, joint, height, width)}: noise for picture and map."
        )
    patch = model.config.patch_size
    if tile is not None and tile % patch:
        raise ValueError(f"the tile is {tile} latents; it must be a multiple of the network's patch size, {patch}.")
    if not 0 < start <= 1 or not 1 <= steps <= start * TIMESTEPS:
        raise ValueError(
            f"steps is {steps} and start {start}; start must be above 0 and at most 1, and steps in 1..1000 * start."
        )
    z_lr, noise = lr_latent.float(), noise.to(lr_latent.device, torch.float32)

    def denoise(x: Tensor, t: Tensor, boxes: list[Box]) -> Tensor:
        z = torch.cat([box.crop(z_lr) for box in boxes])
        return model(x.to(model.device), z.to(model.device), t.to(model.device)).eps

    fits = tile is None or max(height, width) <= tile
    plan = whole(height, width) if fits else plan_tiles(height, width, tile, overlap)
    scheduler = ddim(spacing)
    scheduler.set_timesteps(min(round(steps / start), TIMESTEPS))
    timesteps = scheduler.timesteps[-steps:]
    if start < 1:
        clean = torch.cat([z_lr, z_lr.new_zeros(batch, joint - channels, height, width)], dim=1)
        noise = add_noise(clean, noise, timesteps[:1].expand(batch))
    return run_scheduler(tiled(denoise, plan, tile_batch, on_window), noise, scheduler, timesteps, on_step)


def halves(z: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """[z_x, z_m] (B, 2C, h, w) -> picture and map, (B, C, h, w) each; the map is None where there is only a picture.

    Args:
        channels: C, `config.in_channels`.
    """
    return z[:, :channels], z[:, channels:] if z.shape[1] > channels else None


@dataclass
class System:
    """All that turns a poor picture into a good one."""

    network: InstanceRSR
    autoencoder: nn.Module  # a common.autoencoder.Autoencoder
    sampling: Sampling

    @classmethod
    def of(cls, preset: Preset, network: InstanceRSR, autoencoder: nn.Module) -> System:
        """A system that samples as the preset says."""
        return cls(network, autoencoder, preset.sampling)

    @property
    def device(self) -> torch.device:
        return self.network.device


class Restored(NamedTuple):
    """What is drawn from a poor picture.

    picture: (B, C, h, w) in 0..1, float32, on the CPU, of exactly the target size; C as the input had.
    map: the instance map in the palette's colours, (B, 3, h, w); None without mask modelling.
    labels: its instances, (B, h, w) int64, 0 = none, 1 = the largest; None without mask modelling.
    """

    picture: Tensor
    map: Tensor | None
    labels: Tensor | None


def load_system(
    model: str | Path = "tiny",
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    captioner: Any = None,
) -> System:
    """Loads a network with its autoencoder.

    Args:
        model: "tiny" (shipped), a file or folder that a training exported.
        base: diffusers folder of the DiT, whose VAE is used; None = the network's folder. Not used by tiny networks.
        device: None = cuda where there is one, else mps, else cpu.
        dtype: of the network; None = bfloat16 on a GPU, float32 on a CPU.
        captioner: not used, InstanceRSR takes no text.
    Raises: FileNotFoundError naming what is missing; WrongFileError, MismatchedKeysError, CorruptCheckpointError.
    """
    device = torch.device(device or best_device())
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if captioner is not None:
        log.warning("InstanceRSR takes no text: the captioner is not used.")
    tiny = str(model) == "tiny"
    path = tiny_checkpoint("instancersr") if tiny else find_network(model)
    network = InstanceRSR.from_pretrained(path, dtype)
    beside = path.parent / FILES["codec"]
    if tiny or beside.is_file():
        codec, preset = load_codec() if tiny else LinearCodec.load(beside), PRESETS["tiny"]
    else:
        codec, preset = KLAutoencoder.from_pretrained(base or path.parent, dtype), PRESETS["full"]
    channels, takes = codec.latent_channels, network.config.in_channels
    if channels != takes:
        raise ValueError(f"the autoencoder makes latents of {channels} channels, but {path} takes {takes}.")
    return System.of(preset, network.to(device), codec.to(device))


def restore(lr: Tensor, system: System, **options: Any) -> Tensor:
    """Restores and enlarges pictures: the picture of `restore_with_map`, whose arguments it takes."""
    return restore_with_map(lr, system, labels=False, **options).picture


@torch.no_grad()
def restore_with_map(
    lr: Tensor,
    system: System,
    *,
    scale: float | None = 4,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    steps: int | None = None,
    prompt: str | list[str] | None = None,
    start: float | None = None,
    tiling: bool | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    tile_batch: int | None = None,
    color_fix: str | None = None,
    labels: bool = True,
    on_step: OnStep | None = None,
    on_window: Callable[[int, int], None] | None = None,
    on_settings: Callable[[dict[str, Any]], None] | None = None,
) -> Restored:
    """Restores and enlarges pictures and finds their instances; neither SAM nor DINOv2 takes part.

    Args:
        lr: (B, C, H, W) in 0..1, C in 1..4, any size.
        scale, size: the target: a factor, or exact (height, width), which then replaces the factor.
        seed: picture b of the batch draws its noise from seed + b.
        prompt: must be None: the method takes no text.
        steps, start, tiling, tile, overlap, tile_batch, color_fix: None = the system's own (see `Sampling`).
        labels: find the instances in the map; costs a moment for large pictures.
        on_step, on_window: called as in `sample`.
        on_settings: called once before the drawing with what is used: the fields of `Sampling`, and empty texts as
            "prompt", one for each picture.
    """
    if prompt is not None:
        raise ValueError("InstanceRSR takes no text; leave the prompt out.")
    given = dict(
        steps=steps, start=start, tiling=tiling, tile=tile, overlap=overlap, tile_batch=tile_batch, color_fix=color_fix
    )
    chosen = replace(system.sampling, **{name: value for name, value in given.items() if value is not None})
    if chosen.color_fix not in COLOR_FIXES:
        raise ValueError(f"the colour fix is {chosen.color_fix!r}; expected one of {', '.join(COLOR_FIXES)}.")
    target = prepare_lr(lr, None if size else scale, size, chosen.multiple, chosen.min_short_side)
    drawn = target if chosen.tiling else _at_working_size(lr, target, chosen)
    if on_settings is not None:
        on_settings({**asdict(chosen), "prompt": [""] * len(lr)})

    config = system.network.config
    latent = system.autoencoder.encode(drawn.pixels.to(system.device))
    z_lr = to_model(latent.float(), config.latent_shift, config.latent_scale)
    z = sample(
        system.network,
        z_lr,
        cpu_noise(seed, (len(lr), config.joint_channels, *z_lr.shape[-2:])),
        steps=chosen.steps,
        start=chosen.start,
        spacing=chosen.spacing,
        tile=chosen.tile if chosen.tiling else None,
        overlap=chosen.overlap,
        tile_batch=chosen.tile_batch,
        on_step=on_step,
        on_window=on_window,
    )
    picture, instances = (None if half is None else _decode(system, half) for half in halves(z, config.in_channels))
    sr = resize(crop(picture, drawn), target.size)
    sr = finish(fix_colors(sr, target.lr, chosen.color_fix), target)
    if instances is None:
        return Restored(sr, None, None)
    height, width = drawn.work
    found = labels_of_map(instances[..., :height, :width], chosen.min_area) if labels else None
    return Restored(
        sr,
        resize(crop(instances, drawn), target.size),
        None if found is None else resize_labels(found, target.size),
    )


def _at_working_size(lr: Tensor, target: Prepared, chosen: Sampling) -> Prepared:
    """The picture for drawing it whole: with a short side of `min_short_side` even where the target is larger."""
    height, width = target.size
    shrink = min(1.0, chosen.min_short_side / min(height, width))
    size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    return prepare_lr(lr, None, size, chosen.multiple, chosen.min_short_side)


def _decode(system: System, z: Tensor) -> Tensor:
    config = system.network.config
    return system.autoencoder.decode(to_vae(z, config.latent_shift, config.latent_scale)).cpu().float()
