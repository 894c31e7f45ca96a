"""DreamSR on latents: one step of degradation removal, then the texture generation (DreamSR section 3.2).

    z_dr = remove_degradation(model, z_lq, prompt, local)
    z = generate_texture(model, z_dr, noise, prompt, local)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..common.errors import NonFiniteLatentError
from ..common.flux import PATCH, resolution_shift
from ..common.sampling import OnStep, guidance_mix
from ..common.sampling import sample as run_scheduler
from ..common.text import TextEmbedding
from ..common.tiling import Box, Denoise, tiled
from .config import Spacing
from .model import DreamSR
from .patches import PatchText, join_rows

Prompts = TextEmbedding | Sequence[tuple[TextEmbedding, float]]  # several: predictions averaged with these shares
OnWindow = Callable[[int, int], None]
ControlScale = float | tuple[float, float]
TIMESTEPS = 1000  # diffusers' flow-matching timesteps are 1000 t


def sample(
    model: DreamSR,
    z_lq: Tensor,
    noise: Tensor,
    prompt: Prompts,
    local: PatchText,
    negative: TextEmbedding | None = None,
    *,
    steps: int = 16,
    start: float = 0.8,
    guidance: float = 3.5,
    spacing: Spacing = "uniform",
    cfg: float = 1.0,
    removal: bool = True,
    control_scale: ControlScale = 1.0,
    tile_batch: int = 4,
    on_step: OnStep | None = None,
    on_window: OnWindow | None = None,
) -> Tensor:
    """Draws the restored latent: `remove_degradation`, then `generate_texture`; 1 + `steps` evaluations a patch.

    Equal arguments give equal results; the noise is the only chance in it. Latents stay on the device they come on,
    whatever the network's: on the CPU, the size of the picture takes no memory of the card.

    Args:
        z_lq: latent of the LR pictures at the target size, (B, C, h, w), scaled as in the config; sides even.
        noise: standard normal, same shape; on any device.
        prompt: global prompts, 1 row or B; several, each with its share, are averaged (a call each).
        local: prompts of the patches, with the plan of the patches.
        removal: False = z_dr is z_lq.
        on_step: on_step(i, n, x, x0), n = steps + 1 with removal: its step 0 gives z_dr as both latents.
        on_window: on_window(done, total) after each network call, in every step anew.
        the rest: see `generate_texture`.
    Returns: (B, C, h, w), float32, on the device of `z_lq`.
    """
    shared = dict(guidance=guidance, control_scale=control_scale, tile_batch=tile_batch, on_window=on_window)
    z_dr, first = z_lq.float(), 0
    if removal:
        z_dr, first = remove_degradation(model, z_lq, prompt, local, **shared), 1
        if on_step is not None:
            on_step(0, steps + 1, z_dr, z_dr)

    def report(i: int, n: int, x: Tensor, x0: Tensor) -> None:
        on_step(i + first, n + first, x, x0)

    return generate_texture(
        model, z_dr, noise, prompt, local, negative, steps=steps, start=start, spacing=spacing, cfg=cfg,
        on_step=None if on_step is None else report, **shared,
    )


@torch.no_grad()
def remove_degradation(
    model: DreamSR,
    z_lq: Tensor,
    prompt: Prompts,
    local: PatchText,
    *,
    guidance: float = 3.5,
    control_scale: ControlScale = 1.0,
    tile_batch: int = 4,
    on_window: OnWindow | None = None,
) -> Tensor:
    """z_dr = z_lq - t_dr v, with v of one evaluation with the RA-LoRA, blended over the patches.

    Args: see `sample`.
    Returns: (B, C, h, w), float32, on the device of `z_lq`.
    Raises: ValueError for a network without RA-LoRA; NonFiniteLatentError.
    """
    z_lq, t_dr = z_lq.float(), model.config.t_dr
    denoise = velocity(model, z_lq, prompt, local, guidance=guidance, lora=True, control_scale=control_scale)
    v = tiled(denoise, list(local.plan), tile_batch, on_window)(z_lq, torch.tensor(t_dr))
    z_dr = z_lq - t_dr * v.to(z_lq)
    if not torch.isfinite(z_dr).all():
        raise NonFiniteLatentError(
            "the latent holds NaN or infinity after the degradation removal. Expected finite numbers. Try a wider "
            "dtype (float32 or bfloat16 instead of float16), and check the input and the weights."
        )
    return z_dr


@torch.no_grad()
def generate_texture(
    model: DreamSR,
    z_dr: Tensor,
    noise: Tensor,
    prompt: Prompts,
    local: PatchText,
    negative: TextEmbedding | None = None,
    *,
    steps: int = 16,
    start: float = 0.8,
    guidance: float = 3.5,
    spacing: Spacing = "uniform",
    cfg: float = 1.0,
    control_scale: ControlScale = 1.0,
    tile_batch: int = 4,
    on_step: OnStep | None = None,
    on_window: OnWindow | None = None,
) -> Tensor:
    """Rectified flow from  z_t = (1 - t) z_dr + t noise,  t = `start` (equation 3), to t = 0, conditioned on z_dr.

    Args:
        z_dr: latent without degradation, (B, C, h, w), scaled; or z_lq.
        noise, prompt, local, tile_batch, on_window: see `sample`.
        negative: prompt of the classifier-free guidance, global and local; 1 row or B.
        steps: Euler steps (paper 16).
        start: in (0, 1] (paper 0.8).
        guidance: scale that a distilled FLUX is told; no second evaluation.
        spacing: of the steps; see `texture_times`.
        cfg: classifier-free guidance away from `negative`; 1 = none, else two evaluations (not in the paper).
        control_scale: factor of the MM-ControlNet's injections, or one each for picture and text; 1 as trained.
        on_step: see `common.sampling.sample`.
    Returns: (B, C, h, w), float32, on the device of `z_dr`.
    Raises: ValueError for numbers or shapes that do not fit; NonFiniteLatentError.
    """
    if noise.shape != z_dr.shape:
        raise ValueError(f"the noise is {tuple(noise.shape)}, the LR latent {tuple(z_dr.shape)}; expected equal.")
    z_dr, noise = z_dr.float(), noise.to(z_dr.device, torch.float32)
    patch = local.plan[0]
    times, shift = texture_times(steps, start, spacing, patch.height * patch.width // PATCH**2)
    shared = dict(guidance=guidance, control_scale=control_scale)
    denoise = velocity(model, z_dr, prompt, local, **shared)
    if negative is not None and cfg != 1:
        unwanted = PatchText.of([negative], local.plan)
        denoise = _guided(denoise, velocity(model, z_dr, negative, unwanted, **shared), cfg)
    run = tiled(denoise, list(local.plan), tile_batch, on_window)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=times)
    x = (1 - start) * z_dr + start * noise
    return run_scheduler(lambda x, timestep: run(x, timestep / TIMESTEPS), x, scheduler, on_step=on_step)


def texture_times(steps: int, start: float, spacing: Spacing, tokens: int) -> tuple[list[float], float]:
    """Times of the texture generation before FLUX's shift k, and k: the scheduler steps at k s / (1 + (k - 1) s).

    not in the paper: "uniform" (k = 1) spaces them evenly, t_i = start (1 - i / steps); "flux" bends them by the
    resolution shift of a picture of `tokens` tokens, the first one at `start` all the same.
    Raises: ValueError for numbers out of range.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be 1 or more.")
    if not 0 < start <= 1:
        raise ValueError(f"start is {start}; a time in (0, 1] is expected (paper 0.8).")
    if spacing not in ("uniform", "flux"):
        raise ValueError(f"the spacing is {spacing!r}; 'uniform' or 'flux' is expected.")
    shift = resolution_shift(tokens) if spacing == "flux" else 1.0
    first = start / (shift - (shift - 1) * start)
    return [first * (1 - i / steps) for i in range(steps)], shift


