"""What a DreamSR network and a DreamSR run are made of, with the values of the paper and, where it names none, ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Anchor = Literal["none", "lr"]
Spacing = Literal["uniform", "flux"]
PARTS = ("base", "control", "ra_lora")  # of the network, as files hold them


@dataclass(frozen=True)
class DreamSRConfig:
    """Sizes of the network. The first block of fields is FLUX's config.json; the second is ours."""

    in_channels: int = 64  # of a token: 2 x 2 latents
    num_layers: int = 19  # double blocks, text and picture apart
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096  # width of the text tokens
    pooled_projection_dim: int = 768  # width of the pooled text
    guidance_embeds: bool = True  # the network is told a guidance scale (FLUX.1-dev)
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)  # of a head: rotated by (text 0, row, column)

    control_layers: tuple[int, ...] = tuple(range(0, 18, 2))  # double blocks copied (9 of 19; not in the paper: which)
    lora_rank: int = 256  # of the RA-LoRA (paper 256); 0 = no RA-LoRA
    lora_alpha: int | None = None  # its factor is alpha / rank; None = 1 (not in the paper)
    t_dr: float = 1.0  # time that the degradation removal runs at, in (0, 1] (not in the paper)
    anchor: Anchor = "none"  # "lr": the output is a residual on the condition (tiny family; not in the paper)
    head_width: int = 0  # of a convolutional head over the output (tiny family; not in the paper); 0 = none
    latent_shift: float = 0.1159  # z = (z_vae - shift) * scale
    latent_scale: float = 0.3611

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        return self.in_channels // 4

    def __post_init__(self) -> None:
        if self.in_channels % 4:
            raise ValueError(f"in_channels is {self.in_channels}; a token holds 2 x 2 latents, so a multiple of 4.")
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(axis % 2 for axis in self.axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope is {self.axes_dims_rope}; three even numbers with the sum {self.attention_head_dim}, "
                "the width of a head, are expected."
            )
        layers = self.control_layers
        if list(layers) != sorted(set(layers)) or not set(layers) <= set(range(self.num_layers)):
            raise ValueError(
                f"control_layers is {layers}; rising numbers of double blocks, 0 to {self.num_layers - 1}, are "
                "expected."
            )
        if not 0 < self.t_dr <= 1:
            raise ValueError(f"t_dr is {self.t_dr}; a time in (0, 1] is expected (1 unless set).")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank is {self.lora_rank}; 1 or more is expected, or 0 for no RA-LoRA.")
        require("anchor", self.anchor, ("none", "lr"))

    def flux(self) -> dict[str, Any]:
        """The arguments of diffusers' FluxTransformer2DModel."""
        return {name: getattr(self, name) for name in FLUX_FIELDS}

    @classmethod
    def of_flux(cls, sizes: Mapping[str, Any], **own: Any) -> DreamSRConfig:
        """The config of a new network on a FLUX of these sizes: half of its double blocks copied, 0, 2, 4, ..."""
        sizes = {name: sizes[name] for name in FLUX_FIELDS}
        layers = tuple(range(0, sizes["num_layers"] - 1, 2))
        return cls(**sizes, **{"control_layers": layers} | own)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], **overrides: Any) -> DreamSRConfig:
        """Reads what `to_json` wrote; unknown fields are errors of the file, not passed over.

        Raises: ValueError.
        """
        values = dict(content) | overrides
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise ValueError(
                f"the config of a DreamSR network has no {', '.join(sorted(unknown))}; update Fourfold, or choose "
                "another file."
            )
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


FLUX_FIELDS = (
    "in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads",
    "joint_attention_dim", "pooled_projection_dim", "guidance_embeds", "axes_dims_rope",
)


def require(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; {' or '.join(map(repr, choices))} is expected.")


@dataclass(frozen=True)
class Sampling:
    """How a picture is drawn; the defaults are the paper's, or ours where it is silent (marked)."""

    steps: int = 16  # of the texture generation; the degradation removal is one more evaluation (paper 1 + 16)
    start: float = 0.8  # t that the texture generation starts from, in (0, 1] (paper 0.8)
    guidance: float = 3.5  # that the network is told (not in the paper: FLUX.1-dev's usual value)
    spacing: Spacing = "uniform"  # of the steps in t; "flux" = bent by its resolution shift (not in the paper)
    cfg: float = 1.0  # classifier-free guidance away from the negative prompt; 1 = none (not in the paper)
    removal: bool = True  # False leaves the degradation removal out: z_dr = z_lq
    tile: int = 64  # latents, side of a patch (paper: 512 px)
    overlap: int = 16  # latents, of neighbouring patches (not in the paper)
    tile_batch: int = 4  # patches per network call
    color_fix: Literal["adain", "wavelet", "none"] = "none"  # the paper names none
    multiple: int = 16  # pixels, the padded target is a multiple of this
    min_short_side: int = 512  # pixels, smaller targets are drawn at this size and shrunk

    def __post_init__(self) -> None:
        require("spacing", self.spacing, ("uniform", "flux"))
        if self.tile % 2:
            raise ValueError(f"the tile is {self.tile} latents; it must be even: a token is 2 x 2 latents.")


@dataclass(frozen=True)
class Preset:
    network: DreamSRConfig
    sampling: Sampling
    clean_captions: bool = True  # captions lose the sentences that describe damage (not in the paper)
    negative_prompt: str = ""  # used where cfg is not 1


PRESETS: dict[str, Preset] = {
    "full": Preset(DreamSRConfig(), Sampling()),
    "tiny": Preset(
        DreamSRConfig(
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=32,
            num_attention_heads=5,
            joint_attention_dim=128,
            pooled_projection_dim=128,
            guidance_embeds=False,  # not distilled: there is no scale that it could have learned
            axes_dims_rope=(4, 14, 14),
            control_layers=(0, 2),
            lora_rank=32,
            anchor="lr",
            head_width=64,
            latent_shift=0.0,
            latent_scale=1.0,
        ),
        Sampling(tile=32, overlap=8, tile_batch=8, color_fix="adain", multiple=8, min_short_side=128),
        clean_captions=False,
        negative_prompt="flat, blurred",  # in the words that its captions say of damaged pictures
    ),
}
