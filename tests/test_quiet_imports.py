"""Nothing is said on import that reads like an error but is none."""

import logging
import subprocess
import sys

import fourfold.nodes  # noqa: F401


def test_advice_about_4_bit_weights_is_dropped_and_nothing_else(caplog):
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    log.warning("the weights are damaged")
    assert [record.getMessage() for record in caplog.records] == ["the weights are damaged"]


def test_restoring_from_python_prints_nothing():
    program = """
import torch, fourfold
fourfold.restore(torch.rand(1, 3, 8, 8), steps=1, device="cpu", method="dit4sr", model="tiny", scale=4, seed=0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout == done.stderr == ""
