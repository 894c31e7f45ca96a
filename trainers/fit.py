"""The one training loop that every trainer uses.

    def loss_fn(model, batch, generator, step):
        noise = torch.randn(batch["z"].shape, generator=generator).to(batch["z"].device)
        loss = (model(batch["z"] + noise) - noise).square().mean()
        return loss, {"extra": number}

    fit(config, module, dataset, loss_fn, save_fn, sample_fn)

Started plainly or with ``accelerate launch`` on several processes and machines (without GPUs: ``accelerate launch
--multi_gpu --num_processes 2``, which then meet over gloo; its ``--cpu`` starts a single process whatever the number).
A training that is killed at any moment continues with ``--resume latest`` as if nothing had happened: the same samples,
the same draws, the same losses.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor, nn

from ..nodes.common.errors import MismatchedKeysError
from .config import FitConfig, learning_rate_at, option, parse
from .ema import EMA
from .journal import Clock, Journal, Window
from .order import BatchOrder, Samples, generator_of, loader, seed_of, to_device
from .resume import drop_old, find_checkpoint, read_checkpoint, write_checkpoint
from .stop import agreed, stop_signals

__all__ = ["FitConfig", "FitResult", "LossFn", "NonFiniteLossError", "SampleFn", "SaveFn", "fit", "learning_rate_at",
           "option", "parse"]

log = logging.getLogger(__name__)

# (model, batch, generator, step) -> (loss, numbers to log). Call `model(...)`, not a submodule of it: on several
# processes it is the wrapper that adds up gradients. The batch is on the device; the generator is a CPU one.
LossFn = Callable[[nn.Module, Any, torch.Generator, int], tuple[Tensor, dict[str, float]]]
# (state dict with the averaged weights, an empty folder to write into, step)
SaveFn = Callable[[dict[str, Tensor], Path, int], None]
# (module holding the averaged weights, in eval mode; folder for pictures; step) -> numbers to log, or None
SampleFn = Callable[[nn.Module, Path, int], "dict[str, float] | None"]


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became NaN or infinite; the text names the step and what reproduces it."""


@dataclass(frozen=True)
class FitResult:
    """What a finished training reports.

    Attributes:
        step: optimizer steps done.
        loss: mean of the last log interval.
        folder: the final weights, as `save_fn` wrote them (``<last checkpoint>/export``).
    """

    step: int
    loss: float
    folder: Path


def fit(config: FitConfig, module: nn.Module, dataset: Samples, loss_fn: LossFn, save_fn: SaveFn | None = None,
        sample_fn: SampleFn | None = None) -> FitResult:
    """Train the parameters of `module` that require a gradient (they are kept in float32).

    Args:
        config: see `FitConfig`; a trainer's own subclass will do.
        module: the network, or a module that holds several; frozen parameters are neither trained nor checkpointed.
            If it has a method `carried_state() -> dict[str, Tensor]`, its tensors are checkpointed, too, and filled
            when a training is resumed: what the loss itself changes, such as a teacher.
        dataset: ``[i]`` for any i >= 0, or a dataset with a length, which is then shuffled endlessly.
        loss_fn, save_fn, sample_fn: see `LossFn`, `SaveFn`, `SampleFn` above.
    Returns: `FitResult`, on every process.
    Raises:
        ValueError: nothing to train; a training already lies in the output folder; fp16 on a CPU.
        NonFiniteLossError: before the weights are touched by it.
        SystemExit: SIGTERM or Ctrl-C, after a checkpoint has been written.
    """
    run = _Run(config, module, dataset, loss_fn, save_fn, sample_fn)
    with stop_signals() as stop:
        try:
            run.train(stop)
        finally:
            run.close()
    if stop:
        raise SystemExit(128 + stop[0])
    return FitResult(run.step, run.last_means.get("loss", float("nan")), run.exported)


