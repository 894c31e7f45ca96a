"""The Aggregator: encodes the LQ latent and a reference side by side into residuals for the UNet (InstantIR 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Condition
from .unet import Residuals, build_unet, embed_text_and_size

HIDDEN = 128  # channels inside a published SFT layer


class SFT(nn.Module):
    """Spatial feature transform (equation 6): h_res = (1 + alpha(h_lq)) h_ref + beta(h_lq)."""

    def __init__(self, channels: int, hidden: int = HIDDEN):
        super().__init__()
        self.mlp_shared = nn.Sequential(nn.Conv2d(channels, hidden, 3, padding=1), nn.SiLU())
        self.mul = nn.Conv2d(hidden, channels, 3, padding=1)
        self.add = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, both: Tensor) -> Tensor:
        """(B, C, 2h, w), the LQ half above the reference's -> (B, C, h, w)."""
        lq, reference = both.chunk(2, dim=-2)
        hidden = self.mlp_shared(lq)
        return reference * (1 + self.mul(hidden)) + self.add(hidden)


class Aggregator(nn.Module):
    """A copy of the UNet's down path and middle without cross-attentions, over two latents one above the other.

    Args:
        unet_config: diffusers' config of the UNet.
        hidden: channels inside an SFT layer.
    """

    def __init__(self, unet_config: Mapping[str, Any], hidden: int = HIDDEN):
        super().__init__()
        unet = build_unet(unet_config)
        for module in unet.modules():
            if isinstance(module, BasicTransformerBlock):
                module.attn2 = module.norm2 = None
        self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding
        self.add_time_proj, self.add_embedding = unet.add_time_proj, unet.add_embedding
        self.conv_in, self.ref_conv_in = unet.conv_in, nn.Conv2d(*_conv_sizes(unet.conv_in), padding=1)
        self.down_blocks, self.mid_block = unet.down_blocks, unet.mid_block
        widths = [self.conv_in.out_channels]
        for block in self.down_blocks:
            widths += [resnet.out_channels for resnet in block.resnets]
            widths += [sampler.out_channels for sampler in block.downsamplers or ()]
        self.controlnet_down_blocks = nn.ModuleList(_connector(width, hidden) for width in widths)
        self.controlnet_mid_block = _connector(self.mid_block.resnets[-1].out_channels, hidden)
        self.init_connectors()

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def init_connectors(self) -> None:
        """Zero 1x1 convolutions at the end: an untrained Aggregator changes nothing."""
        for _, zero in (*self.controlnet_down_blocks, self.controlnet_mid_block):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def init_random(self) -> None:
        """Fresh weights everywhere, the connectors' last layers zero."""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.init_connectors()

    def init_from(self, unet: Mapping[str, Tensor]) -> None:
        """Starts a training: the weights of the UNet's down path, the reference's input layer a copy of the LQ's.

        Args:
            unet: state of the UNet, without a LoRA.
        """
        own = self.state_dict()
        given = {name: value for name, value in unet.items() if name in own}
        given |= {f"ref_{name}": value for name, value in unet.items() if name.startswith("conv_in.")}
        self.load_state_dict(given, strict=False)

    def enable_gradient_checkpointing(self) -> None:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing, module._gradient_checkpointing_func = True, _checkpoint

    def forward(
        self, lq_latent: Tensor, reference: Tensor, t: Tensor, condition: Condition, rows: Tensor | None = None
    ) -> Residuals:
        """What to add to the UNet's skips and middle.

        Args:
            lq_latent, reference: (N, C, h, w), scaled; the reference is usually a preview.
            t: (N,) or a scalar, 0..999.
            condition: pooled text and sizes; rows: see `attention.Pass`.
        Returns: list of (N, C_i, h_i, w_i), and (N, C, h', w').
        """
        t = t.to(lq_latent.device).expand(len(lq_latent))
        emb = self.time_embedding(self.time_proj(t).to(self.dtype))
        (aug,) = embed_text_and_size(self, condition, self.dtype)
        emb = emb + (aug if rows is None else aug[rows])
        hidden = torch.cat([self.conv_in(lq_latent), self.ref_conv_in(reference)], dim=-2)
        skips = (hidden,)
        for block in self.down_blocks:
            hidden, states = block(hidden_states=hidden, temb=emb)
            skips += states
        hidden = self.mid_block(hidden, emb)
        down = [connector(skip) for connector, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return down, self.controlnet_mid_block(hidden)


def _connector(channels: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(SFT(channels, hidden), nn.Conv2d(channels, channels, 1))


def _conv_sizes(conv: nn.Conv2d) -> tuple[int, int, tuple[int, int]]:
    return conv.in_channels, conv.out_channels, conv.kernel_size


def _checkpoint(module: nn.Module, *args):
    return checkpoint(module.__call__, *args, use_reentrant=False)
