"""Which device to compute on where none is named."""

import torch


def best_device() -> torch.device:
    """CUDA where there is one, else Apple's GPU (mps), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
