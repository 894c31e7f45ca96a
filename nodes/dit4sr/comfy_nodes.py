"""DiT4SR nodes: widgets and tensor layout only; the method is in restore.py."""

import math
from pathlib import Path

import torch
from comfy_api.latest import io

from ..common import tiny
from ..common.autoencoder import to_model, to_vae
from ..common.checkpoints import read_header, require_family
from ..common.host.conditioning import read_conditioning
from ..common.host.files import find_model, fingerprint, list_models
from ..common.host.models import DTYPES, TINY_LOADERS, HostedModel, host, on_device, pick_dtype, require_method
from ..common.host.progress import Report
from ..common.sampling import cpu_noise
from .model import PAGE, DiT4SRTransformer
from .restore import sample

CATEGORY = "Fourfold/DiT4SR"
FOLDERS = ("diffusion_models", "fourfold")  # where transformers are looked for, in this order
NOT_OURS = {file for part, file in tiny.FILES.items() if part != "dit4sr"}  # the rest of the tiny family
SD3_SHIFT = 0.0609  # of the latents of Stable Diffusion 3's VAE; the tiny codec has another
DiT4SRModel = io.Custom("FOURFOLD_DIT4SR")


def find_transformer(name: str) -> Path:
    """The chosen transformer, found to be one from its header.

    Raises: FileNotFoundError, CorruptCheckpointError, WrongFileError.
    """
    path = find_model(name, FOLDERS, "the DiT4SR transformer", PAGE)
    require_family(path, "dit4sr", name, f"Choose a transformer from {PAGE} or one that trainers/ wrote.")
    return path


def load_model(path: Path, variant: str = "auto", dtype: str = "default") -> HostedModel:
    """A transformer under ComfyUI's memory management (also what Tiny Models calls)."""
    parameters = sum(math.prod(shape) for _, shape in read_header(path).tensors.values())
    network = DiT4SRTransformer.from_pretrained(
        path, variant=None if variant == "auto" else variant, dtype=pick_dtype(dtype, parameters))
    return host(network, "dit4sr", _preview(network))


def _preview(network: DiT4SRTransformer):
    from ..common.host import autoencoder

    shift, scale = network.config.latent_shift, network.config.latent_scale
    if shift == SD3_SHIFT:
        return autoencoder.sd3_latents()
    return autoencoder.TinyLatents(tiny.load_codec(), shift, scale)


class DiT4SRLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldDiT4SRLoader",
            display_name="DiT4SR Loader",
            category=CATEGORY,
            description="Loads a DiT4SR transformer. Text encoders and VAE are those of Stable Diffusion 3.5 medium.",
            inputs=[
                io.Combo.Input("transformer", options=[name for name in list_models(FOLDERS) if name not in NOT_OURS],
                               tooltip="A folder (config.json and its weights) or a single file from "
                               "models/diffusion_models or models/fourfold."),
                io.Combo.Input("variant", options=["auto", "v1", "r1"], default="auto",
                               tooltip="Which network the weights were trained with. v1: dit4sr_f and dit4sr_q. r1: "
                               "dit4sr_r1 and everything trained here. auto: what the file or its folder's name says."),
                io.Combo.Input("dtype", options=["default", *DTYPES], default="default",
                               tooltip="Precision of the weights. default: bf16 where the device has it, else fp32."),
            ],
            outputs=[DiT4SRModel.Output("model", display_name="model", tooltip="For the MM-DiT-Control Sampler.")])

    @classmethod
    def validate_inputs(cls, transformer=None) -> bool | str:
        try:
            if transformer is not None:  # None: the name comes over a link
                find_transformer(transformer)
        except (OSError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, transformer=None, **rest) -> str:
        return fingerprint(find_transformer(transformer)) if transformer else ""

    @classmethod
    def execute(cls, transformer, variant, dtype) -> io.NodeOutput:
        return io.NodeOutput(load_model(find_transformer(transformer), variant, dtype))


class MMDiTControlSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldMMDiTControlSampler",
            display_name="MM-DiT-Control Sampler",
            category=CATEGORY,
            description="Restores a picture with DiT4SR: denoises beside the latent of the low-resolution picture, in "
            "windows where it is large. The defaults are the paper's; tiny models want others: see Tiny Models.",
            inputs=[
                DiT4SRModel.Input("model", tooltip="From DiT4SR Loader or Tiny Models."),
                io.Conditioning.Input("positive", tooltip="What is in the picture, and words of quality."),
                io.Conditioning.Input("negative", tooltip="What the picture must not be; not used at guidance 1."),
                io.Latent.Input("lr_latent", tooltip="VAE Encode of the picture from LR Prepare."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
                             tooltip="Same seed, same picture; picture b of a batch takes seed + b."),
                io.Int.Input("steps", default=40, min=1, max=200, tooltip="Denoising steps."),
                io.Float.Input("guidance", default=8.0, min=1.0, max=30.0, step=0.1,
                               tooltip="How strongly prompts steer; 1 = only the positive, half the time."),
                io.Float.Input("start_sigma", default=1.0, min=0.01, max=1.0, step=0.01,
                               tooltip="1 = from pure noise. Below 1 = from the input with this much noise: closer to "
                               "it, fewer invented details."),
                io.Float.Input("injection_scale", default=1.2, min=0.0, max=4.0, step=0.05,
                               tooltip="Weight of the low-resolution picture between the MLPs; higher = closer to it."),
                io.Int.Input("tile", default=64, min=8, max=512, step=2,
                             tooltip="Side of a window in latent pixels (8 image pixels each; 4 with tiny models); "
                             "an even number."),
                io.Int.Input("overlap", default=24, min=0, max=256,
                             tooltip="Of neighbouring windows, in latent pixels; less than the tile."),
                io.Int.Input("tile_batch", default=4, min=1, max=64,
                             tooltip="Windows per network call; halved by itself when memory runs out."),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="The result, for VAE Decode.")])

    @classmethod
    def validate_inputs(cls, tile=None, overlap=None) -> bool | str:
        if tile is not None and (not 8 <= tile <= 512 or tile % 2):  # named here, ComfyUI leaves their ranges to us
            return f"tile is {tile}; an even number from 8 to 512 latent pixels is expected."
        if overlap is not None and not 0 <= overlap <= 256:
            return f"overlap is {overlap}; 0 to 256 latent pixels are expected."
        if None not in (tile, overlap) and overlap >= tile:
            return f"overlap ({overlap}) must be smaller than tile ({tile}): lower the overlap or enlarge the tile."
        return True

    @classmethod
    def execute(cls, model, positive, negative, lr_latent, seed, steps, guidance, start_sigma, injection_scale, tile,
                overlap, tile_batch) -> io.NodeOutput:
        config = require_method(model, "dit4sr", "MM-DiT-Control Sampler").network.config
        widths = (config.joint_attention_dim, config.pooled_projection_dim)
        texts = [read_conditioning(c, *widths, _encoder(widths[0])) for c in (positive, negative)]
        latent = _checked(lr_latent["samples"], config.in_channels)
        z_lr = to_model(latent.float(), config.latent_shift, config.latent_scale)
        report = Report(steps, model)
        sides = z_lr.shape[-2:]
        latents = sides.numel() if max(sides) <= tile else tile_batch * min(tile, *sides) ** 2
        with on_device(model, _working_memory(model, latents * len(z_lr) * (1 if guidance == 1 else 2))) as network:
            z = sample(
                network, z_lr.to(network.device), cpu_noise(seed, z_lr.shape), *texts, steps=steps, guidance=guidance,
                start_sigma=start_sigma, injection_scale=injection_scale, tile=tile,
                overlap=overlap, tile_batch=tile_batch, on_step=report.on_step, on_window=report.on_window)
        return io.NodeOutput({"samples": to_vae(z.cpu(), config.latent_shift, config.latent_scale)})


def _working_memory(model: HostedModel, latents: int) -> float:
    """Bytes that one call on so many latents needs beside the weights, about 24 times its tokens (MLP, q, k and v)."""
    config = model.network.config
    return 24.0 * 2 * latents / config.patch_size**2 * config.inner_dim * model.network.dtype.itemsize


def _encoder(width: int) -> str:
    return "the CLIP of Stable Diffusion 3.5" if width == 4096 else "the CLIP of Tiny Models"


def _checked(latent: torch.Tensor, channels: int) -> torch.Tensor:
    if latent.dim() != 4 or latent.shape[1] != channels:
        raise ValueError(
            f"lr_latent is {tuple(latent.shape)}; expected (B, {channels}, h, w). Encode the picture with the VAE that "
            "belongs to the model: that of Stable Diffusion 3.5, or that of Tiny Models.")
    return latent


NODES = [DiT4SRLoader, MMDiTControlSampler]
TINY_LOADERS["dit4sr"] = load_model
