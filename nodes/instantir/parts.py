"""The parts of InstantIR: a base to which adapter, Previewer and Aggregator are added, one after the other."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..common.schedulers import NoiseSchedule
from .aggregator import Aggregator
from .config import InstantIRConfig, PreviewerConfig, ResamplerConfig
from .previewer import LoraSwitch, adapted_modules, inject, is_lora, plain_state
from .resampler import DCPTokens, Resampler
from .unet import build_unet


class InstantIRParts(nn.Module):
    """UNet, DCP, Previewer and Aggregator: which are there, how one is added to the others, what is trained."""

    def __init__(self, config: InstantIRConfig):
        """A network with random weights; of the config's parts all but the Previewer's LoRA (see `add_previewer`)."""
        super().__init__()
        self.config = replace(config, previewer=None)
        self.unet = build_unet(config.unet)
        self.resampler = self.aggregator = None
        self.switch: LoraSwitch | None = None
        self.schedule = NoiseSchedule(config.beta_start, config.beta_end, config.train_timesteps)
        if config.resampler is not None:
            self.add_adapter(config.resampler)
        if config.aggregator:
            self.add_aggregator(copy=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    def add_adapter(self, config: ResamplerConfig) -> None:
        """Adds the DCP: resampler and time-aware cross-attentions, with fresh weights."""
        if self.switch is not None:
            raise ValueError("the Previewer's LoRA covers the adapter: add the adapter first, then the Previewer.")
        self.resampler = Resampler(config)
        self.unet.set_processors(config)
        self.config = replace(self.config, resampler=config)
        self._follow_base(self.resampler, *(layer.processor for layer in self.unet.cross_attentions().values()))

    def add_previewer(
        self, config: PreviewerConfig | int = 64, modules: list[str] | None = None, on_meta: bool = False
    ) -> None:
        """Adds the Previewer's LoRA (B zero: it changes nothing yet) and freezes all other weights, as peft does.

        Args:
            config: rank, or rank and alpha.
            modules: names of the adapted modules; None = those of the published LoRA.
            on_meta: the LoRA's weights are made on the meta device, to be loaded.
        """
        if self.switch is not None:
            raise ValueError("the network has a Previewer already.")
        config = PreviewerConfig(config) if isinstance(config, int) else config
        self.switch = inject(self, modules or adapted_modules(self), config, on_meta)
        self.config = replace(self.config, previewer=config)

    def add_aggregator(self, copy: bool = True) -> None:
        """Adds the Aggregator; with `copy`, its weights begin as the UNet's (without the Previewer's LoRA)."""
        with torch.device("meta"):  # the UNet's up path is built as well and thrown away
            self.aggregator = Aggregator(self.config.unet, self.config.aggregator_hidden)
        self.config = replace(self.config, aggregator=True)
        if self.unet.conv_in.weight.is_meta:
            return
        self.aggregator.to_empty(device=self.device).to(self.dtype).init_random()
        if copy:
            self.aggregator.init_from(plain_state(self.unet.state_dict()))

    def _follow_base(self, *parts: nn.Module) -> None:
        """Puts new parts where the UNet is, in its precision."""
        for part in parts:
            part.to(dtype=self.dtype) if self.unet.conv_in.weight.is_meta else part.to(self.device, self.dtype)

    def previewing(self, on: bool = True) -> AbstractContextManager:
        """The Previewer's LoRA on (or off) inside the block, afterwards as before.

        All methods below switch it by themselves. Training with gradient checkpointing needs the block around forward
        and backward, because layers run again in backward.
        Raises: ValueError if there is no LoRA to switch on.
        """
        if self.switch is None:
            if on:
                raise ValueError("the network has no Previewer: load it with previewer_lora=..., or add_previewer().")
            return nullcontext()
        return self.switch.turned(on)

    def resample(self, features: Tensor, previewer: bool = False) -> Tensor:
        """DCP tokens of the vision encoder's (B, 1+N, D) features: (B, Q, D'). The Previewer has its own."""
        if self.resampler is None:
            raise ValueError("the network has no adapter: load it with adapter=..., or add_adapter().")
        with self.previewing(previewer):
            return self.resampler(features.to(self.device, self.resampler.latents.dtype))

    def perceive(self, features: Tensor) -> DCPTokens:
        """Both kinds of DCP tokens (`resample`), once a picture."""
        return DCPTokens(self.resample(features), self.resample(features, True) if self.switch else None)

    def part_parameters(self, part: str) -> dict[str, nn.Parameter]:
        """What the training of a part trains, by name in this module: "adapter", "previewer", "aggregator" or "unet".

        Raises: ValueError for another name or a part that is not there.
        """
        named = dict(self.named_parameters())
        lora = {name for name in named if is_lora(name)}
        chosen = {
            "adapter": {n for n in named if n.startswith("resampler.") or ".processor." in n} - lora,
            "previewer": lora,
            "aggregator": {n for n in named if n.startswith("aggregator.")},
            "unet": {n for n in named if n.startswith("unet.") and ".processor." not in n} - lora,
        }
        if not chosen.get(part):
            there = ", ".join(name for name, found in chosen.items() if found)
            raise ValueError(f"the network has no part {part!r} to train; it has {there}.")
        return {name: named[name] for name in named if name in chosen[part]}
