"""Noise, guidance and the denoising loop that all methods share. Schedulers are diffusers' own."""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import NonFiniteLatentError
from .memory import OutOfMemory, release_cached_memory
from .tiling import Box, Denoise

OnStep = Callable[[int, int, Tensor, Tensor], None]


def cpu_generators(seed: int, batch: int) -> list[torch.Generator]:
    """One CPU generator per sample: sample b is seeded with (seed + b) mod 2^64.

    A batch of two with seed s so equals two single runs with the seeds s and s + 1, on every device.

    Raises: ValueError for a seed outside 0..2^64-1.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"the seed is {seed}; expected a whole number in 0..2^64-1.")
    return [torch.Generator("cpu").manual_seed((seed + b) % 2**64) for b in range(batch)]


def cpu_noise(seed: int, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Standard normal noise of `shape` (B, ...), float32 on the CPU; sample b has the seed `seed + b`."""
    rows = [torch.randn(tuple(shape[1:]), generator=generator) for generator in cpu_generators(seed, shape[0])]
    return torch.stack(rows) if rows else torch.empty(tuple(shape))


def guidance_mix(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, equation 6): uncond + scale * (cond - uncond).

    Computed in float32 at least, returned in the dtype of `cond`; scale 1 is the conditional prediction.
    """
    wide = torch.promote_types(cond.dtype, torch.float32)
    return torch.lerp(uncond.to(wide), cond.to(wide), float(scale)).to(cond.dtype)


def guided(predict: Callable[..., Tensor], positive: Any, negative: Any = None, scale: float = 1.0) -> Denoise:
    """Wraps a conditional prediction into a guided one, as a Denoise that `tiled` accepts.

    With guidance, one call evaluates both conditions: x becomes [x, x] (2N rows), the condition [negative, positive]
    and the boxes [boxes, boxes], so that rows and boxes keep the window-major order of `Denoise`. Two calls are made
    where the conditions do not stack (prompts of different lengths) or where one call has run out of device memory.
    With scale 1, or without a negative condition, there is one call of N rows.

    Args:
        predict: predict(x (N, C, h, w), t scalar, condition, boxes) -> (N, C', h, w). Every tensor of the condition
            comes with N rows; boxes is None or a list of length N / B.
        positive, negative: a tensor, or a dict, tuple, list or dataclass of tensors, each (B, ...) or (1, ...).
        scale: guidance scale; 1 = no guidance.
    Returns: denoise(x, t, boxes=None) -> guided prediction, (N, C', h, w).
    """
    if negative is None or scale == 1:

        def denoise_plain(x: Tensor, t: Tensor, boxes: list[Box] | None = None) -> Tensor:
            return predict(x, t, condition_rows(positive, len(x)), boxes)

        return denoise_plain

    together = _signature(positive) == _signature(negative)

    def denoise(x: Tensor, t: Tensor, boxes: list[Box] | None = None) -> Tensor:
        nonlocal together
        low, high = condition_rows(negative, len(x)), condition_rows(positive, len(x))
        if together:
            both = _map(lambda a, b: torch.cat([a, b]), low, high)
            try:
                uncond, cond = predict(torch.cat([x, x]), t, both, None if boxes is None else [*boxes, *boxes]).chunk(2)
                return guidance_mix(cond, uncond, scale)
            except OutOfMemory:
                together = False
            del both
            release_cached_memory()
        return guidance_mix(predict(x, t, high, boxes), predict(x, t, low, boxes), scale)

    return denoise


def condition_rows(condition: Any, rows: int) -> Any:
    """Repeats every tensor (b, ...) of a condition to (rows, ...): all b samples once for each window, window-major.

    Raises: ValueError if `rows` is no multiple of b.
    """

    def repeat(tensor: Tensor) -> Tensor:
        batch = tensor.shape[0]
        if batch == rows:
            return tensor
        if batch == 1:
            return tensor.expand(rows, *tensor.shape[1:])
        if batch == 0 or rows % batch:
            raise ValueError(
                f"a condition of {batch} samples does not fit {rows} latent rows; expected 1 sample, or as many as "
                f"there are pictures."
            )
        return tensor.repeat(rows // batch, *[1] * (tensor.dim() - 1))

    return _map(repeat, condition)


def _map(function: Callable[..., Tensor], *trees: Any) -> Any:
    """`function` over the matching tensors of nested dicts, lists, tuples and dataclasses; the rest stays as it is."""
    tree = trees[0]
    if isinstance(tree, Tensor):
        return function(*trees)
    if isinstance(tree, dict):
        return {key: _map(function, *(other[key] for other in trees)) for key in tree}
    if isinstance(tree, list | tuple):
        items = [_map(function, *others) for others in zip(*trees, strict=True)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if is_dataclass(tree):
        values = {f.name: _map(function, *(getattr(other, f.name) for other in trees)) for f in fields(tree)}
        return replace(tree, **values)
    return tree


def _signature(tree: Any) -> Any:
    """What two conditions must have in common to be stacked: structure, shapes past the batch, and plain values."""
    if isinstance(tree, Tensor):
        return (tuple(tree.shape[1:]), tree.dtype, tree.device)
    if isinstance(tree, dict):
        return {key: _signature(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_signature(value) for value in tree]
    if is_dataclass(tree):
        return {f.name: _signature(getattr(tree, f.name)) for f in fields(tree)}
    return tree


def flow_timesteps(scheduler: Any, steps: int, start_sigma: float = 1.0, mu: float | None = None) -> Tensor:
    """Sets a flow-matching scheduler to `steps` steps of which the first one is at noise level `start_sigma`.

    The scheduler spaces unshifted levels s evenly and bends them by its shift k:  sigma(s) = k s / (1 + (k - 1) s).
    So that the first level is start_sigma after the shift, s starts at the inverse  s0 = sigma / (k - (k - 1) sigma)
    and ends where the published schedule ends. At start_sigma 1 the schedule is the published one, unchanged.
    not in the paper: start_sigma below 1; the published option for it starts at 1 all the same.
    The latent to start from is  (1 - start_sigma) z + start_sigma noise.

    Args:
        scheduler: a diffusers flow-matching scheduler (FlowMatchEulerDiscreteScheduler), changed in place.
        steps: 1 or more; all of them are spent below start_sigma.
        start_sigma: in (0, 1]; 1 = pure noise.
        mu: for schedulers with `use_dynamic_shifting`: k = exp(mu), or k = mu where its time shift is linear.
    Returns: the scheduler's timesteps, (steps,).
    Raises: ValueError for numbers out of range, or a scheduler whose schedule is reshaped after the shift.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be 1 or more.")
    if not 0 < start_sigma <= 1:
        raise ValueError(f"start_sigma is {start_sigma}; it must be above 0 and at most 1 (pure noise).")
    dynamic = {} if mu is None else {"mu": mu}
    if start_sigma == 1:
        scheduler.set_timesteps(steps, **dynamic)
        return scheduler.timesteps
    config = scheduler.config
    reshaping = ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")
    used = [name for name in reshaping if config.get(name)]
    if used:
        raise ValueError(f"start_sigma is {start_sigma}; below 1 it needs a scheduler without {', '.join(used)}.")
    if not config.get("use_dynamic_shifting"):
        shift = scheduler.shift
    elif mu is None:
        raise ValueError("this scheduler shifts dynamically and needs mu; pass mu.")
    else:
        shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
    first, last = start_sigma / (shift - (shift - 1) * start_sigma), float(scheduler.sigma_min)
    if first < last:
        raise ValueError(
            f"start_sigma is {start_sigma}, below the scheduler's last noise level "
            f"{shift * last / (1 + (shift - 1) * last):.4g}; start at a higher one."
        )
    scheduler.set_timesteps(sigmas=torch.linspace(first, last, steps, dtype=torch.float64).tolist(), **dynamic)
    return scheduler.timesteps


@torch.no_grad()
def sample(
    model_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    scheduler: Any,
    timesteps: Tensor | None = None,
    on_step: OnStep | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """Denoises x with any diffusers scheduler: x <- step(model_fn(x, t), t, x).

    Args:
        model_fn: model_fn(x, t) -> what the scheduler expects (noise, v, velocity, ...), shape of x. t is the
            scheduler's timestep, a scalar tensor on x's device.
        x: (B, C, h, w) at the scheduler's first noise level (for the EulerDiscrete family: noise * init_noise_sigma).
            Keep it float32: the loop runs in its dtype, on its device, whatever the network's are.
        scheduler: `set_timesteps` was called since it was last used.
        timesteps: a consecutive part of `scheduler.timesteps`; None = all.
        on_step: on_step(i, n, x, x0) after step i = 0..n-1: the latent and the clean latent predicted at this step.
            May raise to stop.
        generator: for schedulers that add noise (DDPM, ancestral): `cpu_generators(seed, B)`, one per sample, or a
            single one for the batch. None draws from torch's global generator.
    Returns: the latent after the last step, dtype and device of x.
    Raises: NonFiniteLatentError naming the step after which the latent holds NaN or infinity; ValueError if the
        scheduler was not prepared or the timesteps are not its own.
    """
    begin, steps = _prepare(scheduler, timesteps)
    accepts_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if accepts_generator and generator is not None else {}
    for i, t in enumerate(steps):
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        prediction = model_fn(model_input, t.to(x.device)).to(x)
        output = scheduler.step(prediction, t, x, **extra)
        after = output.prev_sample.to(x)
        if not torch.isfinite(after).all():  # the one wait for the device per step
            raise NonFiniteLatentError(_blame(i, len(steps), t, x, prediction))
        if on_step is not None:
            clean = getattr(output, "pred_original_sample", None)
            if clean is None:
                clean = _clean_latent(scheduler, begin + i, t, x, prediction)
            on_step(i, len(steps), after, clean)
        x = after
    return x


def _prepare(scheduler: Any, timesteps: Tensor | None) -> tuple[int, Tensor]:
    """Where in the scheduler's timesteps to begin, and the timesteps to run."""
    own = scheduler.timesteps
    if getattr(scheduler, "num_inference_steps", None) is None and not getattr(scheduler, "custom_timesteps", False):
        raise ValueError("the scheduler has no schedule yet; call scheduler.set_timesteps(steps) first.")
    if getattr(scheduler, "step_index", None) is not None:
        raise ValueError("the scheduler was stepped before; call scheduler.set_timesteps(steps) to use it again.")
    begin = 0
    if timesteps is None:
        timesteps = own
    else:
        n = len(timesteps)
        offsets = range(len(own) - n + 1) if n else range(0)
        found = [o for o in offsets if torch.equal(own[o : o + n].cpu(), timesteps.to(own.dtype).cpu())]
        if not found:
            raise ValueError(
                f"the {n} timesteps {timesteps.tolist()} are no consecutive part of the scheduler's {own.tolist()}."
            )
        begin, timesteps = found[0], own[found[0] : found[0] + n]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return begin, timesteps


def _clean_latent(scheduler: Any, index: int, t: Tensor, x: Tensor, prediction: Tensor) -> Tensor:
    """x0 for schedulers that do not return it.

    Flow matching: x - sigma v. Variance preserving, a = alphas_cumprod[t]: (x - sqrt(1-a) eps) / sqrt(a), or
    sqrt(a) x - sqrt(1-a) v.
    """
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if kind == "flow_prediction":
        return x - scheduler.sigmas[index].to(x) * prediction
    if kind == "sample":
        return prediction
    a = scheduler.alphas_cumprod[t.long().to(scheduler.alphas_cumprod.device)].to(x)
    if kind == "v_prediction":
        return a.sqrt() * x - (1 - a).sqrt() * prediction
    return (x - (1 - a).sqrt() * prediction) / a.sqrt()


def _blame(i: int, n: int, t: Tensor, x: Tensor, prediction: Tensor) -> str:
    """The text of NonFiniteLatentError: the step, and what first held NaN or infinity."""

    def broken(parts: dict[str, Tensor]) -> Iterator[str]:
        return (name for name, tensor in parts.items() if not torch.isfinite(tensor).all())

    where = next(broken({"the latent that sampling started from": x, "the network's prediction": prediction}), None)
    return (
        f"the latent holds NaN or infinity after step {i + 1} of {n} (timestep {float(t):g}); it came from "
        f"{where or 'the scheduler step'}. Expected finite numbers. Try a wider dtype (float32 or bfloat16 instead of "
        f"float16) or a lower guidance, and check the input and the weights."
    )
