"""Attention written out, against PyTorch's."""

import pytest
import torch
from fourfold.nodes.common.attention import attend
from torch.nn.functional import scaled_dot_product_attention


@pytest.fixture
def streams():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, 16, generator=draw) for tokens in (7, 11, 11)]


def test_float32_is_pytorchs_own(streams):
    assert torch.equal(attend(*streams), scaled_dot_product_attention(*streams))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_on_a_cpu_is_as_exact_as_bfloat16_allows(streams, autocast):
    expected = scaled_dot_product_attention(*streams)
    given = streams if autocast else [t.bfloat16() for t in streams]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = attend(*given)
    assert ours.dtype == torch.bfloat16 and ours.shape == (2, 3, 7, 16)
    torch.testing.assert_close(ours.float(), expected, atol=0.03, rtol=0.03)


def test_gradients_flow_through_the_written_out_form(streams):
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [t.detach().clone().to(dtype).requires_grad_(True) for t in streams]
        attend(*leaves).float().square().sum().backward()
        gradients.append([leaf.grad.float() for leaf in leaves])
    for exact, rounded in zip(*gradients, strict=True):
        assert (rounded - exact).norm() < 0.05 * exact.norm()
