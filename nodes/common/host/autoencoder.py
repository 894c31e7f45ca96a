"""The tiny family's codec as a VAE object, which ComfyUI's own VAEEncode, VAEDecode and their tiled kin take."""

import comfy.model_management as management
import torch
from comfy.latent_formats import SD3, SD15, SDXL, LatentFormat
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor, nn

from ..autoencoder import to_vae
from ..codec import LinearCodec

_BYTES = 64.0  # of working memory for each value of the picture: room for sixteen float32 copies


class TinyVAE(VAE):
    """`comfy.sd.VAE` with the codec as its first stage.

    The parent is built as the VAE without weights that ComfyUI has for pixel-space models, so that it has every
    attribute that the running version expects; then what belongs to the codec is put in its place.
    """

    def __init__(self, codec: LinearCodec):
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
        self.first_stage_model = _FirstStage(codec.eval())
        self.downscale_ratio = self.upscale_ratio = codec.downscale
        self.latent_channels, self.output_channels, self.latent_dim = codec.latent_channels, 3, 2
        self.process_input = lambda pixels: pixels  # the codec takes and gives 0..1
        self.process_output = lambda pixels: pixels.clamp(0, 1)
        self.memory_used_encode = lambda shape, dtype: shape[1] * shape[2] * shape[3] * _BYTES
        self.memory_used_decode = lambda shape, dtype: 3 * shape[2] * shape[3] * codec.downscale**2 * _BYTES
        self.patcher = ModelPatcher(self.first_stage_model, self.device, management.vae_offload_device())


class _FirstStage(nn.Module):
    """What ModelPatcher holds: it writes attributes of its own, which need not fit the codec."""

    def __init__(self, codec: LinearCodec):
        super().__init__()
        self.codec = codec

    def encode(self, pixels: Tensor) -> Tensor:
        return self.codec.encode(pixels)

    def decode(self, latent: Tensor) -> Tensor:
        return self.codec.decode(latent)


class TinyLatents(LatentFormat):
    """How ComfyUI draws a preview of the codec's latents: one colour for each latent, linear in its channels."""

    def __init__(self, codec: LinearCodec, shift: float, scale: float):
        """`shift` and `scale` are those of the network whose latents are shown, z = (latent - shift) * scale."""
        self.latent_channels, self.scale_factor = codec.latent_channels, scale
        steps = torch.cat([torch.zeros(1, codec.latent_channels), torch.eye(codec.latent_channels)]) * _STEP
        flat = to_vae(steps, shift, scale)[:, :, None, None].expand(-1, -1, 3, 3)
        colors = 2 * codec.decode(flat).mean(dim=(2, 3)) - 1  # flat pictures, one for each channel; ComfyUI wants -1..1
        self.latent_rgb_factors = ((colors[1:] - colors[0]) / _STEP).tolist()
        self.latent_rgb_factors_bias = colors[0].tolist()


_STEP = 0.1  # of a channel from the flat grey picture: small, so that no colour is clamped


def sd3_latents() -> LatentFormat:
    """The preview of Stable Diffusion 3's latents."""
    return SD3()


def sdxl_latents() -> LatentFormat:
    """The preview of SDXL's latents."""
    return SDXL()


def sd1_latents() -> LatentFormat:
    """The preview of the latents of Stable Diffusion 1 and DiT."""
    return SD15()
