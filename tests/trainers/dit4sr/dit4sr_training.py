"""A training of a very small DiT4SR, run as a program (to be killed, or on several processes) or loaded by tests.

    python dit4sr_training.py --photographs ... --output_dir ... --max_steps ...
"""

import sys
from dataclasses import replace

from fourfold.nodes.dit4sr.config import PRESETS
from fourfold.trainers.fit import parse
from fourfold.trainers.train_dit4sr import DiT4SRTraining, train

NETWORK = replace(
    PRESETS["tiny"].network, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
    caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=32, sample_size=8)
SETTINGS = {"crop": 32, "batch_size": 2, "warmup_steps": 0, "log_every": 1, "save_every": 3, "num_workers": 0,
            "tensorboard": False, "mixed_precision": "no", "max_steps": 6}

if __name__ == "__main__":
    defaults = [f"--{name}={value}" for name, value in {"preset": "tiny", **SETTINGS}.items()]
    train(parse(DiT4SRTraining, [*defaults, *sys.argv[1:]]), NETWORK)
