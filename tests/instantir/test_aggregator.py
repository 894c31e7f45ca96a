"""The Aggregator: SFT by hand, what it is a copy of, what it adds."""

import torch
from fourfold.nodes.instantir.aggregator import SFT
from torch.nn.functional import conv2d


def test_sft_is_equation_6():
    """The upper half is the LQ's; it modulates the lower one:  h (1 + alpha) + beta."""
    torch.manual_seed(0)
    sft = SFT(3)
    both = torch.randn(2, 3, 8, 5)
    lq, reference = both[:, :, :4], both[:, :, 4:]
    hidden = torch.nn.functional.silu(conv2d(lq, *sft.mlp_shared[0].parameters(), padding=1))
    alpha, beta = (conv2d(hidden, *layer.parameters(), padding=1) for layer in (sft.mul, sft.add))
    torch.testing.assert_close(sft(both), reference * (1 + alpha) + beta)
    assert sft.mlp_shared[0].out_channels == 128


def test_attention_spans_both_halves(network):
    """Changing the reference in one corner changes residuals in the other: only attention reaches that far."""
    model, draw = network(), torch.Generator().manual_seed(1)
    lq, reference, pooled = (torch.randn(s, generator=draw) for s in ((1, 4, 32, 32), (1, 4, 32, 32), (1, 10)))
    changed = reference.clone()
    changed[..., :2, :2] += 3
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    before, after = (model.aggregate(lq, z, torch.tensor(500), pooled, sizes) for z in (reference, changed))
    assert (after[1] - before[1])[..., -1, -1].abs().max() > 1e-6
    assert torch.allclose(after[0][0][..., 8:, 8:], before[0][0][..., 8:, 8:]), "the first skip saw no attention"


def test_it_has_no_text_and_no_up_path(network):
    names = set(network().aggregator.state_dict())
    assert not any("attn2" in name or "transformer_blocks.0.norm2" in name or name.startswith("up_") for name in names)
    assert {"ref_conv_in.weight", "controlnet_mid_block.1.weight", "controlnet_down_blocks.0.0.mul.bias"} <= names


def test_residuals_fit_the_unets_skips(network, conditions):
    """Added where the UNet keeps its skips: scaled by zero they leave its output as it is."""
    model, x, t = network(), torch.randn(2, 4, 8, 12), torch.tensor([100, 900])
    args = conditions(model)
    down, mid = model.aggregate(x, x.flip(0), t, args[1], args[2])
    none = ([0 * z for z in down], 0 * mid)
    plain = model.denoise(x, t, *args)
    assert torch.equal(model.denoise(x, t, *args, residuals=none), plain)
    assert not torch.allclose(model.denoise(x, t, *args, residuals=(down, mid)), plain)


def test_gradient_checkpointing_gives_the_same_gradients(network):
    x, pooled, sizes = torch.randn(1, 4, 8, 8), torch.randn(1, 10), torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    grads = []
    for checkpointing in (False, True):
        model = network()
        chosen = model.part_parameters("aggregator")
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        if checkpointing:
            model.aggregator.enable_gradient_checkpointing()
        down, mid = model.aggregate(x, x, torch.tensor(500), pooled, sizes)
        sum(z.square().mean() for z in (*down, mid)).backward()
        grads.append({name: parameter.grad for name, parameter in chosen.items()})
    assert all(grad is not None for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)