class _Run:
    """State of one training: built by resuming or from nothing, advanced by `train`."""

    def __init__(self, config: FitConfig, module: nn.Module, dataset: Samples, loss_fn: LossFn,
                 save_fn: SaveFn | None, sample_fn: SampleFn | None):
        self.config, self.module, self.dataset = config, module, dataset
        self.loss_fn, self.save_fn, self.sample_fn = loss_fn, save_fn, sample_fn
        self.output = Path(config.output_dir)
        self.accelerator = Accelerator(
            mixed_precision="no", cpu=config.cpu or not has_gpu(),  # autocast is entered around loss_fn instead
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.find_unused)])
        self._check()
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        for parameter in self.trained.values():
            parameter.data = parameter.data.float()
        if config.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        if config.compile:
            module.compile()
        module.train()
        self.model = self.accelerator.prepare_model(module)
        self.device = self.accelerator.device
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=config.learning_rate, eps=config.adam_eps,
                                           betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
        self.ema = EMA(self.trained.items(), config.ema_decay)
        self.carried = module.carried_state() if hasattr(module, "carried_state") else {}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.mixed_precision == "fp16")
        self.window, self.step, self.last_means = Window(), 0, {}
        self.started = time.monotonic()
        self.exported = self.output
        self._resume()
        self.journal = None
        if self.accelerator.is_main_process:
            self.journal = Journal(self.output, self.step, config.tensorboard)
            (self.output / "config.json").write_text(json.dumps(asdict(config), indent=1), encoding="utf-8")

    def train(self, stop: list[int]) -> None:
        config, clock = self.config, Clock()
        if self.step >= config.max_steps:
            log.warning("the training is complete at step %d; a larger --max_steps continues it", self.step)
            return
        order = BatchOrder(self.step, config.max_steps, config.batch_size, config.gradient_accumulation,
                           self.accelerator.process_index, self.accelerator.num_processes)
        if self.journal is not None:
            world, micro_steps = self.accelerator.num_processes, config.gradient_accumulation
            log.info("steps %d to %d on %s; global batch %d = %d x %d micro steps x %d processes; %.2f M weights",
                     self.step, config.max_steps, self.device, config.batch_size * micro_steps * world,
                     config.batch_size, micro_steps, world, sum(p.numel() for p in self.trained.values()) / 1e6)
        batches = iter(loader(self.dataset, order, config.seed, config.num_workers, self.device.type == "cuda"))
        saved = None
        while self.step < config.max_steps and not agreed(stop, self.accelerator):
            self.window.add(self._advance(batches))
            clock.count(config.batch_size * config.gradient_accumulation * self.accelerator.num_processes)
            if self.step % config.log_every == 0:
                self._log(clock)
                self.window = Window()
            if config.save_every and self.step % config.save_every == 0:
                saved = self._save()
            if config.sample_every and self.step % config.sample_every == 0:
                self._sample()
        if saved != self.step:
            self._save()
        if self.window.values and self.step == config.max_steps:
            self._log(clock)  # the last, shorter interval; the checkpoint keeps it open for a longer training
        if self.step == config.max_steps and self.journal is not None:
            self.journal.finish({"step": self.step, "seconds": time.monotonic() - self.started, **self.last_means})
        if stop:
            log.warning("stopped by signal %d after step %d; continue with --resume latest", stop[0], self.step)

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()
        self.accelerator.free_memory()

    def _check(self) -> None:
        if self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise ValueError(f"This training runs on one process or on several with DDP, not with "
                             f"{self.accelerator.distributed_type.value}: choose another `accelerate config`.")
        if self.config.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU choose bf16 or no.")
        if not any(p.requires_grad for p in self.module.parameters()):
            raise ValueError("No parameter of the network requires a gradient: there is nothing to train.")
        if self.config.gradient_checkpointing and not hasattr(self.module, "enable_gradient_checkpointing"):
            raise ValueError(f"{type(self.module).__name__} has no enable_gradient_checkpointing(): "
                             "leave --gradient_checkpointing off.")

    def _advance(self, batches: Iterator[Any]) -> dict[str, float]:
        """One optimizer step; returns the means of its numbers over the micro steps."""
        config, rank = self.config, self.accelerator.process_index
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, config)
        micro_steps, numbers = config.gradient_accumulation, Window()
        for micro in range(micro_steps):
            draws = (config.seed, "step", self.step, micro, rank)
            batch = to_device(next(batches), self.device)
            torch.manual_seed(seed_of(*draws, "global"))  # dropout and other draws from the global generators
            accumulate = self.accelerator.no_sync(self.model) if micro + 1 < micro_steps else nullcontext()
            with accumulate:
                with self._autocast():
                    loss, scalars = self.loss_fn(self.model, batch, generator_of(*draws), self.step)
                if not torch.isfinite(loss):
                    raise self._non_finite(f"the loss is {loss.item()}", micro)
                self.scaler.scale(loss / micro_steps).backward()
            numbers.add({"loss": loss.item(), **scalars})
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), config.max_grad_norm or float("inf"))
        if not torch.isfinite(norm) and not self.scaler.is_enabled():
            raise self._non_finite(f"the gradient's norm is {norm.item()}", None)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.step)
        self.step += 1
        return {**numbers.means(), "grad_norm": norm.item()}

    def _autocast(self) -> torch.autocast | nullcontext:
        if self.config.mixed_precision == "no":
            return nullcontext()
        dtype = torch.bfloat16 if self.config.mixed_precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def _non_finite(self, what: str, micro: int | None) -> NonFiniteLossError:
        config, rank, world = self.config, self.accelerator.process_index, self.accelerator.num_processes
        order = list(BatchOrder(self.step, self.step + 1, config.batch_size, config.gradient_accumulation, rank, world))
        samples = [i for batch in order for i in batch] if micro is None else order[micro]
        return NonFiniteLossError(
            f"Step {self.step}, process {rank}: {what} (samples {samples}, seed {config.seed}, micro step "
            f"{'any' if micro is None else micro}). The weights were not updated by it. Continue from the last "
            "checkpoint with a lower --learning_rate or --mixed_precision no, or look at these samples.")

    def _merge_windows(self) -> None:
        """The first process takes the numbers of all."""
        if self.accelerator.num_processes > 1:
            windows = gather_object([self.window.values])
            self.window = Window()
            if self.accelerator.is_main_process:
                self.window.merge(windows)

    def _log(self, clock: Clock) -> None:
        self._merge_windows()
        means = [self.window.means()]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(means)
        self.last_means = means[0]
        if self.journal is not None:
            rate, left = clock.read(self.config.max_steps - self.step)
            numbers = {**means[0], "lr": learning_rate_at(self.step - 1, self.config),
                       "samples_per_second": rate, "seconds_left": left}
            self.journal.write(self.step, numbers)
            log.info("step %d/%d  loss %.5f  %.1f samples/s  %s left", self.step, self.config.max_steps,
                     self.last_means["loss"], rate, time.strftime("%H:%M:%S", time.gmtime(left)))

    def _sample(self) -> None:
        if self.accelerator.is_main_process and self.sample_fn is not None:
            folder = self.output / "samples"
            folder.mkdir(exist_ok=True)
            self.module.eval()
            with self.ema.swapped(), torch.no_grad(), torch.random.fork_rng():
                numbers = self.sample_fn(self.module, folder, self.step)
            self.module.train()
            if numbers:
                self.journal.write(self.step, numbers)
        self.accelerator.wait_for_everyone()

    def _save(self) -> int:
        self._merge_windows()
        folder = self.output / "checkpoints" / f"step-{self.step:08d}"
        if self.accelerator.is_main_process:
            state = {"step": self.step, "trained": {n: p.detach() for n, p in self.trained.items()},
                     "ema": self.ema.average, "optimizer": self.optimizer.state_dict(),
                     "scaler": self.scaler.state_dict(), "carried": {n: t.detach() for n, t in self.carried.items()},
                     "window": self.window.values, "order": self._order(),
                     "last_means": self.last_means, "seconds": time.monotonic() - self.started}
            write_checkpoint(self.output, self.step, state, self._export if self.save_fn else None)
            drop_old(self.output, self.config.keep_last)
            log.info("wrote %s", folder)
        self.exported = folder / "export"
        self.accelerator.wait_for_everyone()
        return self.step

    def _export(self, folder: Path) -> None:
        with self.ema.swapped():
            self.save_fn(self.module.state_dict(), folder, self.step)

    def _order(self) -> dict[str, int]:
        """What the order of samples and draws depends on."""
        config = self.config
        return {"seed": config.seed, "batch_size": config.batch_size,
                "gradient_accumulation": config.gradient_accumulation, "processes": self.accelerator.num_processes}

    def _resume(self) -> None:
        found = [find_checkpoint(self.output, self.config.resume) if self.accelerator.is_main_process else None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        if found[0] is None:
            return
        state = read_checkpoint(found[0])
        stored = {name: tuple(value.shape) for name, value in state["trained"].items()}
        if stored != {name: tuple(p.shape) for name, p in self.trained.items()}:
            differing = sorted({*stored.items()} ^ {(n, tuple(p.shape)) for n, p in self.trained.items()})[:8]
            raise MismatchedKeysError(f"{found[0]} was written by another network: differing parameters {differing}. "
                                      "Resume with the configuration that the training was started with.")
        if state["order"] != self._order():
            log.warning("%s was written with %s, now it is %s: the losses will not continue exactly",
                        found[0], state["order"], self._order())
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["trained"][name])
            for name, value in self.carried.items():
                value.copy_(state["carried"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.ema.load(state["ema"])
        self.step, self.last_means, self.exported = state["step"], state.get("last_means", {}), found[0] / "export"
        self.started = time.monotonic() - state.get("seconds", 0.0)
        if self.accelerator.is_main_process:
            self.window = Window(state["window"])
        log.info("resumed %s", found[0])


def has_gpu() -> bool:
    """Whether there is a GPU of any make; without one, several processes must be told to meet over gloo."""
    if hasattr(torch, "accelerator"):  # torch 2.6 and newer
        return torch.accelerator.is_available()
    return torch.cuda.is_available() or torch.backends.mps.is_available()
