"""LPIPS (Zhang et al. 2018) as a training loss, by the package `lpips`; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

BACKBONES = {  # network -> file of its weights, in torch.hub's folder `checkpoints`
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
CHOICES = ("none", *BACKBONES)
_PAGE = "https://download.pytorch.org/models/"
_INSTEAD = "or leave the perceptual loss out with --perceptual none"


class PerceptualDistance(nn.Module):
    """LPIPS of pictures in 0..1, mean over the batch; it lets gradients through and has none itself."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stays in evaluation mode: LPIPS has dropout."""
        return super().train(False)

    def forward(self, restored: Tensor, clean: Tensor) -> Tensor:
        """Two pictures (B, 3, H, W) in 0..1, sides of at least 32 px -> scalar, 0 = equal."""
        with torch.autocast(restored.device.type, enabled=False):
            return self.network(restored.float(), clean.float(), normalize=True).mean()


def load_perceptual(name: str) -> PerceptualDistance | None:
    """LPIPS with a backbone, or None for "none".

    Args:
        name: "none", "vgg" (the usual one for training), "alex" or "squeeze".
    Raises: ValueError for another name; RuntimeError if a package is missing; FileNotFoundError naming the backbone's
        file where its weights are not on disk.
    """
    if name == "none":
        return None
    if name not in BACKBONES:
        raise ValueError(f"the perceptual loss is {name!r}; expected one of {', '.join(CHOICES)}.")
    try:
        import lpips
    except ImportError as error:
        raise RuntimeError(
            f"the perceptual loss needs the packages lpips and torchvision ({error}): pip install lpips torchvision; "
            f"{_INSTEAD}."
        ) from error
    file = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[name]
    if not file.is_file():
        raise FileNotFoundError(
            f"the perceptual loss needs the weights of its backbone: {file} does not exist. Download "
            f"{_PAGE}{file.name} to that place, {_INSTEAD}. Nothing is downloaded by itself."
        )
    return PerceptualDistance(lpips.LPIPS(net=name, verbose=False))
