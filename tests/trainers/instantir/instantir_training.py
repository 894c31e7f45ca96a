"""Trainings of a very small InstantIR, run as a program (to be killed, or on several processes) or loaded by tests.

    python instantir_training.py aggregator --photographs ... --start ... --output_dir ...
"""

import sys
from dataclasses import replace

from fourfold.nodes.instantir.config import PRESETS, PreviewerConfig, ResamplerConfig
from fourfold.trainers import train_instantir_aggregator as aggregator
from fourfold.trainers import train_instantir_dcp as dcp
from fourfold.trainers import train_instantir_previewer as previewer
from fourfold.trainers import train_tiny_sdxl as base
from fourfold.trainers.fit import parse

TINY = PRESETS["tiny"].network
NETWORK = replace(
    TINY,
    unet=TINY.unet | dict(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=(1, 2), sample_size=8,
                          cross_attention_dim=16, addition_time_embed_dim=4,
                          projection_class_embeddings_input_dim=16 + 6 * 4),
    resampler=ResamplerConfig(embedding_dim=16, dim=8, depth=1, dim_head=4, heads=2, num_queries=3, output_dim=16,
                              ff_mult=2),
    previewer=PreviewerConfig(rank=2), aggregator_hidden=4)
SETTINGS = {"preset": "tiny", "crop": 32, "batch_size": 4, "warmup_steps": 0, "log_every": 1, "save_every": 2,
            "num_workers": 0, "tensorboard": False, "mixed_precision": "no", "max_steps": 3, "learning_rate": 1e-3,
            "beta2": 0.99}
TRAININGS = {  # name -> config, train(config)
    "base": (base.TinySDXLTraining, lambda config: base.train(config, NETWORK)),
    "dcp": (dcp.DCPTraining, lambda config: dcp.train(config, NETWORK.resampler)),
    "previewer": (previewer.PreviewerTraining, lambda config: previewer.train(config, NETWORK.previewer)),
    "aggregator": (aggregator.AggregatorTraining, aggregator.train),
}

if __name__ == "__main__":
    config_class, train = TRAININGS[sys.argv[1]]
    train(parse(config_class, [*(f"--{name}={value}" for name, value in SETTINGS.items()), *sys.argv[2:]]))
