"""Trains InstanceRSR: joint latent, ControlNet branch and alignment on a DiT-XL/2 (the paper), or the tiny network.

    accelerate launch -m fourfold.trainers.train_instancersr --photographs SA1B --instances SA1B_instances \\
        --base DiT-XL-2-512 --dino dinov2-large --output_dir runs/instancersr --mixed_precision bf16
    python -m fourfold.trainers.train_instancersr --preset tiny --photographs BSDS/images --instances BSDS/segments \\
        --output_dir runs/tiny/instancersr

Label maps are PNGs with one label per pixel, named as their photographs: make_instances writes them. The result lies in
<output_dir>/checkpoints/step-*/export: instancersr.safetensors and, for the tiny network, codec.safetensors. Continue a
stopped training with --resume latest.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState

from ..nodes.common.autoencoder import KLAutoencoder
from ..nodes.common.checkpoints import load_state, load_strict
from ..nodes.common.codec import LinearCodec
from ..nodes.common.degradation import DEGRADATIONS
from ..nodes.common.tiny import load_codec, tiny_checkpoint
from ..nodes.common.vision import PAGE as DINO_PAGE
from ..nodes.common.vision import VisionEncoder
from ..nodes.instancersr.base import BASE_PAGE
from ..nodes.instancersr.config import PRESETS, InstanceRSRConfig
from ..nodes.instancersr.model import InstanceRSR, find_network
from .cache import CachedItems, fingerprint
from .dit4sr_cache import files_identity, fill_crops, open_cache
from .fit import FitResult, fit, has_gpu, parse
from .instancersr_study import TINY, InstanceRSRStudy, InstanceRSRTraining
from .labelled import LabelledPhotographs
from .train_dit4sr import HELD_OUT, with_preset_defaults


def build(config: InstanceRSRTraining, network: InstanceRSRConfig | None = None, **own: int) -> InstanceRSRStudy:
    """Network, autoencoder and DINOv2, ready for a new training.

    Args:
        network: sizes of the tiny network; None = the preset's. At full size the base's folder says them.
        own: full size: fields of the config that the base does not say (control_blocks, align_block, ...).
    """
    tiny, dtype = config.preset == "tiny", torch.float32 if config.mixed_precision == "no" else torch.bfloat16
    asked = {} if tiny else {"base": f"the folder of {BASE_PAGE}", "dino": f"the folder of {DINO_PAGE}"}
    for name, what in asked.items():
        if getattr(config, name) is None and (name == "base" or config.representation_learning):
            raise ValueError(f"--{name} is missing: {what}.")
    torch.manual_seed(config.seed)
    vision = None
    if config.representation_learning:
        path = (config.vision or tiny_checkpoint("vision")) if tiny else config.dino
        vision = VisionEncoder.from_pretrained(path, torch.float32 if tiny else dtype)
        own["align_dim"] = vision.width
    if not tiny:
        model = InstanceRSR.from_base(config.base, config.ablations, dtype, **own)
        return InstanceRSRStudy(config, model, KLAutoencoder.from_pretrained(config.base, dtype), vision)
    codec = LinearCodec.load(config.codec) if config.codec else load_codec()
    network = replace(network or PRESETS["tiny"].network, latent_shift=codec.shift, latent_scale=codec.scale,
                      ablations=config.ablations, **own)
    model = InstanceRSR(network)
    model.init_from_scratch()
    if config.start:
        load_strict(model, load_state(find_network(config.start)), source=config.start)
    return InstanceRSRStudy(config, model, codec, vision)


def cached(config: InstanceRSRTraining, study: InstanceRSRStudy, photographs: LabelledPhotographs) -> CachedItems:
    """The first `cached_crops` crops from the cache, which is filled first where it is not complete."""
    state = PartialState(cpu=config.cpu or not has_gpu())
    settings = {
        "photographs and degradation": photographs.identity(), "token grid": str(study.grid),
        "label maps": files_identity([Path(config.instances or config.photographs)]),
        "autoencoder": fingerprint(study.autoencoder), "map": str(config.mask_modelling),
        "vision encoder": fingerprint(study.vision) if study.vision is not None else "none",
    }  # fmt: skip
    study.to(state.device)
    items = fill_crops(open_cache(config.cache, settings), photographs, config.cached_crops, study.encode, state,
                       batch_size=min(config.batch_size, 16), num_workers=config.num_workers)
    study.vision = None
    return items


def train(config: InstanceRSRTraining, network: InstanceRSRConfig | None = None, **own: int) -> FitResult:
    """Builds what `config` asks for and trains it (see `build` and `fit.fit`)."""
    study = build(config, network, **own)
    photographs = LabelledPhotographs(config.photographs, config.crop, DEGRADATIONS[config.degradation], study.grid,
                                      config.instances, seed=config.seed, captions=False, min_scale=config.min_scale)
    if config.sample_every:
        study.samples = [photographs[HELD_OUT + i] for i in range(config.samples)]
    dataset = cached(config, study, photographs) if config.cache else photographs
    return fit(config, study, dataset, lambda model, batch, draws, _: model(batch, draws), study.save,
               InstanceRSRStudy.sample)


def main(argv: list[str] | None = None) -> FitResult:
    return train(parse(InstanceRSRTraining, with_preset_defaults(argv, TINY)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
