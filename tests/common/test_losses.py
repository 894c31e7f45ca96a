"""Terms of losses."""

import pytest
import torch
from fourfold.nodes.common.losses import edge_loss


def test_edge_loss_sees_steps_and_no_constant_shift():
    clean = torch.zeros(1, 1, 4, 4)
    assert edge_loss(clean + 0.3, clean) == 0
    step = clean.clone()
    step[..., 2:] = 0.6  # one step of 0.6 in three horizontal differences, none vertically
    assert edge_loss(step, clean) == pytest.approx(0.6 / 3)
