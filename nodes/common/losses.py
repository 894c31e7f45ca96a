"""Terms of losses that the tiny networks of several methods are trained with."""

from torch import Tensor


def edge_loss(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean absolute difference of the pictures' gradients, |d(restored - clean)/dx| + |d(restored - clean)/dy|.

    not in the paper: a small network that writes 8 x 8 px a token leaves steps between tokens, which the latent losses
    hardly see and this one does.

    Args:
        restored, clean: (B, C, H, W) in 0..1, H and W at least 2.
    """
    error = restored.float() - clean.float()
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
