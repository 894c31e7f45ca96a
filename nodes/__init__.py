"""The nodes and the methods behind them."""

import logging


def _worth_reading(record: logging.LogRecord) -> bool:
    """False for bitsandbytes' advice about 4-bit weights, which nobody here uses.

    diffusers imports bitsandbytes wherever it is installed (pyiqa brings it), and on a CPU each import says
    "Failed to load CPU gemm_4bit_forward ...", which reads like an error.
    """
    return "gemm_4bit_forward" not in record.getMessage()


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_worth_reading)
