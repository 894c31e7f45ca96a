"""What a large picture costs in memory: a program of its own, whose peak the operating system knows."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from dataclasses import replace
from fourfold.nodes.common.tiny import load_codec, load_text_encoder
from fourfold.nodes.dreamsr.config import PRESETS
from fourfold.nodes.dreamsr.model import DreamSR
from fourfold.nodes.dreamsr.restore import System, restore

codec = load_codec()
model = DreamSR(replace(PRESETS["tiny"].network, latent_shift=codec.shift, latent_scale=codec.scale))
model.init_from_scratch()
system = System.of(PRESETS["tiny"], model.eval().requires_grad_(False), codec, load_text_encoder())
side = int(sys.argv[1])
lr = torch.nn.functional.interpolate(torch.rand(1, 3, side // 64, side // 64), size=(side // 4, side // 4))
sr = restore(lr, system, steps=1)
assert sr.shape[-2:] == (side, side) and sr.isfinite().all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_4096_px_take_less_than_4_gb():
    done = subprocess.run([sys.executable, "-c", PROGRAM, "4096"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sys.stdout.write(f"\n4096 x 4096 with the tiny network: {float(done.stdout):.2f} GiB at most\n")
    assert float(done.stdout) < 4e9 / 2**30