def velocity(
    model: DreamSR,
    condition: Tensor,
    prompt: Prompts,
    local: PatchText,
    *,
    guidance: float = 3.5,
    lora: bool = False,
    control_scale: ControlScale = 1.0,
) -> Denoise:
    """The network as a function of patches: denoise(x, t in 0..1, boxes) -> velocity, for `common.tiling.tiled`.

    Every patch sees its part of `condition` (B, C, h, w) and its own local prompt; all see the global prompt.
    """
    z = condition.float()
    listed = [(prompt, 1.0)] if isinstance(prompt, TextEmbedding) else prompt
    listed = [(text.to(model.device, model.dtype), share) for text, share in listed]

    def predict(x: Tensor, t: Tensor, boxes: list[Box]) -> Tensor:
        rows = local.rows(boxes, len(z))
        z_patches = torch.cat([box.crop(z) for box in boxes]).to(model.device)
        x, t = x.to(model.device), t.to(model.device)
        output = torch.empty_like(x)
        for chosen in _equally_long(rows):
            texts = join_rows([rows[row] for row in chosen]).to(model.device, model.dtype)
            output[chosen] = sum(
                share * model(
                    x[chosen], z_patches[chosen], t, _rows_of(text, chosen, len(z)), texts, guidance, lora=lora,
                    control_scale=control_scale,
                )
                for text, share in listed
            )
        return output

    return predict


def _guided(wanted: Denoise, unwanted: Denoise, scale: float) -> Denoise:
    return lambda x, t, boxes: guidance_mix(wanted(x, t, boxes), unwanted(x, t, boxes), scale)


def _equally_long(rows: Sequence[TextEmbedding]) -> list[list[int]]:
    """Numbers of the rows, those with prompts of one number of tokens together: only these run in one call."""
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.prompt_embeds.shape[1], []).append(number)
    return list(groups.values())


def _rows_of(text: TextEmbedding, rows: list[int], batch: int) -> TextEmbedding:
    """The global prompts of some rows of a call, of which row r belongs to picture r mod batch."""
    if len(text) not in (1, batch):
        raise ValueError(f"{len(text)} global prompts for {batch} pictures; give one, or one for each.")
    pictures = [row % batch % len(text) for row in rows]
    return TextEmbedding(text.prompt_embeds[pictures], text.pooled[pictures])
