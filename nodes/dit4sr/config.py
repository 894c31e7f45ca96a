"""What a DiT4SR network and a DiT4SR run are made of, with the values of the paper and of the published programs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from .prompts import NEGATIVE, POSITIVE

Variant = Literal["v1", "r1"]
Anchor = Literal["none", "lr"]
PUBLISHED_CLASS = "SD3Transformer2DModel"  # `_class_name` in the config.json of the published folders


@dataclass(frozen=True)
class Ablations:
    """The switches of the paper's table 3; the defaults are the full method."""

    lr_integration: bool = True  # False, case A: the LR stream attends only to itself
    lr_residual: bool = True  # False, case B: no shortcut around the LR stream's attention
    lr_injection: bool = True  # False, case C: nothing between the MLPs
    injection_layer: Literal["conv", "linear"] = "conv"  # "linear", case D: no neighbourhood in the injection

    def __post_init__(self) -> None:
        _require("injection_layer", self.injection_layer, ("conv", "linear"))


@dataclass(frozen=True)
class DiT4SRConfig:
    """Sizes of the network. The first block of fields is the published config.json; the second is ours."""

    sample_size: int = 128  # latents, side of the square that the position embedding's scale refers to
    patch_size: int = 2  # latents, side of a token
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096  # width of the text tokens
    caption_projection_dim: int = 1536  # width of the text stream; equals heads * head_dim
    pooled_projection_dim: int = 2048  # width of the pooled text
    pos_embed_max_size: int = 384  # tokens, side of the stored position embedding
    dual_attention_layers: tuple[int, ...] = tuple(range(13))
    qk_norm: str | None = "rms_norm"

    variant: Variant = "r1"  # "v1" reproduces a slip in the keys of the LR stream of the first published weights
    injection_scale: float = 1.2  # factor of the injection at inference (published code); 1.0 in training
    anchor: Anchor = "none"  # "lr": the output is a residual on the LR latent (tiny family; not in the paper)
    head_width: int = 0  # of a convolutional head over the output (tiny family; not in the paper); 0 = none
    shift: float = 3.0  # of the noise levels that are sampled at (FlowMatchEulerDiscreteScheduler)
    latent_shift: float = 0.0609  # z = (z_vae - shift) * scale
    latent_scale: float = 1.5305
    ablations: Ablations = field(default_factory=Ablations)

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def __post_init__(self) -> None:
        if self.caption_projection_dim != self.inner_dim:
            raise ValueError(
                f"caption_projection_dim is {self.caption_projection_dim}, but one attention over text and picture "
                f"needs heads * head_dim = {self.num_attention_heads} * {self.attention_head_dim} = {self.inner_dim}."
            )
        if not set(self.dual_attention_layers) <= set(range(self.num_layers)):
            raise ValueError(
                f"dual_attention_layers is {self.dual_attention_layers}, but the {self.num_layers} blocks are 0 to "
                f"{self.num_layers - 1}."
            )
        _require("qk_norm", self.qk_norm, ("rms_norm", None))
        _require("variant", self.variant, ("v1", "r1"))
        _require("anchor", self.anchor, ("none", "lr"))

    @classmethod
    def from_json(cls, content: Mapping[str, Any], **overrides: Any) -> DiT4SRConfig:
        """Reads the content of a config.json; our own fields lie under the key "fourfold" where they were written."""
        own = dict(content.get("fourfold", {}))
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in content.items() if k in known} | own | overrides
        if isinstance(values.get("ablations"), Mapping):
            values["ablations"] = Ablations(**values["ablations"])
        if "dual_attention_layers" in values:
            values["dual_attention_layers"] = tuple(values["dual_attention_layers"])
        if values.get("out_channels") is None:
            values["out_channels"] = values.get("in_channels", cls.in_channels)
        return cls(**values)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], **overrides: Any) -> DiT4SRConfig:
        """Reads the sizes off the weights, for a published file without its config.json.

        Args:
            shapes: name -> shape of every tensor. What the shapes cannot say (all but sizes) is as published.
        Raises: ValueError for weights in another layout than diffusers'.
        """
        needed = ("pos_embed.proj.weight", "proj_out.weight", "context_embedder.weight", "pos_embed.pos_embed")
        if missing := [name for name in needed if name not in shapes]:
            raise ValueError(
                f"the weights lack {', '.join(missing)}: they are not in diffusers' layout. Use the folder "
                "'transformer' of a diffusers model."
            )
        layers = [found for name in shapes if (found := re.match(r"transformer_blocks\.(\d+)\.(\w+)", name))]
        width, channels, patch, _ = shapes["pos_embed.proj.weight"]
        norm = shapes.get("transformer_blocks.0.attn.norm_q.weight")
        head_dim = norm[0] if norm else cls.attention_head_dim
        values = dict(
            patch_size=patch,
            in_channels=channels,
            out_channels=shapes["proj_out.weight"][0] // patch**2,
            num_layers=1 + max(int(layer[1]) for layer in layers),
            attention_head_dim=head_dim,
            num_attention_heads=width // head_dim,
            joint_attention_dim=shapes["context_embedder.weight"][1],
            caption_projection_dim=width,
            pooled_projection_dim=shapes["time_text_embed.text_embedder.linear_1.weight"][1],
            pos_embed_max_size=round(shapes["pos_embed.pos_embed"][1] ** 0.5),
            dual_attention_layers=tuple(sorted({int(layer[1]) for layer in layers if layer[2] == "attn2"})),
            qk_norm="rms_norm" if norm else None,
        )
        return cls(**values | overrides)

    def to_json(self) -> dict[str, Any]:
        """The published config.json, with our fields apart so that the published programs still read it."""
        content = asdict(self)
        content["dual_attention_layers"] = list(self.dual_attention_layers)
        own = {k: content.pop(k) for k in list(content) if k in _OWN_FIELDS}
        return {"_class_name": PUBLISHED_CLASS, **content, "fourfold": own}


