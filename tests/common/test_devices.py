"""The device that is taken where none is named."""

import pytest
import torch
from fourfold.nodes.common.devices import best_device


@pytest.mark.parametrize(("cuda", "mps", "best"), [
    (True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_a_gpu_of_either_kind_is_preferred(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert best_device() == torch.device(best)
