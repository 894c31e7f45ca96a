"""The InstantIR network: SDXL's UNet with DCP, Previewer and Aggregator (InstantIR section 3.2).

    model = InstantIR.load(unet="sdxl/unet", adapter="adapter.pt", aggregator="aggregator.pt",
                           previewer_lora="previewer_lora_weights.bin")
    tokens = model.resample(features)
    eps = model.denoise(x, t, prompt_embeds, pooled, time_ids, tokens)

For a loop over steps make a `Condition` once (`model.condition`) and call `epsilon`, `clean` and `residuals` with it:
what does not change with time is then computed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..common.schedulers import Level
from .attention import Condition, Pass
from .config import InstantIRConfig, ResamplerConfig
from .parts import InstantIRParts
from .previewer import preview_from
from .unet import Residuals
from .weights import load_parts, read_file, save_file, save_part


class InstantIR(InstantIRParts):
    """What the parts compute. Latents are scaled as in the config; timesteps are 0..999, any fraction."""

    def condition(
        self,
        prompt_embeds: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
        tokens: Tensor | None,
        previewer: bool = False,
        scale: float = 1.0,
        keep: bool = True,
    ) -> Condition:
        """What stays the same over the steps of P pictures; see `attention.Condition`.

        Args:
            previewer: this is for the Previewer: its LoRA will be on, `tokens` are from `resample(..., True)`.
            scale: w of equation 3.
            keep: whether to keep what is computed from it; False in training, where weights change.
        """
        self.previewing(previewer)  # says at once what is missing
        here = [None if x is None else x.to(self.device, self.dtype) for x in (prompt_embeds, pooled, tokens)]
        sizes = time_ids.to(self.device, torch.float32)
        return Condition(here[0], here[1], sizes, here[2], previewer, scale, {} if keep else None)

    def output(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        residuals: Residuals | None = None,
        rows: Tensor | None = None,
        anchor: Tensor | None = None,
    ) -> Tensor:
        """What the network predicts, epsilon, v or x0 ("sample") as the config says, (N, C, h, w), dtype of x.

        Args:
            x: x_t, variance preserving, (N, C, h, w).
            t: (N,) or a scalar.
            condition: of P pictures.
            residuals: the Aggregator's, scaled.
            rows: (N,) on the CPU, which picture a row of x is; None = row i is picture i mod P.
            anchor: of a network with `anchor = "lr"`: the LQ latents, (N, C, h, w), zero in rows without residuals. not
                in the paper: a small network then need not learn to copy its input.
        """
        step = Pass(condition, _rows(rows, len(x), condition))
        with self.previewing(condition.previewer):
            x_t, t = x.to(self.device, self.dtype), t.to(self.device)
            out = self.unet.evaluate(x_t, t, step, _like(residuals, self.dtype))
        return out.to(x) if anchor is None else anchor.to(x) + out.to(x)

    def epsilon(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        residuals: Residuals | None = None,
        rows: Tensor | None = None,
        level: Level | None = None,
        anchor: Tensor | None = None,
    ) -> Tensor:
        """Noise prediction; arguments as of `output`. `level`: alpha and sigma of x, None = the config's at t."""
        out = self.output(x, t, condition, residuals, rows, anchor)
        if self.config.prediction == "epsilon":
            return out
        alpha, sigma = self._at(t, x, level)
        return alpha * out + sigma * x if self.config.prediction == "v" else (x - alpha * out) / sigma

    def clean(
        self, x: Tensor, t: Tensor, condition: Condition, rows: Tensor | None = None, level: Level | None = None
    ) -> Tensor:
        """Clean latent from one evaluation (equation 2): the preview, if the condition is the Previewer's.

        The Previewer's answer goes through the consistency model's boundary condition, c_out x0 + c_skip x_t.
        """
        x0 = self.to_clean(self.output(x, t, condition, rows=rows), x, t, level)
        return preview_from(x, x0, t.to(x.device).expand(len(x))) if condition.previewer else x0

    def to_clean(self, output: Tensor, x: Tensor, t: Tensor, level: Level | None = None) -> Tensor:
        """x0 = (x_t - sigma epsilon) / alpha (equation 2), or alpha x_t - sigma v, or the output itself."""
        if self.config.prediction == "sample":
            return output
        alpha, sigma = self._at(t, x, level)
        return (x - sigma * output) / alpha if self.config.prediction == "epsilon" else alpha * x - sigma * output

    def residuals(
        self, lq_latent: Tensor, reference: Tensor, t: Tensor, condition: Condition, rows: Tensor | None = None
    ) -> Residuals:
        """The Aggregator's residuals for every skip and the middle; see `Aggregator.forward`."""
        if self.aggregator is None:
            raise ValueError("the network has no Aggregator: load it with aggregator=..., or add_aggregator().")
        if lq_latent.shape != reference.shape:
            raise ValueError(
                f"the LQ latent is {tuple(lq_latent.shape)}, the reference {tuple(reference.shape)}; expected equal."
            )
        lq, ref = (z.to(self.device, self.aggregator.dtype) for z in (lq_latent, reference))
        return self.aggregator(lq, ref, t.to(self.device), condition, _rows(rows, len(lq), condition))

    def alpha_sigma(self, t: Tensor) -> Level:
        """alpha and sigma of the network's own noise schedule at timesteps t; see `NoiseSchedule.alpha_sigma`."""
        return self.schedule.alpha_sigma(t)

    def _at(self, t: Tensor, x: Tensor, level: Level | None) -> Level:
        alpha, sigma = self.alpha_sigma(t.to(x.device)) if level is None else level
        return tuple(value.to(x).reshape(-1, 1, 1, 1) for value in (alpha, sigma))

    # The same with loose conditions

    def forward(
        self, x, t, prompt_embeds, pooled, time_ids, tokens=None, residuals=None, previewer=False, anchor=None
    ) -> Tensor:
        """`output` under conditions of as many rows as x; nothing is kept. For training."""
        condition = self.condition(prompt_embeds, pooled, time_ids, tokens, previewer, keep=False)
        return self.output(x, t, condition, residuals, anchor=anchor)

    def denoise(
        self,
        x: Tensor,
        t: Tensor,
        prompt_embeds: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
        tokens: Tensor | None = None,
        residuals: Residuals | None = None,
        previewer: bool = False,
        anchor: Tensor | None = None,
    ) -> Tensor:
        """Noise prediction, (N, C, h, w), whatever the UNet puts out.

        Args:
            x: x_t, (N, C, h, w). t: (N,) or a scalar.
            prompt_embeds, pooled, time_ids, tokens: see `attention.Condition`; one row or N.
            residuals: from `aggregate`, scaled. previewer: with the LoRA on.
        """
        condition = self.condition(prompt_embeds, pooled, time_ids, tokens, previewer, keep=False)
        return self.epsilon(x, t, condition, residuals, anchor=anchor)

    def preview(
        self, x: Tensor, t: Tensor, prompt_embeds: Tensor, pooled: Tensor, time_ids: Tensor, tokens: Tensor
    ) -> Tensor:
        """The Previewer's clean latent; `tokens` from `resample(features, previewer=True)`."""
        return self.clean(x, t, self.condition(prompt_embeds, pooled, time_ids, tokens, True, keep=False))

    def aggregate(self, lq_latent: Tensor, reference: Tensor, t: Tensor, pooled: Tensor, time_ids: Tensor) -> Residuals:
        """The Aggregator's residuals (list of the skips', the middle's), unscaled."""
        empty = pooled.new_zeros(len(pooled), 0, 0)
        return self.residuals(lq_latent, reference, t, self.condition(empty, pooled, time_ids, None, keep=False))

    # Files

    @classmethod
    def new(
        cls, unet: UNet2DConditionModel | Mapping[str, Any], resampler: ResamplerConfig | None = None, **fields: Any
    ) -> InstantIR:
        """A network for training: a base, and the DCP if `resampler` is given. Other parts: `add_previewer`, ...

        Args:
            unet: a UNet, whose weights are shared, or diffusers' config for one with random weights.
            fields: other fields of InstantIRConfig.
        """
        if isinstance(unet, Mapping):
            return cls(InstantIRConfig(dict(unet), resampler, **fields))
        with torch.device("meta"):
            model = cls(InstantIRConfig(dict(unet.config), **fields))
        model.unet.load_state_dict(unet.state_dict(), assign=True)
        if resampler is not None:
            model.add_adapter(resampler)
        return model

    @classmethod
    def load(
        cls,
        unet: str | Path,
        adapter: str | Path | None = None,
        aggregator: str | Path | None = None,
        previewer_lora: str | Path | None = None,
        *,
        dim_head: int | None = None,
        unet_config: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> InstantIR:
        """Loads the published files, or those that a trainer wrote. Sizes are read off the weights.

        Args:
            unet: SDXL's UNet: diffusers folder, or a single checkpoint in its makers' layout.
            adapter, aggregator, previewer_lora: files (or folders with one file); None = without that part.
            dim_head: width of the resampler's heads; None = as the file says, else as the UNet's (64 in both).
            unet_config: fields that replace those of the UNet's config.
            dtype: of the weights; None = float32.
        Raises: FileNotFoundError, CorruptCheckpointError, WrongFileError, MismatchedKeysError, ValueError.
        """
        return load_parts(cls, unet, adapter, aggregator, previewer_lora, dim_head, unet_config, dtype)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = None) -> InstantIR:
        """Loads the one file that `save_pretrained` writes. Raises: as `load`."""
        return read_file(cls, path, dtype)

    def save_pretrained(self, path: str | Path, state: Mapping[str, Tensor] | None = None, **summary: Any) -> None:
        """Writes all parts and the config to one safetensors file.

        Args:
            state: replaces weights of the same names in the module's state dict (an EMA, say).
            summary: step, licence, training and dtype for `checkpoints.save_checkpoint`.
        """
        save_file(self, path, state, **summary)

    def save_part(self, path: str | Path, part: str, state: Mapping[str, Tensor] | None = None, **summary: Any) -> None:
        """Writes "adapter", "aggregator" or "previewer" under its published keys; arguments as above."""
        save_part(self, path, part, state, **summary)


def _rows(rows: Tensor | None, count: int, condition: Condition) -> Tensor | None:
    """Which picture of the condition each of `count` rows is; None where it is one to one."""
    pictures, device = len(condition), condition.pooled.device
    if rows is not None:
        return None if torch.equal(rows, torch.arange(pictures)) else rows.to(device)
    if count == pictures:
        return None
    if count % pictures:
        raise ValueError(f"{count} rows of latents do not fit a condition of {pictures} pictures; give a multiple.")
    return torch.arange(pictures, device=device).repeat(count // pictures)


def _like(residuals: Residuals | None, dtype: torch.dtype) -> Residuals | None:
    return None if residuals is None else ([z.to(dtype) for z in residuals[0]], residuals[1].to(dtype))
