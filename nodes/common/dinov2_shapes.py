"""DINOv2's config from the shapes of its weights, for a single file without the config.json beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from transformers import Dinov2Config, Dinov2WithRegistersConfig

HEAD_DIM = 64  # of every published DINOv2: what shapes cannot tell
_RATIO = 4  # of the feed-forward's width to the network's, in every published DINOv2


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Dinov2Config | Dinov2WithRegistersConfig:
    """The config that transformers builds the network from.

    Heads of 64 are taken for granted; narrower networks have one head.

    Args:
        shapes: name -> shape of every tensor, in transformers' names.
    Raises: ValueError if a tensor that tells a size is missing.
    """
    try:
        width, _, patch, _ = shapes["embeddings.patch_embeddings.projection.weight"]
        positions = shapes["embeddings.position_embeddings"][1] - 1
    except KeyError as error:
        raise ValueError(f"the weights lack {error}; expected a DINOv2 in the names that transformers uses.") from error
    layers = {int(match[1]) for name in shapes if (match := re.match(r"encoder\.layer\.(\d+)\.", name))}
    registers = shapes.get("embeddings.register_tokens")
    sizes = dict(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // HEAD_DIM),
        patch_size=patch,
        image_size=round(positions**0.5) * patch,
        mlp_ratio=_RATIO,
        use_swiglu_ffn="encoder.layer.0.mlp.fc1.weight" not in shapes,
    )
    if registers is None:
        return Dinov2Config(**sizes)
    return Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers[1])
