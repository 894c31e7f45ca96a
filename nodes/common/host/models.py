"""Networks under ComfyUI's memory management: it decides when one is on the device and when it has to leave."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management as management
import torch
from comfy.latent_formats import LatentFormat
from comfy.model_patcher import ModelPatcher
from torch import nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # as the loaders' widgets name them


@dataclass(frozen=True)
class HostedModel:
    """What goes over a FOURFOLD_<METHOD> socket."""

    method: str  # which sampler it is for, e.g. "dit4sr"
    patcher: ModelPatcher  # holds the network; reach it through `on_device`
    preview: LatentFormat | None = None  # how ComfyUI draws a preview of its latents; None = no preview

    @property
    def network(self) -> nn.Module:
        """For looking at its config; wherever it lies."""
        return self.patcher.model.network


# method -> its load_model(path), for Tiny Models; each method's comfy_nodes.py puts its own in
TINY_LOADERS: dict[str, Callable[[Path], HostedModel]] = {}


class HostedNetwork(nn.Module):
    """What ModelPatcher holds: it writes attributes of its own, such as `device`, which a network may use itself."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network


def pick_dtype(
    choice: str, parameters: int = 0, supported: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)
) -> torch.dtype:
    """The dtype of the weights: a name in `DTYPES`, or "default" = what ComfyUI would take for so many parameters.

    `supported` are the network's dtypes, the one it likes best first.
    """
    if choice in DTYPES:
        return DTYPES[choice]
    device = management.get_torch_device()
    found = management.unet_dtype(device, model_params=parameters, supported_dtypes=list(supported))
    return found if found in DTYPES.values() else torch.bfloat16  # --fp8_*-unet: for ComfyUI's own layers, which cast


def host(network: nn.Module, method: str, preview: LatentFormat | None = None) -> HostedModel:
    """Hands a network over to ComfyUI's memory management."""
    patcher = ModelPatcher(HostedNetwork(network), management.get_torch_device(), management.unet_offload_device())
    return HostedModel(method, patcher, preview)


@contextmanager
def on_device(model: HostedModel, memory_required: float = 0.0) -> Iterator[nn.Module]:
    """The network, on its device for the length of the block; other models are evicted as far as needed.

    Each call of the network, or of a part that lies directly in it, first looks whether the user has cancelled the run,
    and if so raises ComfyUI's exception.

    Args:
        model: from a loader.
        memory_required: bytes that the computation needs beside the weights.
    """
    patcher = model.patcher
    management.load_models_gpu([patcher], memory_required=memory_required, force_full_load=True)
    network, device = model.network, patcher.load_device
    stays = all(p.device.type == device.type for p in network.parameters())
    watches = [part.register_forward_pre_hook(_stop_if_cancelled) for part in (network, *network.children())]
    try:
        # With --novram ComfyUI leaves weights behind and expects layers that fetch them; ours come for the run.
        yield network if stays else network.to(device)
    finally:
        for watch in watches:
            watch.remove()
        if not stays:
            network.to(patcher.offload_device)


def _stop_if_cancelled(*_) -> None:
    management.throw_exception_if_processing_interrupted()


def require_method(model: HostedModel, method: str, node: str) -> HostedModel:
    """`model` if it is for `method`.

    Raises: ValueError that says which model is connected and which loader to use.
    """
    if model.method != method:
        raise ValueError(
            f"{node} needs a {method} model, but a {model.method} model is connected. Connect the {method} loader, or "
            f"choose the method '{method}' in Tiny Models."
        )
    return model
