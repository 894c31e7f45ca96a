"""SDXL's UNet from a diffusers folder or from a single file in its makers' layout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor

from . import checkpoints
from .errors import MismatchedKeysError

MAKERS_PREFIX = "model.diffusion_model."
PAGE = "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0"
POOLED_WIDTH = 1280  # of SDXL's pooled text
SIZES = 6  # numbers of the size conditioning
HEAD_DIM, NORM_GROUPS = 64, 32  # what shapes cannot tell

Shapes = Mapping[str, tuple[int, ...]]


def read_sdxl_unet(
    path: str | Path, overrides: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights in diffusers' names and diffusers' config of an SDXL UNet.

    Args:
        path: folder of a pipeline, its `unet` folder, a file inside it (config.json beside), or a single checkpoint
            in the makers' layout (with or without VAE and text encoders).
        overrides: fields of the config that replace what was read or inferred.
    Raises: FileNotFoundError, CorruptCheckpointError; WrongFileError for a checkpoint of another family;
        MismatchedKeysError for a single file that is not complete.
    """
    path = Path(path).expanduser()
    path = path / "unet" if (path / "unet").is_dir() else path
    checkpoints.require_file(path, "the UNet of SDXL", str(path.parent), PAGE)
    header = checkpoints.read_header(path)
    checkpoints.require_family(header, "sdxl", path, f"Choose an SDXL base model, for example {PAGE}.")
    shapes = {name: shape for name, (_, shape) in header.tensors.items()}
    makers = {
        name.removeprefix(MAKERS_PREFIX): shape
        for name, shape in shapes.items()
        if "input_blocks." in name or "label_emb." in name
    }
    if makers:
        config = unet_config_from_shapes(makers) | dict(overrides or {})
        state = checkpoints.load_state(path)
        inside = {name: value for name, value in state.items() if name.startswith(MAKERS_PREFIX)}
        inside = inside or {f"{MAKERS_PREFIX}{name}": value for name, value in state.items()}
        try:
            return convert_ldm_unet_checkpoint(inside, config), config
        except KeyError as error:
            raise MismatchedKeysError(f"{path} is not complete: {error} is missing. Download it again.") from error
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json. A diffusers UNet is a folder with config.json and its weights: give the "
            f"folder 'unet' of {PAGE}, or a single SDXL checkpoint."
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | dict(overrides or {})
    return checkpoints.load_state(path), config


def unet_config_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """diffusers' config of an SDXL-like UNet from the shapes in its makers' layout.

    Heads of 64, normalisation in 32 groups and SDXL's pooled text (1280 wide) are taken for granted.

    Args:
        shapes: name -> shape, without `model.diffusion_model.`; those of `input_blocks` and `label_emb` are enough.
    """
    widths, depths, level = [], [], []
    count = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks."))
    for i in range(1, count + 1):
        resnet = shapes.get(f"input_blocks.{i}.0.out_layers.3.weight")
        if resnet is not None:
            level.append(resnet[0])
            depth = len(
                {
                    m[1]
                    for name in shapes
                    if (m := re.match(rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.", name))
                }
            )
        else:  # the downsampler behind a level, or the end
            widths.append(level[0])
            depths.append(depth)
            layers, level = len(level), []
    cross = [d > 0 for d in depths]
    projection = next(shape for name, shape in shapes.items() if name.endswith(".1.proj_in.weight"))
    added = shapes["label_emb.0.0.weight"][1]
    return dict(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["input_blocks.0.0.weight"][1],
        sample_size=128,
        addition_embed_type="text_time",
        layers_per_block=layers,
        block_out_channels=tuple(widths),
        down_block_types=tuple("CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross),
        up_block_types=tuple("CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)),
        transformer_layers_per_block=tuple(max(1, d) for d in depths),
        attention_head_dim=tuple(max(1, width // HEAD_DIM) for width in widths),
        norm_num_groups=NORM_GROUPS,
        cross_attention_dim=next(shape[1] for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight")),
        projection_class_embeddings_input_dim=added,
        addition_time_embed_dim=(added - POOLED_WIDTH) // SIZES,
        use_linear_projection=len(projection) == 2,
        flip_sin_to_cos=True,
        freq_shift=0,
    )
