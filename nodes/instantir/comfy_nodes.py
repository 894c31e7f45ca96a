"""InstantIR nodes: widgets and tensor layout only; the method is in restore.py. The sampler, and the list of all."""

from typing import Any

import torch
from comfy_api.latest import io

from ..common.autoencoder import to_vae
from ..common.host.models import on_device, require_method
from ..common.host.outputs import nothing
from ..common.host.progress import Report
from ..common.images import to_comfy
from ..common.sampling import cpu_generators
from ..common.schedulers import SCHEDULERS
from . import comfy_conditions, comfy_loaders
from .comfy_sockets import (
    CATEGORY,
    Aggregator,
    AggregatorHandle,
    ImageTokens,
    InstantIRModel,
    Previewer,
    PreviewerHandle,
    Tokens,
    read_prompts,
    same_model,
    scaled_latent,
    working_memory,
)
from .delta_plot import delta_plot
from .resampler import DCPTokens
from .sampler import sample

TILES = (16, 512)  # latents, of a window


class InstantIRSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldInstantIRSampler",
            display_name="InstantIR Sampler",
            category=CATEGORY,
            description="Restores a picture with InstantIR, in windows where it is large. With Previewer and "
            "Aggregator as published; without the Aggregator by the DCP tokens alone; without the Previewer the input "
            "is the Aggregator's reference. The defaults are the paper's; tiny models want others: see Tiny Models.",
            inputs=[
                InstantIRModel.Input("model", tooltip="From InstantIR Loader or Tiny Models."),
                Tokens.Input("tokens", tooltip="From DCP Resampler."),
                io.Conditioning.Input("positive", tooltip="What is in the picture, and words of quality."),
                io.Conditioning.Input("negative", tooltip="What the picture must not be; not used at guidance 1."),
                io.Latent.Input("lq_latent", tooltip="VAE Encode of the picture from LR Prepare."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
                             tooltip="Same seed, same picture; picture b of a batch takes seed + b."),
                io.Int.Input("steps", default=30, min=1, max=200, tooltip="Denoising steps."),
                io.Float.Input("guidance", default=7.0, min=1.0, max=30.0, step=0.1,
                               tooltip="How strongly prompts and picture steer; 1 = half the time."),
                io.Combo.Input("scheduler", options=list(SCHEDULERS), default="ddim",
                               tooltip="ddim is the paper's; ddpm, which adds fresh noise at every step, that of its "
                               "published demo."),
                io.Int.Input("tile", default=128, min=0, max=TILES[1], step=8,
                             tooltip="Side of a window in latent pixels (8 image pixels each; 4 with tiny models). 0 = "
                             "one window whatever the size."),
                io.Int.Input("overlap", default=32, min=0, max=TILES[1] // 2,
                             tooltip="Of neighbouring windows, in latent pixels; less than the tile."),
                io.Int.Input("tile_batch", default=1, min=1, max=64,
                             tooltip="Windows per network call; halved by itself when memory runs out."),
                Previewer.Input("previewer", optional=True,
                                tooltip="From Previewer. Without it the Aggregator has the input as its reference."),
                Aggregator.Input("aggregator", optional=True,
                                 tooltip="From Aggregator. Without it the DCP tokens alone guide."),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="The result, for VAE Decode."),
                io.Latent.Output("previews", display_name="previews",
                                 tooltip="The previews of all steps as a batch; nothing where none were made."),
                io.Image.Output("delta", display_name="delta", tooltip="Plot of delta over the steps."),
            ])

    @classmethod
    def validate_inputs(cls, tile=None, overlap=None) -> bool | str:
        if tile and (not TILES[0] <= tile <= TILES[1] or tile % 8):  # named here, ComfyUI leaves their ranges to us
            return f"tile is {tile}; 0 or a multiple of 8 from {TILES[0]} to {TILES[1]} latent pixels is expected."
        if overlap is not None and not 0 <= overlap <= TILES[1] // 2:
            return f"overlap is {overlap}; 0 to {TILES[1] // 2} latent pixels are expected."
        if tile and overlap is not None and overlap >= tile:
            return f"overlap ({overlap}) must be smaller than tile ({tile}): lower the overlap or enlarge the tile."
        return True

    @classmethod
    def execute(cls, model, tokens, positive, negative, lq_latent, seed, steps, guidance, scheduler, tile, overlap,
                tile_batch, previewer=None, aggregator=None) -> io.NodeOutput:
        config = require_method(model, "instantir", "InstantIR Sampler").network.config
        same_model(previewer, model, "Previewer")
        same_model(aggregator, model, "Aggregator")
        z_lq = scaled_latent(lq_latent, config, "lq_latent")
        positive, negative = (read_prompts(conditioning, config) for conditioning in (positive, negative))
        generators = cpu_generators(seed, len(z_lq))
        noise = torch.stack([torch.randn(z_lq.shape[1:], generator=generator) for generator in generators])
        report = Report(steps, model)
        sides = z_lq.shape[-2:]
        latents = sides.numel() if not tile or max(sides) <= tile else tile_batch * min(tile, *sides) ** 2
        with on_device(model, working_memory(model, latents * len(z_lq) * (1 if guidance == 1 else 2))) as network:
            drawn = sample(
                network, z_lq.to(network.device), noise, steps=steps, guidance=guidance, scheduler=scheduler, tile=tile,
                overlap=overlap, tile_batch=tile_batch, positive=positive, negative=negative, generator=generators,
                on_step=report.on_step, on_window=report.on_window, **_seen(tokens, previewer),
                **_steered(aggregator, previewer))
        latent, previews = ({"samples": to_vae(z.cpu(), config.latent_shift, config.latent_scale)}
                            for z in (drawn.latent, drawn.previews.flatten(0, 1)))
        return io.NodeOutput(latent, previews if drawn.preview_steps else nothing(), to_comfy(delta_plot(drawn.deltas)))


def _seen(tokens: ImageTokens, previewer: PreviewerHandle | None) -> dict[str, Any]:
    """What `sample` is told of the picture; the Previewer's tokens may be another picture's."""
    own = previewer.tokens if previewer else tokens
    image, null = (DCPTokens(mine.tokens, its.previewer) for mine, its in ((tokens.image, own.image),
                                                                          (tokens.null, own.null)))
    return {"image": image, "null_image": null, "image_scale": tokens.weight, "previewer_scale": own.weight,
            "previewer_text": previewer.text if previewer else None}


def _steered(aggregator: AggregatorHandle | None, previewer: PreviewerHandle | None) -> dict[str, Any]:
    """What `sample` is told of the Aggregator: nothing without one; without a Previewer the input is its reference."""
    if aggregator is None:
        return {"conditioning_scale": 0.0}
    lq = aggregator.lq_latent
    reference = lq if aggregator.reference is None and previewer is None else aggregator.reference
    return {"aggregator_lq": lq, "reference": reference, "conditioning_scale": aggregator.conditioning_scale,
            "preview_start": aggregator.preview_start, "creative_start": aggregator.creative_start,
            "adaptive": aggregator.adaptive}


NODES = [*comfy_loaders.NODES, *comfy_conditions.NODES, InstantIRSampler]
