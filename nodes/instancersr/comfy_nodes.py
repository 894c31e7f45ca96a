"""InstanceRSR nodes: widgets and tensor layout only; the method is in restore.py. Loader, sampler, and all NODES."""

import math
from pathlib import Path

import torch
from comfy_api.latest import io

from ..common import tiny
from ..common.autoencoder import to_model, to_vae
from ..common.checkpoints import read_header
from ..common.host.files import find_model, fingerprint, list_models
from ..common.host.models import DTYPES, TINY_LOADERS, HostedModel, host, on_device, pick_dtype, require_method
from ..common.host.outputs import nothing
from ..common.host.progress import Report
from ..common.sampling import cpu_noise
from . import comfy_instances
from .comfy_instances import CATEGORY
from .config import InstanceRSRConfig
from .model import InstanceRSR, find_network, read_config
from .restore import halves, sample

FOLDERS = ("diffusion_models", "fourfold")  # where networks are looked for, in this order
ORIGIN = "where it was trained (trainers/train_instancersr.py makes one; none are published)"
TILES = (8, 512)  # latents, of a window
_NOT_OURS = {file for part, file in tiny.FILES.items() if part != "instancersr"}  # the rest of the tiny family
InstanceRSRModel = io.Custom("FOURFOLD_INSTANCERSR")  # HostedModel


def find_file(name: str) -> Path:
    """The chosen network, found from its header to be one: a file, or the one that lies in a folder.

    Raises: FileNotFoundError, CorruptCheckpointError, WrongFileError, ValueError.
    """
    path = find_network(find_model(name, FOLDERS, "the InstanceRSR network", ORIGIN))
    read_config(path)
    return path


def load_model(path: Path, dtype: str = "default") -> HostedModel:
    """A network under ComfyUI's memory management (also what Tiny Models calls)."""
    values = sum(math.prod(shape) for _, shape in read_header(path).tensors.values())
    network = InstanceRSR.from_pretrained(path, pick_dtype(dtype, values))
    return host(network, "instancersr", _preview(network.config))


def _preview(config: InstanceRSRConfig):
    from ..common.host import autoencoder

    if config.in_channels == 4:
        return autoencoder.sd1_latents()
    return autoencoder.TinyLatents(tiny.load_codec(), config.latent_shift, config.latent_scale)


class InstanceRSRLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldInstanceRSRLoader",
            display_name="InstanceRSR Loader",
            category=CATEGORY,
            description="Loads an InstanceRSR network that Fourfold trained; none are published. Its VAE is that of "
            "Stable Diffusion 1: Load VAE.",
            inputs=[
                io.Combo.Input("network", options=[name for name in list_models(FOLDERS) if name not in _NOT_OURS],
                               tooltip="A file, or a folder with instancersr.safetensors in it, from "
                               "models/diffusion_models or models/fourfold."),
                io.Combo.Input("dtype", options=["default", *DTYPES], default="default",
                               tooltip="Precision of the weights. default: bf16 where the device has it, else fp32."),
            ],
            outputs=[InstanceRSRModel.Output("model", display_name="model", tooltip="For InstanceRSR Sampler.")])

    @classmethod
    def validate_inputs(cls, network=None) -> bool | str:
        try:
            if network is not None:  # None: the name comes over a link
                find_file(network)
        except (OSError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, network=None, **rest) -> str:
        return fingerprint(find_file(network)) if network else ""

    @classmethod
    def execute(cls, network, dtype) -> io.NodeOutput:
        return io.NodeOutput(load_model(find_file(network), dtype))


class InstanceRSRSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldInstanceRSRSampler",
            display_name="InstanceRSR Sampler",
            category=CATEGORY,
            description="Restores a picture with InstanceRSR and draws its instance map along with it, in windows "
            "where it is large. Takes no text. The defaults are the paper's; tiny models want others: see Tiny Models.",
            inputs=[
                InstanceRSRModel.Input("model", tooltip="From InstanceRSR Loader or Tiny Models."),
                io.Latent.Input("lr_latent", tooltip="VAE Encode of the picture from LR Prepare."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
                             tooltip="Same seed, same picture; picture b of a batch takes seed + b."),
                io.Int.Input("steps", default=10, min=1, max=200, tooltip="Denoising steps; 5 are nearly as good."),
                io.Float.Input("start", default=1.0, min=0.2, max=1.0, step=0.01,
                               tooltip="1 = from pure noise. Below 1 = from the input with this much noise: closer to "
                               "it, fewer invented details."),
                io.Combo.Input("spacing", options=["leading", "trailing"], default="leading",
                               tooltip="Which noise levels the steps take. leading: as DiT is published. trailing: "
                               "from the highest one on, for tiny models and few steps."),
                io.Int.Input("tile", default=64, min=0, max=TILES[1], step=2,
                             tooltip="Side of a window in latent pixels (8 image pixels each; 4 with tiny models); an "
                             "even number. 0 = one window whatever the size."),
                io.Int.Input("overlap", default=24, min=0, max=TILES[1] // 2,
                             tooltip="Of neighbouring windows, in latent pixels; less than the tile."),
                io.Int.Input("tile_batch", default=4, min=1, max=64,
                             tooltip="Windows per network call; halved by itself when memory runs out."),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="The picture, for VAE Decode."),
                io.Latent.Output("map", display_name="map",
                                 tooltip="The instance map, for VAE Decode and then Instance Map Decode; nothing from "
                                 "a network that was trained without maps."),
            ])

    @classmethod
    def validate_inputs(cls, tile=None, overlap=None) -> bool | str:
        if tile and (not TILES[0] <= tile <= TILES[1] or tile % 2):  # named here, ComfyUI leaves their ranges to us
            return f"tile is {tile}; 0 or an even number from {TILES[0]} to {TILES[1]} latent pixels is expected."
        if overlap is not None and not 0 <= overlap <= TILES[1] // 2:
            return f"overlap is {overlap}; 0 to {TILES[1] // 2} latent pixels are expected."
        if tile and overlap is not None and overlap >= tile:
            return f"overlap ({overlap}) must be smaller than tile ({tile}): lower the overlap or enlarge the tile."
        return True

    @classmethod
    def execute(cls, model, lr_latent, seed, steps, start, spacing, tile, overlap, tile_batch) -> io.NodeOutput:
        config = require_method(model, "instancersr", "InstanceRSR Sampler").network.config
        z_lr = _scaled(lr_latent["samples"], config)
        batch, channels, *sides = z_lr.shape
        report = Report(steps, model)

        def on_step(i, n, x, x0) -> None:
            report.on_step(i, n, x, halves(x0, channels)[0])

        latents = math.prod(sides) if not tile or max(sides) <= tile else tile_batch * min(tile, *sides) ** 2
        with on_device(model, _working_memory(model, batch * latents)) as network:
            z = sample(
                network, z_lr.to(network.device), cpu_noise(seed, (batch, config.joint_channels, *sides)), steps=steps,
                start=start, spacing=spacing, tile=tile or None, overlap=overlap, tile_batch=tile_batch,
                on_step=on_step, on_window=report.on_window)
        picture, instances = (
            half if half is None else {"samples": to_vae(half.cpu(), config.latent_shift, config.latent_scale)}
            for half in halves(z, channels))
        return io.NodeOutput(picture, nothing() if instances is None else instances)


def _scaled(latent: torch.Tensor, config: InstanceRSRConfig) -> torch.Tensor:
    """The LATENT as the network takes it. Raises: ValueError for one of another VAE, or of odd sides."""
    channels, patch = config.in_channels, config.patch_size
    if latent.dim() != 4 or latent.shape[1] != channels:
        raise ValueError(
            f"lr_latent is {tuple(latent.shape)}; expected (B, {channels}, h, w). Encode the picture with the VAE that "
            "belongs to the model: that of Stable Diffusion 1, or that of Tiny Models.")
    if any(side % patch for side in latent.shape[-2:]):
        raise ValueError(
            f"lr_latent is {tuple(latent.shape[-2:])} latents high and wide; both must be multiples of {patch}. Let LR "
            "Prepare pad the picture to a multiple of 16 pixels.")
    return to_model(latent.float(), config.latent_shift, config.latent_scale)


def _working_memory(model: HostedModel, latents: int) -> float:
    """Bytes that one call on so many latents needs beside the weights: about 24 times its tokens (MLP, q, k and v), and
    what the ControlNet branch adds behind each of its blocks."""
    config = model.network.config
    copies = 24.0 + config.control_blocks
    return copies * latents / config.patch_size**2 * config.width * model.network.dtype.itemsize


NODES = [InstanceRSRLoader, InstanceRSRSampler, *comfy_instances.NODES]
TINY_LOADERS["instancersr"] = load_model
