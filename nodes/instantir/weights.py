"""InstantIR's files: the published ones part by part, and one file with everything.

| in a file | in the module |
|---|---|
| `image_proj.<name>` | `resampler.<name>` |
| `ip_adapter.<i>.<name>` | `unet.<attention layer i>.processor.<name>` |
| aggregator's names | `aggregator.<name>` |
| LoRA: `unet.<module>.lora_A.weight`, ... | see `previewer.py` |

The file with everything holds `unet.`, `image_proj.`, `ip_adapter.`, `aggregator.` and `previewer.` + LoRA names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common import checkpoints
from ..common.errors import MismatchedKeysError
from ..common.sdxl_unet import read_sdxl_unet
from .config import InstantIRConfig, PreviewerConfig, ResamplerConfig
from .previewer import load_lora, plain_state, published_lora, read_lora

if TYPE_CHECKING:
    from .model import InstantIR

State = Mapping[str, Tensor]
PAGE = "https://huggingface.co/InstantX/InstantIR"
PARTS = {  # part -> family, name of the published file
    "adapter": ("instantir_adapter", "adapter.pt"),
    "aggregator": ("instantir_aggregator", "aggregator.pt"),
    "previewer": ("instantir_previewer", "previewer_lora_weights.bin"),
}
_ADAPTER_PARTS = ("image_proj.", "ip_adapter.")
_SFT = "controlnet_mid_block.0.mlp_shared.0.weight"  # (channels inside an SFT layer, ...)


def load_parts(
    model_class: type[InstantIR],
    unet: str | Path,
    adapter: str | Path | None,
    aggregator: str | Path | None,
    previewer_lora: str | Path | None,
    dim_head: int | None,
    unet_config: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
) -> InstantIR:
    """See `InstantIR.load`."""
    given = {"adapter": adapter, "aggregator": aggregator, "previewer": previewer_lora}
    files = {part: find_part(path, part) for part, path in given.items() if path is not None}
    headers = {part: _header(file, part) for part, file in files.items()}
    base, config = read_sdxl_unet(unet, unet_config)
    parts = {part: checkpoints.load_state(files[part]) for part in headers}
    shown = {"unet": unet, **files}

    resampler = None
    if "adapter" in parts:
        own = headers["adapter"].config
        shapes = {
            name.removeprefix("image_proj."): tuple(value.shape)
            for name, value in parts["adapter"].items()
            if name.startswith("image_proj.")
        }
        resampler = ResamplerConfig.from_shapes(shapes, dim_head or own.get("dim_head") or _head_width(config))
    alpha = headers["previewer"].config.get("alpha", 1.0) if "previewer" in headers else 1.0
    network = InstantIRConfig(config, resampler, aggregator="aggregator" in parts)
    if (shared := parts.get("aggregator", {}).get(_SFT)) is not None:
        network = replace(network, aggregator_hidden=len(shared))
    return _assemble(model_class, network, {"unet": base, **parts}, shown, alpha, dtype)


def read_file(model_class: type[InstantIR], path: str | Path, dtype: torch.dtype | None) -> InstantIR:
    """See `InstantIR.from_pretrained`."""
    path = checkpoints.require_file(Path(path).expanduser(), "the InstantIR checkpoint", str(Path(path).parent), PAGE)
    header = checkpoints.read_header(path)
    checkpoints.require_family(header, "instantir", path, "Choose a file that a training of InstantIR wrote here.")
    config = InstantIRConfig.from_json(header.config)
    state = checkpoints.load_state(path)
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "adapter": {}, "aggregator": {}, "previewer": {}}
    for name, value in state.items():
        first, rest = name.split(".", 1)
        if first in ("unet", "aggregator", "previewer"):
            parts[first][rest] = value
        else:
            parts["adapter"][name] = value
    parts = {part: values for part, values in parts.items() if values}
    alpha = config.previewer.alpha if config.previewer else 1.0
    return _assemble(model_class, config, parts, dict.fromkeys(parts, path), alpha, dtype)


def _assemble(
    model_class: type[InstantIR],
    config: InstantIRConfig,
    parts: Mapping[str, State],
    sources: Mapping[str, Any],
    alpha: float,
    dtype: torch.dtype | None,
) -> InstantIR:
    """A network of these parts, each matched strictly."""
    with torch.device("meta"):
        model = model_class(config)
    parts = {part: {k: _cast(v, dtype) for k, v in state.items()} for part, state in parts.items()}
    base = dict(parts["unet"])
    if model.resampler is not None:
        adapter = parts.get("adapter", {})
        head = _under(adapter, "image_proj.")
        strange = [name for name in adapter if not name.startswith(_ADAPTER_PARTS)]
        checkpoints.load_strict(model.resampler, head | dict.fromkeys(strange, torch.empty(0)), sources["adapter"])
        base |= _processor_state(model.unet, _under(adapter, "ip_adapter."), sources["adapter"])
    checkpoints.load_strict(model.unet, base, sources["unet"])
    if model.aggregator is not None:
        source = sources.get("aggregator", sources["unet"])
        checkpoints.load_strict(model.aggregator, parts.get("aggregator", {}), source)
    if "previewer" in parts:
        lora, modules, rank = read_lora(parts["previewer"], sources["previewer"])
        unknown = sorted(set(modules) - {name for name, _ in model.named_modules()})
        if unknown:
            raise MismatchedKeysError(
                f"{sources['previewer']} adapts {len(unknown)} modules that are not there: "
                f"{checkpoints.shorten(unknown)}. Load it with the UNet and the adapter that it was made for."
            )
        model.add_previewer(PreviewerConfig(rank, alpha), modules, on_meta=True)
        load_lora(model, lora, sources["previewer"])
    return model.eval().requires_grad_(False)


def published_state(model: InstantIR, state: State | None = None) -> dict[str, dict[str, Tensor]]:
    """The weights by part ("unet", "adapter", "aggregator", "previewer") under the names of the published files."""
    current = model.state_dict()
    unknown = sorted(set(state or {}) - set(current))
    if unknown:
        raise ValueError(f"the weights to save hold names that the network lacks: {checkpoints.shorten(unknown)}.")
    current.update(state or {})
    parts: dict[str, dict[str, Tensor]] = {"previewer": published_lora(current)}
    plain = plain_state(current)
    parts["aggregator"] = _under(plain, "aggregator.")
    parts["adapter"] = {f"image_proj.{k}": v for k, v in _under(plain, "resampler.").items()}
    numbers = {f"{name}.processor.": i for i, name in _attention_names(model.unet).items()}
    parts["unet"] = {}
    for name, value in _under(plain, "unet.").items():
        layer = re.match(r".+\.processor\.", name)
        if layer:
            parts["adapter"][f"ip_adapter.{numbers[layer[0]]}.{name.removeprefix(layer[0])}"] = value
        else:
            parts["unet"][name] = value
    return parts


def save_file(model: InstantIR, path: str | Path, state: State | None = None, **summary: Any) -> None:
    """See `InstantIR.save_pretrained`."""
    parts = published_state(model, state)
    joined = dict(parts["adapter"])
    for part in ("unet", "aggregator", "previewer"):
        joined |= {f"{part}.{name}": value for name, value in parts[part].items()}
    checkpoints.save_checkpoint(path, joined, method="instantir", config=model.config.to_json(), **summary)


def save_part(model: InstantIR, path: str | Path, part: str, state: State | None = None, **summary: Any) -> None:
    """See `InstantIR.save_part`. Raises: ValueError if there is no such part."""
    if part not in PARTS:
        raise ValueError(f"there is no part {part!r}; choose one of {', '.join(PARTS)}.")
    weights = published_state(model, state)[part]
    if not weights:
        raise ValueError(f"the network has no {part} to save.")
    config = {"adapter": model.config.resampler, "previewer": model.config.previewer}.get(part)
    checkpoints.save_checkpoint(
        path, weights, method=PARTS[part][0], config=asdict(config) if config else {}, **summary
    )


def find_part(path: str | Path, part: str) -> Path:
    """The file of a part: `path` itself, or in a folder that of the published name, .safetensors or not.

    Raises: FileNotFoundError that says where it belongs and where it comes from.
    """
    path = Path(path).expanduser()
    family, name = PARTS[part]
    if not path.is_dir():
        return checkpoints.require_file(path, checkpoints.FAMILIES[family], str(path.parent), PAGE)
    for file in (path / name, (path / name).with_suffix(".safetensors")):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{path / name} does not exist. Download {', '.join(published for _, published in PARTS.values())} from "
        f"{PAGE} into this folder (the page keeps them in `models`). Nothing is downloaded by itself."
    )


def _header(path: Path, part: str) -> checkpoints.Header:
    family, name = PARTS[part]
    header = checkpoints.read_header(path)
    checkpoints.require_family(header, family, path, f"Choose {name} of {PAGE}, or a file that its trainer wrote.")
    return header


def _processor_state(unet: nn.Module, adapter: State, source: Any) -> dict[str, Tensor]:
    """`<i>.to_k_ip.weight` and so on -> the UNet's names."""
    names = _attention_names(unet)
    numbers = {int(name.split(".", 1)[0]) for name in adapter}
    if numbers != set(names):
        raise MismatchedKeysError(
            f"{source} does not fit the UNet: it holds cross-attentions {sorted(numbers)[:6]}... ({len(numbers)}), the "
            f"UNet has {sorted(names)[:6]}... ({len(names)}). Use the base model that the adapter was made for (SDXL)."
        )
    split = (name.split(".", 1) for name in adapter)
    return {f"{names[int(i)]}.processor.{rest}": adapter[f"{i}.{rest}"] for i, rest in split}


def _attention_names(unet: nn.Module) -> dict[int, str]:
    """Number of a cross-attention -> its name in the UNet."""
    names = {id(module): name for name, module in unet.named_modules()}
    return {i: names[id(layer)] for i, layer in unet.cross_attentions().items()}


def _head_width(unet_config: Mapping[str, Any]) -> int:
    """Width of the heads in the UNet's deepest blocks."""
    heads = unet_config["attention_head_dim"]  # diffusers' name for their number
    return unet_config["block_out_channels"][-1] // (heads if isinstance(heads, int) else heads[-1])


def _under(state: State, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype or torch.float32) if value.is_floating_point() else value
