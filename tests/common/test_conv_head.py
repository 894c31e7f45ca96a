import torch
from fourfold.nodes.common.conv_head import ConvHead


def trained(**sizes):
    torch.manual_seed(0)
    head = ConvHead(**sizes)
    torch.nn.init.normal_(head.layers[-1].weight, std=0.1)
    return head


def test_a_new_head_changes_nothing_and_learns_at_once():
    head = ConvHead(channels=4, context_channels=3, width=8)
    output, context = torch.randn(2, 4, 6, 7), torch.randn(2, 3, 6, 7)
    assert torch.equal(head(output, context), output)
    head(output, context).square().sum().backward()
    assert head.layers[-1].weight.grad.abs().max() > 0


def test_it_sees_beyond_a_token_and_no_further_than_three_latents():
    head = trained(channels=1, context_channels=1, width=4)
    output, context = torch.zeros(1, 1, 15, 15), torch.zeros(1, 1, 15, 15)
    plain = head(output, context)
    output[..., 7, 7] = 1.0
    changed = (head(output, context) - plain).abs()[0, 0] > 0
    assert changed[4:11, 4:11].all()
    changed[4:11, 4:11] = False
    assert not changed.any()


def test_the_context_matters():
    head = trained(channels=2, context_channels=2, width=4)
    output = torch.randn(1, 2, 5, 5)
    assert not torch.allclose(head(output, torch.zeros(1, 2, 5, 5)), head(output, torch.ones(1, 2, 5, 5)))
