"""What InstantIR's nodes hand to one another: the sockets, and what goes over each.

Latents inside are scaled for the network; those that come and go over LATENT sockets are not. Everything lies on the
CPU and is brought to the device by the node that computes with it.
"""

from dataclasses import dataclass

from comfy_api.latest import io
from torch import Tensor

from ..common.autoencoder import to_model
from ..common.host.conditioning import Conditioning, read_conditioning
from ..common.host.models import HostedModel
from ..common.text import TextEmbedding
from .config import InstantIRConfig
from .resampler import DCPTokens

CATEGORY = "Fourfold/InstantIR"
InstantIRModel = io.Custom("FOURFOLD_INSTANTIR")  # HostedModel
DINOModel = io.Custom("FOURFOLD_DINO")  # HostedModel
DINOFeatures = io.Custom("FOURFOLD_DINO_FEATURES")  # Features
Tokens = io.Custom("FOURFOLD_DCP_TOKENS")  # ImageTokens
Previewer = io.Custom("FOURFOLD_PREVIEWER")  # PreviewerHandle
Aggregator = io.Custom("FOURFOLD_AGGREGATOR")  # AggregatorHandle


@dataclass(frozen=True)
class Features:
    """Tokens of DINOv2, (B, 1 + N, C): of the pictures, and of the all-zero normalised one (B = 1)."""

    image: Tensor
    null: Tensor


@dataclass(frozen=True)
class ImageTokens:
    """DCP tokens of the pictures and of the all-zero one; weight: w of equation 3."""

    image: DCPTokens
    null: DCPTokens
    weight: float

    def __len__(self) -> int:
        return len(self.image.tokens)


@dataclass(frozen=True)
class PreviewerHandle:
    """The Previewer as the sampler uses it. text: what it reads; None = the sampler's own prompts (text-guided)."""

    model: HostedModel
    tokens: ImageTokens
    text: TextEmbedding | None


@dataclass(frozen=True)
class AggregatorHandle:
    """The Aggregator as the sampler uses it; the settings are those of `sample`. reference: None = previews."""

    model: HostedModel
    lq_latent: Tensor
    reference: Tensor | None
    conditioning_scale: float
    preview_start: float
    creative_start: float
    adaptive: str


def scaled_latent(latent: dict, config: InstantIRConfig, name: str) -> Tensor:
    """A LATENT as the network takes it, (B, C, h, w).

    Raises: ValueError for a latent of another VAE, or of a size that the network cannot halve often enough.
    """
    samples: Tensor = latent["samples"]
    channels, halvings = config.unet["in_channels"], 2 ** (len(config.unet["block_out_channels"]) - 1)
    if samples.dim() != 4 or samples.shape[1] != channels:
        raise ValueError(
            f"{name} is {tuple(samples.shape)}; expected (B, {channels}, h, w). Encode the picture with the VAE that "
            "belongs to the model: that of SDXL, or that of Tiny Models."
        )
    if any(side % halvings for side in samples.shape[-2:]):
        raise ValueError(
            f"{name} is {tuple(samples.shape[-2:])} latents high and wide; both must be multiples of {halvings}. Let "
            f"LR Prepare pad the picture to a multiple of {max(64 if channels == 4 else 8, halvings)} pixels."
        )
    return to_model(samples.float(), config.latent_shift, config.latent_scale)


def read_prompts(conditioning: Conditioning, config: InstantIRConfig) -> list[tuple[TextEmbedding, float]]:
    """A CONDITIONING's prompts with their shares; see `read_conditioning`."""
    unet = config.unet
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    width = unet["cross_attention_dim"]
    encoder = "the CLIP of an SDXL checkpoint" if width == 2048 else "the CLIP of Tiny Models"
    return read_conditioning(conditioning, width, pooled, encoder)


def on_cpu(tokens: DCPTokens) -> DCPTokens:
    return DCPTokens(*(None if x is None else x.cpu() for x in (tokens.tokens, tokens.previewer)))


def working_memory(model: HostedModel, latents: int) -> float:
    """Bytes that one call on so many latents needs beside the weights.

    Sixty-four copies of the widest feature map: what ComfyUI reserves for SDXL's UNet, and the Aggregator's twice as
    high ones beside it.
    """
    network = model.network
    return 64.0 * latents * network.config.unet["block_out_channels"][0] * network.dtype.itemsize


def same_model(handle: PreviewerHandle | AggregatorHandle | None, model: HostedModel, node: str) -> None:
    """Raises: ValueError if a handle was made from a model of another kind than the sampler has.

    It need not be the same object: ComfyUI may have dropped a model and loaded it anew, and kept the handle.
    """
    if handle is not None and handle.model.network.config != model.network.config:
        raise ValueError(
            f"the {node} was made from another model than the sampler's. Connect one InstantIR Loader (or Tiny Models) "
            "to all of them."
        )