def _require(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; {' or '.join(map(repr, choices))} is expected.")


_OWN_FIELDS = (
    "variant", "injection_scale", "anchor", "head_width", "shift", "latent_shift", "latent_scale", "ablations",
)


@dataclass(frozen=True)
class Sampling:
    """How a picture is drawn; the defaults are those of the paper and the published program."""

    steps: int = 40
    guidance: float = 8.0  # classifier-free guidance; 1 = one evaluation a step
    start_sigma: float = 1.0  # 0..1; 1 = pure noise, below 1 = the LR latent noised to this level
    tile: int = 64  # latents, side of a window
    overlap: int = 24  # latents, of neighbouring windows
    tile_batch: int = 4  # windows per network call
    color_fix: Literal["adain", "wavelet", "none"] = "adain"
    multiple: int = 16  # pixels, the padded target is a multiple of this
    min_short_side: int = 512  # pixels, smaller targets are drawn at this size and shrunk


@dataclass(frozen=True)
class Preset:
    network: DiT4SRConfig
    sampling: Sampling
    added_prompt: str = ""  # follows the caption
    negative_prompt: str = ""


PRESETS: dict[str, Preset] = {
    "full": Preset(DiT4SRConfig(), Sampling(), POSITIVE, NEGATIVE),
    "tiny": Preset(
        DiT4SRConfig(
            sample_size=32,
            num_layers=4,
            attention_head_dim=64,
            num_attention_heads=3,
            joint_attention_dim=128,
            caption_projection_dim=192,
            pooled_projection_dim=128,
            pos_embed_max_size=64,
            dual_attention_layers=(0,),
            injection_scale=1.0,
            anchor="lr",
            head_width=96,
            shift=1.0,
            latent_shift=0.0,
            latent_scale=1.0,
        ),
        Sampling(
            steps=2,
            guidance=1.3,
            start_sigma=1.0,
            tile=32,
            overlap=8,
            tile_batch=8,
            multiple=8,
            min_short_side=128,
        ),
        negative_prompt="flat, blurred",  # in the words that its captions say of damaged pictures
    ),
}
