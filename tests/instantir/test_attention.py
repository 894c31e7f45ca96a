"""Equations 3 and 4 written out, and what is computed once a picture: the same to the bit, never stale."""

import torch
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
T = torch.tensor([100, 900])


def spy(module, calls):
    return module.register_forward_hook(lambda *_: calls.append(module))


def test_the_layer_is_equations_3_and_4(network, conditions):
    """f + Attn(f, text) + w Attn(f, LN(c) * (1 + scale(t)) + shift(t)), both before the output projection."""
    model = network()
    layer = model.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    ip, seen = layer.processor, {}
    layer.register_forward_hook(lambda _, args, kwargs, out: seen.update(kwargs, x=args[0], out=out), with_kwargs=True)
    args = conditions(model)
    condition = model.condition(*args, scale=0.7)
    model.output(X, T, condition)

    def attend(q, k, v):
        q, k, v = (x.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def modulated(projection, norm):
        shift, scale = norm.linear(silu(seen["step"].temb))[:, None].chunk(2, dim=-1)
        c = projection(args[3])
        return layer_norm(c, c.shape[-1:], eps=1e-6) * (1 + scale) + shift

    q, text = layer.to_q(seen["x"]), args[0]
    image = attend(q, modulated(ip.to_k_ip, ip.ln_k_ip), modulated(ip.to_v_ip, ip.ln_v_ip))
    expected = layer.to_out[0](attend(q, layer.to_k(text), layer.to_v(text)) + 0.7 * image)
    torch.testing.assert_close(seen["out"], expected)


def test_the_time_embedding_holds_time_text_and_size(network, conditions):
    model, seen = network(), {}
    layer = model.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    layer.register_forward_hook(lambda _, args, kwargs, out: seen.update(kwargs), with_kwargs=True)
    text, pooled, time_ids, tokens = conditions(model)
    model.denoise(X, T, text, pooled, time_ids, tokens)
    unet = model.unet
    sizes = unet.add_time_proj(time_ids.flatten()).reshape(2, -1)
    expected = unet.time_embedding(unet.time_proj(T)) + unet.add_embedding(torch.cat([pooled, sizes], dim=-1))
    torch.testing.assert_close(seen["step"].temb, expected)


def test_without_image_scale_the_tokens_are_not_read(network, conditions):
    model = network()
    text, pooled, time_ids, tokens = conditions(model)
    off = model.output(X, T, model.condition(text, pooled, time_ids, tokens, scale=0.0))
    assert torch.equal(off, model.output(X, T, model.condition(text, pooled, time_ids, None)))
    assert not torch.allclose(off, model.output(X, T, model.condition(text, pooled, time_ids, tokens)))


def test_kept_results_change_nothing(network, conditions):
    model, noise = network(), torch.randn(2, 4, 8, 8)
    for previewer in (False, True):
        args = conditions(model, previewer=previewer)
        kept = model.condition(*args, previewer)
        for x, t in ((X, T), (X + noise, torch.tensor([80, 880])), (noise, torch.tensor(3))):
            fresh = model.denoise(x, t, *args, previewer=previewer)
            torch.testing.assert_close(model.epsilon(x, t, kept), fresh, rtol=1e-6, atol=1e-6)
    down, mid = model.aggregate(X, noise, T, args[1], args[2])
    for _ in range(2):
        again, middle = model.residuals(X, noise, T, kept)
        assert all(torch.equal(a, b) for a, b in zip((*again, middle), (*down, mid), strict=True))


def test_what_does_not_change_with_time_is_computed_once_a_picture(network, conditions):
    model, calls = network(), []
    blocks = list(model.unet.cross_attentions().values())
    names = ("to_k", "to_v", "processor.to_k_ip", "processor.to_v_ip")
    once = [layer.get_submodule(name) for layer in blocks for name in names]
    once += [model.unet.add_embedding, model.aggregator.add_embedding]
    each = [layer.processor.ln_k_ip for layer in blocks]
    spies = [spy(module, calls) for module in once]
    condition = model.condition(*conditions(model))
    for step in range(3):
        model.output(X, T - step, condition, model.residuals(X, X, T - step, condition))
    assert sorted(map(id, calls)) == sorted(map(id, once)), "once each, in three steps"
    for handle in spies:
        handle.remove()
    calls.clear()
    spies = [spy(module.linear, calls) for module in each]
    for step in range(3):
        model.output(X, T - step, condition)
    assert len(calls) == 3 * len(each), "the norm depends on time"


def test_nothing_kept_is_stale(network, conditions):
    """Another prompt, size, picture, LoRA state or weight gives what a network that never saw the first one gives."""
    model, fresh = network(), network()
    args = conditions(model)
    model.output(X, T, model.condition(*args))
    other = conditions(model, seed=5)
    for i in range(4):
        changed = [*args]
        changed[i] = other[i] if i != 2 else args[2] / 2
        ours, theirs = (m.output(X, T, m.condition(*changed)) for m in (model, fresh))
        assert torch.equal(ours, theirs) and not torch.equal(ours, model.output(X, T, model.condition(*args)))
    previewed = model.output(X, T, model.condition(*args, previewer=True))
    assert torch.equal(previewed, fresh.denoise(X, T, *args, previewer=True))
    model.unet.cross_attentions()[1].processor.to_v_ip.base_layer.weight.mul_(2)
    again = model.output(X, T, model.condition(*args))
    assert not torch.equal(again, fresh.output(X, T, fresh.condition(*args))), "a new condition sees new weights"
    state = [name for name in vars(model.unet.cross_attentions()[1].processor) if not name.startswith("_")]
    assert state == ["training"], "the layers keep no state between calls"


def test_rows_choose_their_picture(network, conditions):
    """Windows one after the other, or any rows: each is denoised under its own picture's condition."""
    model = network()
    args = conditions(model)
    condition = model.condition(*args)
    both = model.output(X, T, condition)
    windows = model.output(torch.cat([X, X.flip(-1)]), torch.cat([T, T]), condition)
    torch.testing.assert_close(windows[:2], both)
    torch.testing.assert_close(windows[2:], model.output(X.flip(-1), T, condition))
    some = model.output(X[[1, 0, 1]], T[[1, 0, 1]], condition, rows=torch.tensor([1, 0, 1]))
    torch.testing.assert_close(some, both[[1, 0, 1]])
    down, mid = model.residuals(X[[1]], X[[0]], T[[1]], condition, torch.tensor([1]))
    whole, middle = model.residuals(X, X.flip(0), T, condition)
    torch.testing.assert_close(mid, middle[[1]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(down[-1], whole[-1][[1]], rtol=1e-4, atol=1e-4)
