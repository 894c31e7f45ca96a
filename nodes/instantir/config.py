"""What an InstantIR network and a run are made of, with the values of the paper and of the published program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from .prompts import NEGATIVE, POSITIVE

Prediction = Literal["epsilon", "v", "sample"]
Anchor = Literal["none", "lr"]
Adaptive = Literal["off", "paper", "release"]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of the DCP resampler; the defaults are the published ones."""

    embedding_dim: int = 1024  # width of the vision encoder's tokens
    dim: int = 1280  # width inside
    depth: int = 4  # layers
    dim_head: int = 64
    heads: int = 20
    num_queries: int = 64  # tokens that come out
    output_dim: int = 2048  # their width
    ff_mult: int = 4  # hidden width of the feed-forward, in units of `dim`

    @classmethod
    def from_shapes(cls, shapes: Shapes, dim_head: int) -> ResamplerConfig:
        """Reads the sizes off the weights of `image_proj`.

        Args:
            shapes: name -> shape, names without a prefix.
            dim_head: width of a head, the one size that shapes cannot tell.
        Raises: ValueError if a tensor is missing or `dim_head` does not divide the attention's width.
        """
        try:
            dim, embedding_dim = shapes["proj_in.weight"]
            inner = shapes["layers.0.0.to_q.weight"][0]
            hidden = shapes["layers.0.1.1.weight"][0]
            queries, output_dim = shapes["latents"][1], shapes["proj_out.weight"][0]
        except KeyError as error:
            raise ValueError(f"the resampler's weights lack {error}; this is no adapter of InstantIR.") from error
        if inner % dim_head:
            raise ValueError(
                f"dim_head is {dim_head}, but the resampler's attention is {inner} wide, which is no multiple of it. "
                "Give the width of a head that it was trained with (64 in the published weights)."
            )
        depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers."))
        return cls(embedding_dim, dim, depth, dim_head, inner // dim_head, queries, output_dim, hidden // dim)


@dataclass(frozen=True)
class PreviewerConfig:
    """The Previewer's LoRA: what is added is  alpha / rank * B A x."""

    rank: int = 64
    alpha: float = 1.0


@dataclass(frozen=True)
class InstantIRConfig:
    """All parts of a network. A part that is None (or False) is not there."""

    unet: dict[str, Any]  # diffusers' config of the UNet
    resampler: ResamplerConfig | None = None  # with it come the time-aware cross-attentions
    previewer: PreviewerConfig | None = None
    aggregator: bool = False
    aggregator_hidden: int = 128  # channels inside its SFT layers

    prediction: Prediction = "epsilon"  # what the UNet puts out; the tiny network's puts out the clean latent
    anchor: Anchor = "none"  # "lr": with the Aggregator it is a residual on the LQ latent (tiny; not in the paper)
    train_timesteps: int = 1000
    beta_start: float = 0.00085  # of the scaled-linear noise schedule
    beta_end: float = 0.012
    downscale: int = 8  # pixels per latent
    latent_shift: float = 0.0  # z = (z_vae - shift) * scale
    latent_scale: float = 0.13025

    def __post_init__(self) -> None:
        if self.prediction not in ("epsilon", "v", "sample"):
            raise ValueError(f"prediction is {self.prediction!r}; 'epsilon', 'v' or 'sample' is expected.")
        if self.anchor != "none" and (self.anchor, self.prediction) != ("lr", "sample"):
            raise ValueError(
                f"anchor is {self.anchor!r} and prediction {self.prediction!r}; 'none', or 'lr' with the prediction "
                "'sample', is expected: a residual on the LQ latent is a clean latent."
            )
        if self.unet.get("addition_embed_type") != "text_time":
            raise ValueError(
                f"the UNet's addition_embed_type is {self.unet.get('addition_embed_type')!r}; InstantIR needs "
                "'text_time', which the UNet of SDXL has. Give the UNet of an SDXL base model."
            )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> InstantIRConfig:
        """Reads what `to_json` wrote; unknown fields are left out."""
        values = {k: v for k, v in content.items() if k in {f.name for f in fields(cls)}}
        for name, part in (("resampler", ResamplerConfig), ("previewer", PreviewerConfig)):
            if values.get(name) is not None:
                values[name] = part(**values[name])
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Sampling:
    """How a picture is drawn; the defaults are those of the paper and the published program."""

    steps: int = 30
    guidance: float = 7.0  # classifier-free guidance; 1 = one evaluation a step
    scheduler: str = "ddim"  # a name of common.schedulers.SCHEDULERS
    preview_start: float = 0.0  # 0..1, the LQ latent is its own reference before this part of the steps
    creative_start: float = 1.0  # 0..1, the Aggregator rests after this part of the steps
    adaptive: Adaptive = "off"
    conditioning_scale: float = 1.0  # of the Aggregator's residuals
    image_scale: float = 1.0  # w of equation 3: of the cross-attention over the DCP tokens
    text_guided: bool = False  # the Previewer reads the prompt, too
    tile: int = 128  # latents, side of a window; 0 = no windows, the picture is drawn at most max_long_side large
    overlap: int = 32  # latents, of neighbouring windows (not in the paper: a quarter of the tile)
    tile_batch: int = 1  # windows per network call
    color_fix: Literal["adain", "wavelet", "none"] = "none"
    min_short_side: int = 768  # pixels; smaller pictures are drawn with a short side of this
    max_long_side: int = 1024  # pixels; drawn in one window up to this
    multiple: int = 64  # pixels, the drawn picture's sides are multiples of it
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # that brings the LQ picture to its size


@dataclass(frozen=True)
class Preset:
    network: InstantIRConfig
    sampling: Sampling
    prompt: str = ""  # where the user gives none; follows the caption, if there is one
    negative_prompt: str = ""
    captioned: bool = False  # pictures are captioned without being asked: the tiny networks learnt from captions


_COMMON_UNET = dict(
    _class_name="UNet2DConditionModel",
    addition_embed_type="text_time",
    use_linear_projection=True,
    flip_sin_to_cos=True,
    freq_shift=0,
)
SDXL_UNET: dict[str, Any] = _COMMON_UNET | dict(
    layers_per_block=2,
    in_channels=4,
    out_channels=4,
    sample_size=128,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),  # diffusers' name for the number of heads
    cross_attention_dim=2048,
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
TINY_UNET: dict[str, Any] = _COMMON_UNET | dict(  # 5.0 M values; a training step of 20 crops a second on one core
    layers_per_block=1,
    in_channels=16,
    out_channels=16,
    sample_size=32,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(96, 128),
    transformer_layers_per_block=1,
    attention_head_dim=(3, 4),
    cross_attention_dim=128,
    addition_time_embed_dim=32,
    projection_class_embeddings_input_dim=128 + 6 * 32,
)

PRESETS: dict[str, Preset] = {
    "full": Preset(
        InstantIRConfig(SDXL_UNET, ResamplerConfig(), PreviewerConfig(), aggregator=True),
        Sampling(),
        POSITIVE,
        NEGATIVE,
    ),
    "tiny": Preset(
        InstantIRConfig(
            TINY_UNET,
            ResamplerConfig(embedding_dim=128, dim=128, depth=2, dim_head=32, heads=4, num_queries=16, output_dim=128),
            PreviewerConfig(rank=8, alpha=8.0),  # a scale of one, so that a short training moves it
            aggregator=True,
            aggregator_hidden=32,
            prediction="sample",
            anchor="lr",
            downscale=4,
            latent_scale=1.0,
        ),
        Sampling(
            steps=1,
            guidance=1.0,
            scheduler="ddim trailing",
            tile=32,
            overlap=8,
            tile_batch=8,
            min_short_side=128,
            max_long_side=128,
            multiple=8,
            interpolation="bicubic",  # what it is trained with
        ),
        captioned=True,
    ),
}
