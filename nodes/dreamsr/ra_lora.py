"""RA-LoRA: the LoRA that turns FLUX into a one-step degradation remover, and back (DreamSR section 3.2).

A layer computes  W x + (alpha / rank) B A x  while it is on and  W x  while it is off. Nothing is merged, and turning
it on or off moves no weight. B starts at zero, so that a new LoRA changes nothing.
"""

from __future__ import annotations

import re

import peft
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import DreamSRConfig

NAME = "ra_lora"
# not in the paper: which layers. All linears of attention and MLP in all blocks; no modulation, no embedder.
TARGETS = (
    r"(single_)?transformer_blocks\.\d+\."
    r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)
_MATRIX = re.compile(rf"^base\.(?P<layer>.*)\.(?P<matrix>lora_[AB])\.{NAME}\.weight$")


def add_ra_lora(transformer: nn.Module, config: DreamSRConfig) -> None:
    """Adds the LoRA, turned off, to FLUX's blocks in place; on the meta device if they are there.

    FLUX's own weights require a gradient, or not, as before: peft would freeze them.
    """
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=0.0,
        target_modules=TARGETS,
    )
    trained = [(parameter, parameter.requires_grad) for parameter in transformer.parameters()]
    on_meta = trained[0][0].is_meta
    inject_adapter_in_model(settings, transformer, adapter_name=NAME, low_cpu_mem_usage=on_meta)
    for parameter, wanted in trained:
        parameter.requires_grad_(wanted)
    switch(transformer, False)


def switch(module: nn.Module, on: bool) -> None:
    """Turns the LoRA of the layers in a module on or off.

    peft's own `enable_adapters` would also decide what requires a gradient, which is the trainer's business.
    Raises: RuntimeError if peft has another way to turn its layers off.
    """
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._disable_adapters = not on
            if layer.disable_adapters == on:
                raise RuntimeError(f"peft {peft.__version__} does not let the RA-LoRA be switched; install peft 0.21.")


def file_name(name: str) -> str:
    """Name in a file of a weight of the network: without what peft adds to it.

    "base.<layer>.base_layer.weight" -> "base.<layer>.weight"; "base.<layer>.lora_A.ra_lora.weight" ->
    "ra_lora.<layer>.lora_A.weight".
    """
    if found := _MATRIX.match(name):
        return f"ra_lora.{found['layer']}.{found['matrix']}.weight"
    return name.replace(".base_layer.", ".")
