"""What an InstanceRSR network and an InstanceRSR run are made of, with the values of the paper and of DiT-XL/2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

PredictionKind = Literal["epsilon", "v", "x0"]
Anchor = Literal["none", "lr"]
Spacing = Literal["leading", "trailing"]


@dataclass(frozen=True)
class Ablations:
    """The switches of the paper's table 2; the defaults are the full method."""

    representation_learning: bool = True  # False, case 1: neither alignment nor instance-scale loss
    mask_modelling: bool = True  # False, case 2: the latent is the picture's alone


@dataclass(frozen=True)
class InstanceRSRConfig:
    """Sizes of the network. The first block of fields is DiT's config.json; the second is ours."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4  # of one latent; the network sees twice as many, picture and map
    num_layers: int = 28
    patch_size: int = 2  # latents, side of a token
    sample_size: int = 64  # latents, side of the square that the position embedding refers to
    num_embeds_ada_norm: int = 1000  # classes of the base; the class after the last one is "none", the only one used
    norm_eps: float = 1e-5

    learned_variance: bool = True  # the base's second output; kept, not trained on
    control_blocks: int = 10  # not in the paper: of the ControlNet branch; up to the block that is aligned
    align_block: int = 10  # blocks behind which the features are taken (paper 10, figure 4a)
    align_hidden: int = 2048  # not in the paper: width inside the MLP head
    align_dim: int = 1024  # of the DINOv2 features: small 384, base 768, large 1024, giant 1536
    prediction: PredictionKind = "epsilon"  # what the network emits (paper: epsilon); `forward` always gives epsilon
    anchor: Anchor = "none"  # "lr": x0 = [z_y, 0] + output (tiny family; not in the paper)
    head_width: int = 0  # of a convolutional head over the output (tiny family; not in the paper); 0 = none
    latent_shift: float = 0.0  # z = (z_vae - shift) * scale
    latent_scale: float = 0.18215
    ablations: Ablations = field(default_factory=Ablations)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def joint_channels(self) -> int:
        """Channels of the joint latent [z_x, z_m]; without mask modelling those of z_x."""
        return self.in_channels * (2 if self.ablations.mask_modelling else 1)

    @property
    def out_channels(self) -> int:
        """Channels that the network emits: [eps_x, eps_m, var_x, var_m], or without the variances."""
        return self.joint_channels * (2 if self.learned_variance else 1)

    @property
    def null_class(self) -> int:
        return self.num_embeds_ada_norm

    def __post_init__(self) -> None:
        for name in ("control_blocks", "align_block"):
            value = getattr(self, name)
            if not 1 <= value <= self.num_layers:
                raise ValueError(f"{name} is {value}, but must be in 1..{self.num_layers}, the number of blocks.")
        _require("prediction", self.prediction, ("epsilon", "v", "x0"))
        _require("anchor", self.anchor, ("none", "lr"))
        if self.anchor == "lr" and self.prediction != "x0":
            raise ValueError(
                f"anchor 'lr' reads the output as a residual of the clean latent and needs prediction 'x0'; it is "
                f"{self.prediction!r}."
            )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> InstanceRSRConfig:
        """Reads the config of a checkpoint that was written here.

        Raises: ValueError naming fields that this version does not know.
        """
        values, known = dict(content), {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"the config has fields that this version does not know: {', '.join(unknown)}. Update.")
        values["ablations"] = Ablations(**values.get("ablations", {}))
        return cls(**values)

    @classmethod
    def from_base(cls, content: Mapping[str, Any], **own: Any) -> InstanceRSRConfig:
        """Reads the config.json of a DiT.

        Args:
            content: of the file.
            own: our own fields.
        Raises: ValueError if it is of another kind of transformer.
        """
        if content.get("norm_type", "ada_norm_zero") != "ada_norm_zero" or not content.get("attention_bias", True):
            raise ValueError(
                f"norm_type is {content.get('norm_type')!r} and attention_bias {content.get('attention_bias')!r}; "
                "a DiT has 'ada_norm_zero' and true. Give the folder of a DiT, such as facebook/DiT-XL-2-512."
            )
        sizes = {name: content[name] for name in _BASE_FIELDS if name in content}
        channels = sizes.get("in_channels", cls.in_channels)
        emitted = content.get("out_channels") or channels
        if emitted not in (channels, 2 * channels):
            raise ValueError(f"the DiT emits {emitted} channels from {channels}; expected as many, or twice as many.")
        return cls(**sizes, **{"learned_variance": emitted == 2 * channels, **own})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_BASE_FIELDS = (
    "num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "patch_size", "sample_size",
    "num_embeds_ada_norm", "norm_eps",
)  # fmt: skip


def _require(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; {' or '.join(map(repr, choices))} is expected.")


@dataclass(frozen=True)
class Sampling:
    """How a picture is drawn; the defaults are those of the paper."""

    steps: int = 10  # of DDIM (paper 10)
    start: float = 1.0  # 0..1; 1 = pure noise, below 1 = the LR latent noised to this share of the schedule
    spacing: Spacing = "leading"  # of the timesteps: from 900 to 0 (as DiT's scheduler is published) or from 999 to 99
    tiling: bool = True  # windows beyond `min_short_side`; False = drawn at that size and enlarged, as in the paper
    tile: int = 64  # latents, side of a window: 512 px
    overlap: int = 24  # latents, of neighbouring windows; not in the paper
    tile_batch: int = 4  # windows per network call
    color_fix: Literal["adain", "wavelet", "none"] = "none"  # the paper has none
    multiple: int = 16  # pixels, the padded target is a multiple of this
    min_short_side: int = 512  # pixels, smaller targets are drawn at this size and shrunk
    min_area: int = 64  # not in the paper: pixels, smaller spots of the map are noise and go to their neighbours


@dataclass(frozen=True)
class Preset:
    network: InstanceRSRConfig
    sampling: Sampling


PRESETS: dict[str, Preset] = {
    "full": Preset(InstanceRSRConfig(), Sampling()),
    "tiny": Preset(
        InstanceRSRConfig(
            num_attention_heads=3,
            attention_head_dim=64,
            in_channels=16,
            num_layers=5,
            sample_size=32,
            num_embeds_ada_norm=1,
            learned_variance=False,
            control_blocks=3,
            align_block=3,
            align_hidden=256,
            align_dim=128,
            prediction="x0",
            anchor="lr",
            head_width=96,
            latent_scale=1.0,
        ),
        Sampling(spacing="trailing", tile=32, overlap=8, tile_batch=8, multiple=8, min_short_side=128, min_area=24),
    ),
}
