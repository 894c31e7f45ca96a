"""SDXL's UNet with its time embedding open to the cross-attentions, and its layers under their published numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from .attention import Pass, SelfAttention, TextCrossAttention, TimeAwareCrossAttention
from .config import ResamplerConfig

Residuals = tuple[list[Tensor], Tensor]  # of the skips, first to last, and of the middle block


class ConditionedUNet(UNet2DConditionModel):
    """diffusers' UNet; call `evaluate`, which gives it a `Pass` in place of loose conditions."""

    def evaluate(self, x: Tensor, t: Tensor, step: Pass, residuals: Residuals | None = None) -> Tensor:
        """The UNet's output, (N, C, h, w).

        Args:
            x: (N, C, h, w). t: (N,) or a scalar, 0..999.
            residuals: of every skip and of the middle, as `Aggregator` gives them.
        """
        down, mid = residuals if residuals is not None else (None, None)
        return self(
            x,
            t,
            encoder_hidden_states=step.condition.prompt_embeds,  # the layers take their text from the condition
            cross_attention_kwargs={"step": step},
            added_cond_kwargs={"step": step},
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]

    def get_aug_embed(self, emb: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: dict[str, Any]) -> Tensor:
        """The embedding of text and size; the full time embedding is put into the pass on the way."""
        step: Pass = added_cond_kwargs["step"]
        (aug,) = step.spread(embed_text_and_size(self, step.condition, emb.dtype))
        step.temb = emb + aug
        return aug

    def cross_attentions(self) -> dict[int, Attention]:
        """Number in diffusers' order of attention layers -> layer, for all that look at the text."""
        return {i: layer for i, layer in enumerate(self.attentions()) if layer.is_cross_attention}

    def attentions(self) -> list[Attention]:
        """All attention layers as diffusers' `attn_processors` lists them: down blocks, up blocks, middle block."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def set_processors(self, resampler: ResamplerConfig | None) -> None:
        """Gives every attention its processor: time-aware ones with fresh weights if there is a resampler."""
        time_dim = self.time_embedding.linear_2.out_features
        for layer in self.attentions():
            if not layer.is_cross_attention:
                layer.set_processor(SelfAttention())
            elif resampler is None:
                layer.set_processor(TextCrossAttention())
            else:
                layer.set_processor(TimeAwareCrossAttention(layer.inner_dim, resampler.output_dim, time_dim))


def embed_text_and_size(network: nn.Module, condition: Any, dtype: torch.dtype) -> tuple[Tensor]:
    """SDXL's embedding of the pooled text and the sizes, (P, T), from `add_time_proj` and `add_embedding`."""

    def compute() -> tuple[Tensor]:
        sizes = network.add_time_proj(condition.time_ids.flatten()).reshape(len(condition), -1)
        return (network.add_embedding(torch.cat([condition.pooled.to(sizes), sizes], dim=-1).to(dtype)),)

    return condition.once((network, "text and size"), compute)


def build_unet(config: Mapping[str, Any]) -> ConditionedUNet:
    """A UNet with random weights from diffusers' config, on torch's default device."""
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    unet = ConditionedUNet(**known)
    unet.set_processors(None)
    return unet
