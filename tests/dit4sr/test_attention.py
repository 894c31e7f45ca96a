"""LR integration in attention against the paper's equations, computed here by hand."""

import pytest
import torch
from fourfold.nodes.dit4sr.attention import ControlAttention
from fourfold.nodes.dit4sr.config import Ablations

N, TEXT, HEADS, DIM = 6, 4, 3, 24


@pytest.fixture
def attention(small):
    def make(text="stream", **fields):
        torch.manual_seed(3)
        layer = ControlAttention(small(**fields), text)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return layer.requires_grad_(False)

    return make


@pytest.fixture
def tokens():
    torch.manual_seed(4)
    return torch.randn(2, N, DIM), torch.randn(2, N, DIM), torch.randn(2, TEXT, DIM)


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def by_hand(layer, x, lr, text=None, shared_keys=False, joint=True, residual=True):
    """Equations 1 and 2, head by head."""
    heads = []
    for h in range(HEADS):
        part = slice(h * DIM // HEADS, (h + 1) * DIM // HEADS)
        q, k, v = (getattr(layer, f"to_{n}")(x)[..., part] for n in "qkv")
        q_l, k_l, v_l = (getattr(layer, f"to_{n}_control")(getattr(layer, f"to_{n}")(lr))[..., part] for n in "qkv")
        q, k, q_l = rms(q, layer.norm_q.weight), rms(k, layer.norm_k.weight), rms(q_l, layer.norm_q.weight)
        k_l = rms(k if shared_keys else k_l, layer.norm_k.weight)
        streams = {"x": (q, k, v), "lr": (q_l, k_l, v_l)}
        if text is not None:
            q_t, k_t, v_t = (getattr(layer, f"add_{n}_proj")(text)[..., part] for n in "qkv")
            streams["text"] = (rms(q_t, layer.norm_added_q.weight), rms(k_t, layer.norm_added_k.weight), v_t)
        out = {}
        for name, (query, _, _) in streams.items():
            seen = [other for other in streams if joint or (other == "lr") == (name == "lr")]
            keys, values = (torch.cat([streams[other][i] for other in seen], dim=1) for i in (1, 2))
            scores = query @ keys.transpose(1, 2) / (DIM / HEADS) ** 0.5
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            out[name] = weights @ values
        heads.append(out)
    out = {name: torch.cat([head[name] for head in heads], dim=-1) for name in heads[0]}
    lr_out = layer.to_out_control(out["lr"] + (lr if residual else 0))
    return torch.cat([layer.to_out[0](out["x"]), lr_out], dim=1), out.get("text")


@pytest.mark.parametrize("variant", ["v1", "r1"])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_joint_attention_of_three_streams(attention, tokens, variant, joint, residual):
    layer = attention(variant=variant, ablations=Ablations(lr_integration=joint, lr_residual=residual))
    x, lr, text = tokens
    update, update_text = layer(torch.cat([x, lr], dim=1), text)
    expected, expected_text = by_hand(layer, x, lr, text, variant == "v1", joint, residual)
    torch.testing.assert_close(update, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(update_text, layer.to_add_out(expected_text), atol=1e-5, rtol=1e-5)


def test_second_attention_sees_no_text_and_carries_its_layers(attention, tokens):
    layer, (x, lr, _) = attention("unused"), tokens
    update, nothing = layer(torch.cat([x, lr], dim=1))
    torch.testing.assert_close(update, by_hand(layer, x, lr)[0], atol=1e-5, rtol=1e-5)
    assert nothing is None
    names = set(dict(layer.named_parameters()))
    assert {"add_q_proj.weight", "add_k_proj.bias", "to_add_out.weight", "norm_added_q.weight"} <= names


def test_last_block_drops_the_text(attention, tokens):
    layer, (x, lr, text) = attention("keys_only"), tokens
    update, nothing = layer(torch.cat([x, lr], dim=1), text)
    torch.testing.assert_close(update, by_hand(layer, x, lr, text)[0], atol=1e-5, rtol=1e-5)
    assert nothing is None and not hasattr(layer, "to_add_out")


@pytest.mark.parametrize(("variant", "matter"), [("v1", False), ("r1", True)])
def test_keys_of_the_lr_stream_matter_in_r1_only(attention, tokens, variant, matter):
    layer, (x, lr, text) = attention(variant=variant), tokens
    before, _ = layer(torch.cat([x, lr], dim=1), text)
    layer.to_k_control.weight.mul_(-1)
    after, _ = layer(torch.cat([x, lr], dim=1), text)
    assert torch.equal(before, after) != matter


def test_case_a_keeps_the_lr_stream_to_itself(attention, tokens):
    layer, (x, lr, text) = attention(ablations=Ablations(lr_integration=False)), tokens
    update, update_text = layer(torch.cat([x, lr], dim=1), text)
    other, other_text = layer(torch.cat([x, -lr], dim=1), text)
    assert torch.equal(update[:, :N], other[:, :N]) and torch.equal(update_text, other_text)
    third, _ = layer(torch.cat([-x, lr], dim=1), -text)
    assert torch.equal(update[:, N:], third[:, N:]) and not torch.equal(update[:, :N], third[:, :N])


def test_a_new_training_starts_with_a_silent_lr_stream(attention, tokens):
    layer, (x, lr, text) = attention(), tokens
    layer.init_control()
    update, _ = layer(torch.cat([x, lr], dim=1), text)
    other, _ = layer(torch.cat([x, -lr], dim=1), text)
    assert torch.equal(update[:, :N], other[:, :N]), "zero queries, keys and values: nothing of L is heard"
    expected, _ = by_hand(layer, x, lr, text)
    torch.testing.assert_close(update, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(layer.to_out_control.weight, layer.to_out[0].weight)
    layer.to_out_control.weight.zero_()
    assert layer.to_out[0].weight.abs().sum() > 0, "a copy, not the same weights"


def test_without_norms(attention, tokens):
    layer, (x, lr, text) = attention(qk_norm=None), tokens
    assert not [name for name, _ in layer.named_parameters() if "norm" in name]
    assert layer(torch.cat([x, lr], dim=1), text)[0].isfinite().all()
