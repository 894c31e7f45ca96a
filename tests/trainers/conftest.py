import importlib.util
import json
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("tiny_training.py")


@pytest.fixture(scope="session")
def tiny():
    """The module tiny_training."""
    spec = importlib.util.spec_from_file_location("tiny_training", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_training"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def curve():
    """Log of a training without what depends on the clock: step -> numbers."""

    def read(output_dir):
        lines = [json.loads(line) for line in (Path(output_dir) / "log.jsonl").read_text().splitlines()]
        timed = ("step", "samples_per_second", "seconds_left")
        steps = {}
        for line in lines:
            steps.setdefault(line["step"], {}).update({k: v for k, v in line.items() if k not in timed})
        return steps

    return read
