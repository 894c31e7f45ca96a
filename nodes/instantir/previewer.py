"""The Previewer: a LoRA that turns the UNet and the resampler into a one-step generator (InstantIR section 3.2).

The layers are peft's. They stay beside the weights they adapt and are switched on and off, nothing is merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..common.errors import MismatchedKeysError, WrongFileError
from ..common.weight_files import shorten
from .config import PreviewerConfig

ADAPTER = "previewer"  # peft's name for the LoRA
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # of the boundary condition
_RESAMPLER = "unet.encoder_hid_proj.image_projection_layers.0."  # published name of `resampler.`
_HALVES = {"lora_A": "lora_A", "lora_B": "lora_B", "lora.down": "lora_A", "lora.up": "lora_B"}
_KEY = re.compile(r"(?P<module>unet\..+)\.(?P<half>lora_A|lora_B|lora\.down|lora\.up)\.weight")
_LORA_KEY = re.compile(rf"(?P<module>.+)\.(?P<half>lora_[AB])\.{ADAPTER}\.weight")
_ADAPTED = re.compile(
    r"unet\..*(\.to_q|attn1\.to_[kv]|\.to_out\.0|\.to_[kv]_ip|\.ln_[kv]_ip\.linear|\.proj_in|\.proj_out|\.ff\.net\.0\.proj"
    r"|\.ff\.net\.2|\.conv1|\.conv2|\.conv_shortcut|samplers\.0\.conv|\.time_emb_proj)"
    r"|resampler\.(proj_in|proj_out|layers\.\d+\.0\.(to_q|to_kv|to_out))"
)


def boundary_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of the consistency model's boundary condition (Song et al. 2023, appendix C).

    c_skip = d^2 / (s^2 + d^2),  c_out = s / sqrt(s^2 + d^2),  s = 10 t, d = 0.5: at t = 0 the output is the input.

    Args:
        t: timesteps in 0..999, any shape.
    """
    scaled = TIMESTEP_SCALING * t
    norm = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm**0.5


class LoraSwitch:
    """Turns peft's layers inside `network` on and off; off, their outputs are those of the plain layers, bit by bit."""

    def __init__(self, network: nn.Module):
        self.layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        self.on = True
        self.turn(False)

    def turn(self, on: bool) -> None:
        if on == self.on:
            return
        for layer in self.layers:  # peft's enable_adapters would also decide anew what trains, at 25 times the cost
            layer._disable_adapters = not on
        self.on = on

    @contextmanager
    def turned(self, on: bool) -> Iterator[None]:
        """On or off inside the block, afterwards as before."""
        before = self.on
        self.turn(on)
        try:
            yield
        finally:
            self.turn(before)


def adapted_modules(network: nn.Module) -> list[str]:
    """Names of the modules that the published LoRA adapts, in a network with `unet` and `resampler`."""
    layers = (nn.Linear, nn.Conv2d)
    return [name for name, module in network.named_modules() if _ADAPTED.fullmatch(name) and isinstance(module, layers)]


def inject(network: nn.Module, modules: list[str], config: PreviewerConfig, on_meta: bool = False) -> LoraSwitch:
    """Puts LoRA layers (A random, B zero) around `modules` and returns their switch, off.

    peft freezes every other weight of the network.

    Args:
        on_meta: the LoRA's weights are made on the meta device, to be loaded.
    """
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=modules, lora_dropout=0.0)
    inject_adapter_in_model(lora, network, ADAPTER, low_cpu_mem_usage=on_meta)
    return LoraSwitch(network)


def read_lora(state: Mapping[str, Tensor], source: object) -> tuple[dict[str, Tensor], list[str], int]:
    """A published LoRA file in our names.

    Args:
        state: `unet.<module>.lora_A.weight` and so on, or `lora.down` and `lora.up`; both forms may be mixed.
        source: the file, for errors.
    Returns: state with the names that peft gives the layers, the names of the adapted modules, the rank.
    Raises: WrongFileError for other keys or several ranks.
    """
    found, ranks = {}, set()
    strange = [name for name in state if not _KEY.fullmatch(name)]
    if strange or not state:
        raise WrongFileError(
            f"{source} is no Previewer LoRA: it holds {shorten(strange) or 'nothing'}, where names like "
            "unet.<module>.lora_A.weight or unet.<module>.lora.down.weight are expected."
        )
    for name, value in state.items():
        match = _KEY.fullmatch(name)
        half = _HALVES[match["half"]]
        found[f"{_own_name(match['module'])}.{half}.{ADAPTER}.weight"] = value
        ranks.add(value.shape[0] if half == "lora_A" else value.shape[1])
    if len(ranks) != 1:
        raise WrongFileError(f"{source} holds LoRA layers of the ranks {sorted(ranks)}; one rank is expected.")
    modules = sorted({_LORA_KEY.fullmatch(name)["module"] for name in found})
    return found, modules, ranks.pop()


def load_lora(network: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Loads what `read_lora` gave into the injected layers; every name and shape must match."""
    own = {name: p for name, p in network.named_parameters() if is_lora(name)}
    wrong = sorted(set(own) ^ set(state)) + [n for n in own if n in state and own[n].shape != state[n].shape]
    if wrong:
        raise MismatchedKeysError(
            f"{source} does not fit the network in {len(wrong)} layers: {shorten(wrong)}. Choose the LoRA that was "
            "made for this UNet and this adapter."
        )
    network.load_state_dict(dict(state), strict=False, assign=any(p.is_meta for p in own.values()))


def published_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA in a network's state dict, under its published names."""
    found = {}
    for name, value in state.items():
        if match := _LORA_KEY.fullmatch(name):
            module = match["module"].replace(".processor.", ".")
            if module.startswith("resampler."):
                module = _RESAMPLER + module.removeprefix("resampler.")
            found[f"{module}.{match['half']}.weight"] = value
    return found


def is_lora(name: str) -> bool:
    """Whether a parameter of this name is the LoRA's."""
    return _LORA_KEY.fullmatch(name) is not None


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the LoRA, under the names it had before the LoRA was put in."""
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if not is_lora(name)}


def _own_name(module: str) -> str:
    if module.startswith(_RESAMPLER):
        return "resampler." + module.removeprefix(_RESAMPLER)
    return re.sub(r"\.attn2\.(?=(to_[kv]_ip|ln_[kv]_ip))", ".attn2.processor.", module)


def preview_from(x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """c_out x0 + c_skip x_t: the preview of latents x at timesteps t (B,), in float32 at least."""
    t = t.to(torch.promote_types(x.dtype, torch.float32))
    c_skip, c_out = (c[:, None, None, None] for c in boundary_scalings(t))
    return (c_out * x0 + c_skip * x).to(x.dtype)
