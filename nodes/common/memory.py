"""What running out of device memory looks like, and how to make room before trying again with less."""

import gc

import torch

# The name that every supported torch has; newer ones also call it torch.OutOfMemoryError.
OutOfMemory: type[Exception] = torch.cuda.OutOfMemoryError


def release_cached_memory() -> None:
    """Hands memory that nothing uses any more back to the device.

    Call it after the `except` block that caught `OutOfMemory`: inside it, the traceback still holds the failed tensors.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
