"""InstantIR's loop on latents: preview, Aggregator, guided denoising, adaptive restoration; in windows if need be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.memory import OutOfMemory, release_cached_memory
from ..common.sampling import OnStep, guidance_mix
from ..common.sampling import sample as run_scheduler
from ..common.schedulers import make_scheduler, noise_levels
from ..common.text import TextEmbedding
from ..common.tiling import Box, plan_tiles, tiled, whole
from .adaptive import AdaptiveRestoration
from .attention import Condition
from .conditions import Image, Prompts, Told, join_images, join_prompts, make_conditions, window_time_ids
from .config import Adaptive
from .model import InstantIR
from .unet import Residuals

OnWindow = Callable[[int, int], None]
Network = Callable[..., Tensor]  # (condition, x, t, rows, boxes), a row of this run and a window for each row of x


class Sampled(NamedTuple):
    """What a run gives.

    latent: (B, C, h, w), scaled, float32.
    previews: of the steps that made any, the conditional half's, (K, B, C, h, w) float32 on the CPU.
    preview_steps: which steps those are, 0..n-1; a sample that rested at one of them repeats its last preview.
    deltas: delta as it acted on every step, (n, B), 1 at the start.
    ratios: equation 7 as measured after every step, unclamped, (n, B); NaN where a sample had no preview.
    """

    latent: Tensor
    previews: Tensor
    preview_steps: list[int]
    deltas: Tensor
    ratios: Tensor


def sample(
    model: InstantIR,
    lq_latent: Tensor,
    noise: Tensor,
    image: Image,
    positive: Prompts,
    negative: Prompts | None = None,
    null_image: Image | None = None,
    *,
    steps: int = 30,
    guidance: float = 7.0,
    scheduler: Any = "ddim",
    preview_start: float = 0.0,
    creative_start: float = 1.0,
    adaptive: Adaptive = "off",
    conditioning_scale: float = 1.0,
    image_scale: float = 1.0,
    previewer_scale: float | None = None,
    aggregator_lq: Tensor | None = None,
    reference: Tensor | None = None,
    previewer_text: TextEmbedding | None = None,
    time_ids: Tensor | None = None,
    tile: int = 128,
    overlap: int = 32,
    tile_batch: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    on_step: OnStep | None = None,
    on_window: OnWindow | None = None,
) -> Sampled:
    """Draws the restored latent, from the LQ latent noised to the first timestep.

    Args:
        lq_latent: latent of the LQ picture at the target size, scaled, (B, C, h, w).
        noise: standard normal, same shape.
        image, null_image: DCP tokens (`model.perceive`) or the vision encoder's features, of the LQ picture and of the
            all-zero normalised one; one row or B.
        positive, negative: prompts, one row or B. Guidance needs both negatives; without them, or with guidance 1,
            there is one evaluation a step. Of several prompts, each with its share, the predictions are averaged (a
            call each), as ComfyUI does.
        steps: of the scheduler (paper 30). guidance: classifier-free (paper 7).
        scheduler: a name of `common.schedulers.SCHEDULERS`, or a diffusers scheduler for noise predictions.
        preview_start: 0..1; at steps i of n with i/n below it the LQ latent is its own reference.
        creative_start: 0..1; steps with (i+1)/n above it go without Aggregator.
        adaptive, conditioning_scale: see `AdaptiveRestoration`.
        image_scale, previewer_scale: w of equation 3, in the UNet and in the Previewer; None = as in the UNet.
        aggregator_lq: the LQ latent that the Aggregator reads, (B, C, h, w), scaled; None = `lq_latent`.
        reference: a latent, (B, C, h, w), scaled, that the Aggregator reads in place of the previews.
        previewer_text: what the Previewer reads; None = the same prompts as the UNet (the published program's, and the
            paper's text-guided Previewer). It was trained on the empty prompt.
        time_ids: (1 or B, 6), see `attention.Condition`; None = a window's own size in pixels, without a crop. not in
            the paper: the network knows pictures of that size, not ones of several thousand pixels, and a window should
            look like a whole picture rather than like a crop.
        tile, overlap: latents; a larger latent is denoised in windows, DCP tokens are the whole picture's. 0 = one
            window whatever the size.
        tile_batch: windows per network call.
        generator: for schedulers that add noise, see `common.sampling.sample`.
        on_step, on_window: see `common.sampling.sample` and `common.tiling.tiled`; windows are counted over a step.
    Raises: ValueError for numbers or shapes that do not fit; NonFiniteLatentError.
    """
    z_lq, batch = lq_latent.float(), len(lq_latent)
    for name, other in (("noise", noise), ("reference", reference), ("Aggregator's LQ latent", aggregator_lq)):
        if other is not None and other.shape != lq_latent.shape:
            raise ValueError(f"the {name} is {tuple(other.shape)}, the LQ latent {tuple(z_lq.shape)}; expected equal.")
    for name, part in (("preview_start", preview_start), ("creative_start", creative_start)):
        if not 0 <= part <= 1:
            raise ValueError(f"{name} is {part}; it is a part of the steps and must be in 0..1.")
    if guidance != 1 and (negative is None) != (null_image is None):
        raise ValueError("guidance needs both negatives: a negative prompt and the features of the all-zero picture.")
    guides = guidance != 1 and negative is not None
    scheduler = _prepare(scheduler, steps, model)
    height, width = z_lq.shape[-2:]
    fits = not tile or max(height, width) <= tile
    plan = whole(height, width) if fits else plan_tiles(height, width, tile, overlap)

    run = _Run(model, scheduler, plan, tile_batch, on_window)
    halves = 2 if guides else 1
    run.lq = (z_lq if aggregator_lq is None else aggregator_lq.to(z_lq)).repeat(halves, 1, 1, 1)
    run.given = None if reference is None else reference.to(z_lq).repeat(halves, 1, 1, 1)
    run.guidance = guidance if guides else 1.0
    run.adaptive = AdaptiveRestoration(adaptive, batch, conditioning_scale)
    run.preview_start, run.creative_start = preview_start, creative_start
    tokens = join_images(model, null_image if guides else None, image, batch)
    sizes = window_time_ids(model, plan[0]) if time_ids is None else time_ids.repeat(len(run.lq) // len(time_ids), 1)
    texts = join_prompts(negative if guides else None, positive, batch)
    run.told = make_conditions(model, texts, tokens, sizes, image_scale)
    if run.makes_previews():
        if previewer_text is not None:
            texts = join_prompts(previewer_text if guides else None, previewer_text, batch)
        scale = image_scale if previewer_scale is None else previewer_scale
        run.previewer_told = make_conditions(model, texts, tokens, sizes, scale, previewer=True)

    def after_step(i: int, n: int, x: Tensor, x0: Tensor) -> None:
        run.after_step(x0)
        if on_step is not None:
            on_step(i, n, x, x0)

    start = scheduler.add_noise(z_lq, noise.to(z_lq), scheduler.timesteps[:1].to(z_lq.device))
    with torch.no_grad():
        latent = run_scheduler(run.predict, start, scheduler, on_step=after_step, generator=generator)
    previews = torch.stack(run.previews) if run.previews else torch.empty(0, *z_lq.shape)
    return Sampled(latent, previews, run.preview_steps, torch.stack(run.deltas), torch.stack(run.ratios))


class _Run:
    """State of one run. Rows are the B pictures, with guidance the negative ones of all and then the positive ones."""

    lq: Tensor  # LQ latents, (R, C, h, w)
    given: Tensor | None  # the user's reference, same shape
    guidance: float
    told: Told
    previewer_told: Told
    adaptive: AdaptiveRestoration
    preview_start: float
    creative_start: float

    def __init__(self, model: InstantIR, scheduler: Any, plan: list[Box], tile_batch: int, on_window: OnWindow | None):
        self.model, self.plan, self.tile_batch, self.on_window = model, plan, tile_batch, on_window
        self.levels = list(zip(*noise_levels(scheduler), strict=True))
        self.step, self.at_once = 0, math.inf  # rows per network call; shrinks when memory runs out
        self.preview: Tensor | None = None
        self.previews, self.preview_steps, self.deltas, self.ratios = [], [], [], []

    def makes_previews(self) -> bool:
        """Whether any step will."""
        return any(self._aggregates(i) and self._previews(i) for i in range(len(self.levels)))

    def _aggregates(self, i: int) -> bool:
        there = self.model.aggregator is not None and self.adaptive.conditioning_scale > 0
        return there and (i + 1) / len(self.levels) <= self.creative_start

    def _previews(self, i: int) -> bool:
        return self.given is None and i / len(self.levels) >= self.preview_start

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided noise prediction of one step, (B, C, h, w); x and t as the scheduler scales them."""
        halves = len(self.lq) // len(x)
        x = x.repeat(halves, 1, 1, 1)
        self.scale = self.adaptive.scale().repeat(halves)
        working = self.adaptive.aggregating().repeat(halves) & self._aggregates(self.step)
        self.deltas.append(self.adaptive.factor())
        self.preview = self.previewed = None
        previews = self._previews(self.step) and bool(working.any())
        passes = 2 if previews else 1
        reference = None
        if working.any():
            own = self.given is None or self.step / len(self.levels) < self.preview_start
            reference = self.lq if own else self.given
            if previews:
                rows = working.nonzero()[:, 0]
                found = self._in_windows(self._clean, self.previewer_told, x[rows.to(x.device)], t, rows, 0, passes)
                preview = torch.zeros_like(x)
                preview[rows.to(x.device)] = found
                self.preview, self.previewed = preview[-len(x) // halves :], working[-len(x) // halves :]
                reference = self.adaptive.reference(preview, self.lq)
        self.reference, self.working = reference, working
        epsilon = self._in_windows(self._epsilon, self.told, x, t, torch.arange(len(x)), passes - 1, passes)
        return epsilon if halves == 1 else guidance_mix(*epsilon.chunk(2)[::-1], self.guidance)

    def after_step(self, x0: Tensor) -> None:
        """Measures delta from the scheduler's clean latent."""
        if self.preview is None:
            self.ratios.append(torch.full_like(self.adaptive.delta, torch.nan))
        else:
            self.ratios.append(self.adaptive.update(self.preview, x0, self.previewed))
            self.previews.append(self.adaptive.previous.cpu())
            self.preview_steps.append(self.step)
        self.step += 1

    def _in_windows(self, network: Network, told: Told, x: Tensor, t: Tensor, rows: Tensor, done: int, passes: int):
        """`network` over all windows of x, whose rows are `rows` of this run."""

        def averaged(x: Tensor, t: Tensor, rows: Tensor, boxes: Sequence[Box]) -> Tensor:
            if len(told) == 1:
                return network(told[0][0], x, t, rows, boxes)
            mean = torch.zeros_like(x)
            for condition, shares in told:
                at = shares[rows].nonzero()[:, 0]
                if len(at):
                    found = network(condition, x[at.to(x.device)], t, rows[at], [boxes[i] for i in at.tolist()])
                    mean.index_add_(0, at.to(x.device), found * shares[rows[at]].to(found)[:, None, None, None])
            return mean

        def denoise(windows: Tensor, t: Tensor, boxes: list[Box]) -> Tensor:
            return self._in_memory(averaged, windows, t, rows.repeat(len(boxes)), [b for b in boxes for _ in rows])

        def report(i: int, n: int) -> None:
            self.on_window(done * n + i, passes * n)

        return tiled(denoise, self.plan, self.tile_batch, self.on_window and report)(x, t)

    def _in_memory(
        self, network: Callable[..., Tensor], x: Tensor, t: Tensor, rows: Tensor, boxes: list[Box]
    ) -> Tensor:
        """One call, or, once memory has run out, several of fewer rows."""
        done: list[Tensor] = []
        start = 0
        while start < len(x):
            part = slice(start, start + int(min(self.at_once, len(x))))
            try:
                done.append(network(x[part], t, rows[part], boxes[part]))
                start = part.stop
                continue
            except OutOfMemory:
                if len(x[part]) == 1:
                    raise
            self.at_once = (len(x[part]) + 1) // 2
            release_cached_memory()
        return done[0] if len(done) == 1 else torch.cat(done)

    def _clean(self, condition: Condition, x: Tensor, t: Tensor, rows: Tensor, boxes: Sequence[Box]) -> Tensor:
        return self.model.clean(x, t, condition, rows, self.levels[self.step])

    def _epsilon(self, condition: Condition, x: Tensor, t: Tensor, rows: Tensor, boxes: Sequence[Box]) -> Tensor:
        residuals = anchor = None
        if self.reference is not None and (working := self.working[rows]).any():
            at = working.nonzero()[:, 0]
            lq, reference = (
                torch.stack([boxes[i].crop(z[rows[i]]) for i in at.tolist()]) for z in (self.lq, self.reference)
            )
            residuals = self.model.residuals(lq, reference, t, condition, rows[at])
            residuals = _scaled(residuals, self.scale[rows[at]], at, len(x))
            anchor = _spread(lq, at, len(x)) if self.model.config.anchor == "lr" else None
        return self.model.epsilon(x, t, condition, residuals, rows, self.levels[self.step], anchor)


def _scaled(residuals: Residuals, scale: Tensor, at: Tensor, count: int) -> Residuals:
    """Residuals of some rows, scaled, as residuals of all `count` rows: nothing for the others."""
    down, mid = ([_spread(z * scale.to(z)[:, None, None, None], at, count) for z in part]
                 for part in (residuals[0], [residuals[1]]))
    return down, mid[0]


def _spread(z: Tensor, at: Tensor, count: int) -> Tensor:
    """Rows `at` of `count` rows, the others zero."""
    return z if len(z) == count else z.new_zeros(count, *z.shape[1:]).index_copy(0, at.to(z.device), z)


def _prepare(scheduler: Any, steps: int, model: InstantIR) -> Any:
    if isinstance(scheduler, str):
        config = model.config
        return make_scheduler(scheduler, steps, config.beta_start, config.beta_end, config.train_timesteps)
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be 1 or more.")
    scheduler.set_timesteps(steps)
    return scheduler
