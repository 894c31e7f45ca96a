"""Which device to compute on, and how networks share one that does not hold them all at once."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .memory import release_cached_memory

GET_TORCH = "https://pytorch.org/get-started/locally/"
WEIGHTS_SHARE = 0.75  # of the free memory of a device that weights may take; the rest is for computing


def best_device() -> torch.device:
    """CUDA where there is one, else Apple's GPU (mps), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device of this name: "cpu", "cuda", "cuda:1", "mps" or "xpu"; None = the best there is.

    Raises: ValueError for another name, or for a device that this torch does not see, with the devices that it does.
    """
    if name is None:
        return best_device()
    kind, _, index = str(name).partition(":")
    if kind not in _COUNTS or not (index.isdecimal() or str(name) == kind):
        raise ValueError(f"there is no device {str(name)!r}. {_here()}; cuda:0, cuda:1, ... are the first, the second "
                         "GPU of NVIDIA (or AMD, with ROCm), mps is Apple's, xpu Intel's.")
    count = _COUNTS[kind]()
    if count == 0:
        raise ValueError(f"the device is {str(name)!r}, but this torch ({torch.__version__}) sees no {kind} device: "
                         f"{_why_not(kind)} {_here()}.")
    if index and int(index) >= count:
        raise ValueError(f"the device is {str(name)!r}, but there are only {kind}:0 to {kind}:{count - 1}." if count > 1
                         else f"the device is {str(name)!r}, but there is only one: {kind}.")
    return torch.device(str(name))


def _count_xpu() -> int:
    return torch.xpu.device_count() if hasattr(torch, "xpu") and torch.xpu.is_available() else 0


_COUNTS = {
    "cpu": lambda: 1,
    "cuda": lambda: torch.cuda.device_count() if torch.cuda.is_available() else 0,
    "mps": lambda: int(torch.backends.mps.is_available()),
    "xpu": _count_xpu,
}


def _here() -> str:
    return f"On this machine there is {', '.join(kind for kind, count in _COUNTS.items() if count())}"


def _why_not(kind: str) -> str:
    if kind != "cuda":
        return "it was built without it, or the machine has none."
    if torch.version.cuda is None and torch.version.hip is None:
        return f"it was built without CUDA. For an NVIDIA GPU install a build with CUDA, see {GET_TORCH}."
    return "it finds no GPU or no driver. `nvidia-smi` must list the GPU, with a driver that is new enough."


def must_offload(modules: Iterable[nn.Module], device: torch.device | str) -> bool:
    """Whether networks have to take turns on a device, as their weights together would leave too little room on it.

    Only of CUDA devices does torch know the free memory; on others nothing is offloaded.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return False
    weights = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    free, _ = torch.cuda.mem_get_info(device)
    return sum(tensor.nbytes for tensor in weights.values()) > WEIGHTS_SHARE * free


@contextmanager
def on_device(module: nn.Module, device: torch.device | str, offload: bool) -> Iterator[nn.Module]:
    """Brings a network to a device for the length of the block.

        with on_device(text_encoder, "cuda", offload=True):
            positive = text_encoder.encode(prompts)
        with on_device(transformer, "cuda", offload=True): ...  # the text encoder has left

    With `offload` it leaves again, also after an error: the weights that it came with are put back, they are not copied
    from the device, so what the block changes in them is lost. This is for inference. Tensors that the block keeps stay
    where they are. Without `offload` the network is moved if need be, and stays.

    Args:
        module: network with its weights on the CPU, or wherever they are to be between the blocks.
        device: where the block computes.
        offload: one network at a time on the device.
    """
    home = [(tensors, dict(tensors)) for part in module.modules() for tensors in (part._parameters, part._buffers)]
    weights = [(parameter, parameter.data) for parameter in module.parameters()]
    try:
        yield module.to(device)
    finally:
        if offload:
            for parameter, data in weights:
                parameter.data = data
            for tensors, before in home:
                tensors.update(before)
            release_cached_memory()
