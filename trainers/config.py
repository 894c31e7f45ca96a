"""What every trainer can be told: `FitConfig`, its command line (`parse`) and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from transformers import HfArgumentParser

Config = TypeVar("Config")


def option(default: Any, help: str) -> Any:
    """A dataclass field with its command-line help: unit or range, and the paper's value where there is one."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class FitConfig:
    """Settings of `fit.fit`. A trainer inherits it, changes defaults and adds its own fields."""

    output_dir: str = option("runs/fit", "folder for checkpoints, logs, samples and the final weights")
    max_steps: int = option(10_000, "optimizer steps, counted from the very first run, >= 1")
    batch_size: int = option(8, "samples a micro step and process, >= 1; global batch = x accumulation x processes")
    gradient_accumulation: int = option(1, "micro steps an optimizer step, >= 1")
    learning_rate: float = option(1e-4, "peak learning rate of AdamW, > 0")
    weight_decay: float = option(0.01, "AdamW, >= 0")
    beta1: float = option(0.9, "AdamW: memory of the gradient's mean, 0..1")
    beta2: float = option(0.999, "AdamW: memory of the gradient's square, 0..1")
    adam_eps: float = option(1e-8, "AdamW: added to the root of the square, > 0")
    warmup_steps: int = option(0, "steps over which the learning rate rises linearly from 0, >= 0")
    schedule: Literal["constant", "cosine"] = option("constant", "learning rate after the warm-up; cosine falls to 0")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this L2 norm; 0 = never")
    ema_decay: float = option(0.999, "memory of the moving average that is sampled and exported, 0..1; 0 = no average")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "autocast; fp16 needs a GPU")
    gradient_checkpointing: bool = option(False, "compute activations twice, to save memory")
    find_unused: bool = option(False, "several processes: set it if a step may leave parameters without gradient")
    seed: int = option(0, "of the data and of every random draw")
    save_every: int = option(1000, "steps between checkpoints; 0 = only at the end")
    keep_last: int = option(3, "checkpoints kept; 0 = all")
    log_every: int = option(50, "steps between lines of log.jsonl, >= 1")
    sample_every: int = option(0, "steps between sample pictures; 0 = none")
    tensorboard: bool = option(True, "write TensorBoard logs, if the package is installed")
    resume: str | None = option(None, '"latest", or a checkpoint folder, to continue a training')
    num_workers: int = option(2, "data processes for each training process, >= 0; 0 = in the process itself")
    compile: bool = option(False, "torch.compile the network: minutes at first, faster steps")
    cpu: bool = option(False, "train on the CPU even where there is a GPU")

    def __post_init__(self) -> None:
        for name, low, high in (("max_steps", 1, None), ("batch_size", 1, None), ("gradient_accumulation", 1, None),
                                ("learning_rate", 0, None), ("weight_decay", 0, None), ("beta1", 0, 1), ("beta2", 0, 1),
                                ("warmup_steps", 0, None), ("max_grad_norm", 0, None), ("ema_decay", 0, 1),
                                ("save_every", 0, None), ("keep_last", 0, None), ("log_every", 1, None),
                                ("sample_every", 0, None), ("num_workers", 0, None)):
            value = getattr(self, name)
            if value < low or (high is not None and value >= high):
                bound = f"at least {low}" + (f" and below {high}" if high is not None else "")
                raise ValueError(f"--{name} is {value}, but must be {bound}.")
        for name, choices in (("schedule", ("constant", "cosine")), ("mixed_precision", ("no", "bf16", "fp16"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}.")


def learning_rate_at(step: int, config: FitConfig) -> float:
    """Learning rate of optimizer step `step` (0 for the first).

    Linear warm-up, lr * (step + 1) / (warmup + 1) for step < warmup; then constant, or the half cosine
    lr / 2 * (1 + cos(pi * p)) with p = (step - warmup) / (max_steps - warmup).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def parse(config_class: type[Config], argv: Sequence[str] | None = None, description: str | None = None) -> Config:
    """A config dataclass from the command line: one option a field, help from the field's metadata.

    Args:
        config_class: a dataclass with fields made by `option`, e.g. a subclass of `FitConfig`.
        argv: arguments without the program's name; None = those of the process.
        description: head of ``--help``; None = the dataclass's docstring.
    Raises: SystemExit with a message on an unknown or malformed option.
    """
    parser = HfArgumentParser(config_class, description=description or config_class.__doc__)
    try:
        return parser.parse_args_into_dataclasses(args=None if argv is None else list(argv))[0]
    except ValueError as error:  # a value out of range, or arguments left over
        parser.error(str(error))
