"""The network: plain FLUX at first, and what each part of the method then changes."""

import copy

import pytest
import torch
from fourfold.nodes.common import flux
from fourfold.nodes.common.text import TextEmbedding
from fourfold.nodes.dreamsr.model import DreamSR
from fourfold.nodes.dreamsr.ra_lora import switch
from fourfold.nodes.dreamsr.streams import Streams
from peft.tuners.tuners_utils import BaseTunerLayer


def plain_flux(base, latent, t, prompt, guidance):
    """diffusers' own forward."""
    height, width = latent.shape[-2:]
    ids = flux.position_ids(prompt.prompt_embeds.shape[1], height, width)
    tokens = base(
        hidden_states=flux.pack(latent), encoder_hidden_states=prompt.prompt_embeds,
        pooled_projections=prompt.pooled, timestep=torch.full((len(latent),), t),
        guidance=torch.full((len(latent),), guidance), txt_ids=ids[: -height * width // 4],
        img_ids=ids[-height * width // 4 :], return_dict=False)[0]
    return flux.unpack(tokens, height, width)


@pytest.fixture(scope="module")
def started(small_flux, tmp_path_factory):
    """A new network on a random FLUX, and that FLUX."""
    base = small_flux.transformer(in_channels=16)
    folder = tmp_path_factory.mktemp("base") / "transformer"
    base.save_pretrained(folder)
    torch.manual_seed(3)
    return DreamSR.from_base(folder, lora_rank=4).eval(), base


# plain FLUX -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lora", [False, True], ids=["texture generation", "degradation removal"])
@pytest.mark.parametrize(("t", "guidance", "seed"), [(0.8, 3.5, 1), (1.0, 1.0, 2), (0.05, 9.0, 3)])
def test_a_new_network_is_plain_flux_for_any_prompts_and_any_lr(started, texts, latents, lora, t, guidance, seed):
    model, base = started
    x, lr = latents(2, 8, 12, seed)
    prompt, local = texts(2, 5, seed), texts(2, 9, seed + 10)
    with torch.no_grad():
        ours = model(x, 10 * lr, t, prompt, local, guidance, lora=lora)
        theirs = plain_flux(base, x, t, prompt, guidance)
    assert theirs.abs().max() > 0.1
    assert torch.equal(ours, theirs)


def test_a_new_control_net_is_a_copy_of_every_second_double_block(started):
    model, base = started
    assert model.config.control_layers == (0,) and len(model.control.blocks) == 1
    for mine, theirs in ((model.control.blocks[0], base.transformer_blocks[0]),
                         (model.control.x_embedder, base.x_embedder),
                         (model.control.context_embedder, base.context_embedder),
                         (model.control.time_text_embed, base.time_text_embed)):
        assert all(torch.equal(mine.state_dict()[name], value) for name, value in theirs.state_dict().items())
    for zero in (model.control.image_injections[0], model.control.text_injections[0].mlp):
        assert not zero.layers[-1].weight.any() and zero.layers[0].weight.std() > 0


# injections -------------------------------------------------------------------------------------------------------

def moved(model, *arguments, change, **options):
    """How far an output moves when the named arguments are replaced."""
    names = ("latent", "condition", "t", "prompt", "local")
    before = model(*arguments, **options)
    after = model(*(change.get(name, value) for name, value in zip(names, arguments, strict=True)), **options)
    return float((after - before).abs().max())


def test_after_a_step_both_injections_the_whole_control_net_and_the_lora_have_gradients(started, texts, latents):
    model = copy.deepcopy(started[0]).requires_grad_(False)
    x, lr = latents()
    for parameters, lora in ((model.control_parameters(), False), (model.lora_parameters(), True)):
        names = {id(p): name for name, p in model.named_parameters()}
        optimizer, silent = torch.optim.AdamW([p.requires_grad_(True) for p in parameters], lr=1e-2), []
        for _ in range(2):
            model(x, lr, 0.6, texts(2, 5, 1), texts(2, 9, 2), lora=lora).square().mean().backward()
            assert all(p.grad is not None for p in parameters), "on several processes no gradient may be missing"
            silent.append([names[id(p)] for p in parameters if not p.grad.any()])
            optimizer.step()
            optimizer.zero_grad()
        heard = {names[id(p)] for p in parameters} - set(silent[0])
        last = (".lora_B.",) if lora else ("image_injections.0.layers.2.", "text_injections.0.mlp.layers.2.")
        assert heard == {names[id(p)] for p in parameters if any(part in names[id(p)] for part in last)}
        # a constant added to all keys of an attention changes no softmax
        constant = ("attn.to_k.bias", "add_k_proj.bias", "text_injections.0.to_k.bias")
        assert [name for name in silent[1] if not name.endswith(constant)] == []
        for parameter in parameters:
            parameter.requires_grad_(False)
    assert all(p.grad is None for p in model.base_parameters())


def test_prompts_and_latents_each_reach_the_output_on_their_own_way(network, texts, latents):
    model, (x, lr) = network(), latents()
    arguments = x, lr, 0.6, texts(2, 5, 1), texts(2, 9, 2)
    changes = {"latent": -x, "condition": -lr, "t": 0.3, "prompt": texts(2, 5, 3), "local": texts(2, 9, 4)}
    for name, value in changes.items():
        assert moved(model, *arguments, change={name: value}) > 1e-2, name
        heard = name in ("latent", "t", "prompt")  # by FLUX alone
        assert (moved(model, *arguments, change={name: value}, control_scale=0.0) > 1e-2) == heard, name


def test_each_injection_matters_and_zero_leaves_it_out(network, texts, latents):
    model, (x, lr) = network(), latents()
    arguments = x, lr, 0.6, texts(2, 5, 1), texts(2, 9, 2)
    outputs = [model(*arguments, control_scale=scale) for scale in (1.0, (1.0, 0.0), (0.0, 1.0), 0.0)]
    for i, a in enumerate(outputs):
        assert all((a - b).abs().max() > 1e-2 for b in outputs[i + 1 :])
    assert torch.equal(outputs[0], model(*arguments, control_scale=(1.0, 1.0)))
    model.config = model.config.__class__.from_json(model.config.to_json() | {"control_layers": []})
    torch.testing.assert_close(model(*arguments), outputs[3])


def test_equations_1_and_2_at_one_block(network, texts, latents):
    """f_img + M(f_c,img) and f_txt + M(softmax(Q K^T / sqrt(d)) V) with normalised Q and K, written out."""
    control = network().control
    draw = [torch.randn(2, n, 24) for n in (6, 5, 6, 9)]
    main, patch = Streams(draw[0], draw[1], None, None), Streams(draw[2], draw[3], None, None)
    after = control.inject(1, main, patch)
    torch.testing.assert_close(after.image, draw[0] + control.image_injections[1](draw[2]))
    part = control.text_injections[1]

    def heads(layer, tokens):
        return layer(tokens).unflatten(-1, (3, 8)).transpose(1, 2)

    def normed(tokens, weight):
        return tokens / (tokens.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    q, k = (normed(heads(layer, tokens), norm.weight) for layer, tokens, norm in
            ((part.to_q, draw[1], part.norm_q), (part.to_k, draw[3], part.norm_k)))
    weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    crossed = (weights @ heads(part.to_v, draw[3])).transpose(1, 2).flatten(2)
    torch.testing.assert_close(after.text, draw[1] + part.mlp(crossed), atol=1e-5, rtol=1e-5)


def test_injections_enter_after_the_block_whose_copy_made_them(network, texts, latents):
    model, (x, lr) = network(), latents()
    order = []
    for i, block in enumerate(model.base.transformer_blocks):
        block.register_forward_hook(lambda *_, i=i: order.append(f"block {i}"))
    for k in range(2):
        model.control.blocks[k].register_forward_hook(lambda *_, k=k: order.append(f"copy {k}"))
        model.control.text_injections[k].register_forward_hook(lambda *_, k=k: order.append(f"injection {k}"))
    model(x, lr, 0.5, texts(), texts())
    assert order == ["block 0", "copy 0", "injection 0", "block 1", "block 2", "copy 1", "injection 1"]


# RA-LoRA ----------------------------------------------------------------------------------------------------------

def test_the_lora_covers_all_linears_of_attention_and_mlp_in_all_blocks_and_nothing_else(network):
    model = network()
    found = sorted(name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    attention = ["attn.to_q", "attn.to_k", "attn.to_v"]
    double = [*attention, "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
              "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
    wanted = [f"base.transformer_blocks.{i}.{layer}" for i in range(3) for layer in double]
    wanted += [f"base.single_transformer_blocks.{i}.{layer}" for i in range(2)
               for layer in (*attention, "proj_mlp", "proj_out")]
    assert found == sorted(wanted) and len(model.lora_parameters()) == 2 * len(wanted)


def test_the_lora_is_switched_without_touching_a_weight(network, texts, latents):
    model, (x, lr) = network(), latents()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    arguments = x, lr, 0.6, texts(2, 5, 1), texts(2, 9, 2)
    off, on, again = (model(*arguments, lora=lora) for lora in (False, True, False))
    assert torch.equal(off, again) and (on - off).abs().max() > 1e-2
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1])
    without = network(lora_rank=0)
    plain = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
    without.load_state_dict({name: value for name, value in plain.items() if "lora_" not in name})
    torch.testing.assert_close(without(*arguments), off)


def test_a_lora_layer_adds_b_a_x(network):
    model = network(lora_alpha=8)
    layer, x = model.base.transformer_blocks[0].attn.to_q, torch.randn(3, 24)
    a, b = (getattr(layer, f"lora_{m}").ra_lora.weight for m in "AB")
    base = x @ layer.base_layer.weight.T + layer.base_layer.bias
    switch(model.base, True)
    torch.testing.assert_close(layer(x), base + 8 / 4 * (x @ a.T @ b.T))
    switch(model.base, False)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_degradation_removal_is_one_step_with_the_lora(network, texts, latents):
    for t_dr in (1.0, 0.4):
        model, (_, z_lq) = network(t_dr=t_dr), latents()
        v = model(z_lq, z_lq, t_dr, texts(2, 5, 1), texts(2, 9, 2), 2.0, lora=True)
        ours = model.degradation_removal(z_lq, texts(2, 5, 1), texts(2, 9, 2), 2.0)
        torch.testing.assert_close(ours, z_lq - t_dr * v)


def test_training_goes_on_with_and_without_the_lora_under_gradient_checkpointing(network, texts, latents):
    """The backward pass runs the blocks again after the forward pass has long switched: with the right LoRA."""
    x, lr = latents()
    gradients = []
    for checkpointing in (False, True):
        model = network().requires_grad_(True)
        model.gradient_checkpointing = checkpointing
        removed = model.degradation_removal(lr, texts(2, 5, 1), texts(2, 9, 2))
        velocity = model(x, lr, 0.5, texts(2, 5, 1), texts(2, 9, 2))
        (removed.square().mean() + velocity.square().mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


def test_adding_a_lora_freezes_nothing(small):
    """The tiny network's base is trained, too; what is frozen at full size is the trainer's choice."""
    model = DreamSR(small())
    assert all(p.requires_grad for p in model.parameters())
    frozen = DreamSR(small(lora_rank=0)).requires_grad_(False)
    frozen.add_ra_lora(4)
    assert {id(p) for p in frozen.parameters() if p.requires_grad} == {id(p) for p in frozen.lora_parameters()}


def test_switching_leaves_alone_what_requires_a_gradient(network, texts, latents):
    model, (x, lr) = network(), latents()
    for wanted in (False, True):
        model.requires_grad_(wanted)
        for lora in (True, False):
            model(x, lr, 0.5, texts(), texts(), lora=lora)
            assert {p.requires_grad for p in model.parameters()} == {wanted}


def test_a_network_made_in_inference_mode_as_comfyui_does_is_switched_there_and_outside(network, texts, latents):
    x, lr = latents()
    with torch.inference_mode():
        model = network()
        inside = model(x, lr, 0.5, texts(), texts(), lora=True)
    with torch.no_grad():
        assert torch.equal(model(x, lr, 0.5, texts(), texts(), lora=True), inside)
        assert not torch.equal(model(x, lr, 0.5, texts(), texts()), inside)


def test_a_copy_of_the_network_is_switched_on_its_own(network, texts, latents):
    model, (x, lr) = network(), latents()
    twin = copy.deepcopy(model)
    on = model(x, lr, 0.5, texts(), texts(), lora=True)
    assert torch.equal(twin(x, lr, 0.5, texts(), texts(), lora=True), on)
    assert not torch.equal(twin(x, lr, 0.5, texts(), texts()), on)


def test_without_a_lora_the_degradation_removal_says_so(network, texts, latents):
    model, (x, lr) = network(lora_rank=0), latents()
    with pytest.raises(ValueError, match="no RA-LoRA, which the degradation removal needs"):
        model.degradation_removal(lr, texts(), texts())
    model.add_ra_lora(4)
    torch.testing.assert_close(model(x, lr, 0.5, texts(), texts(), lora=True), model(x, lr, 0.5, texts(), texts()))
    with pytest.raises(ValueError, match="a RA-LoRA already, of rank 4"):
        model.add_ra_lora(4)


# shapes, batches, anchor ------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("height", "width"), [(2, 2), (6, 14), (22, 6), (2, 30)])
def test_any_grid_and_batch_of_two_equals_two_singles(network, texts, latents, height, width):
    model, (x, lr) = network(), latents(2, height, width)
    prompt, local, t = texts(2, 5, 1), texts(2, 9, 2), torch.tensor([0.3, 0.9])
    velocity = model(x, lr, t, prompt, local)
    assert velocity.shape == x.shape and velocity.isfinite().all()
    for row in range(2):
        one = slice(row, row + 1)
        single = model(x[one], lr[one], t[row], *(TextEmbedding(p.prompt_embeds[one], p.pooled[one])
                                                  for p in (prompt, local)))
        torch.testing.assert_close(velocity[one], single, atol=1e-4, rtol=1e-4)


def test_guidance_is_told_to_networks_that_know_it_alone(network, texts, latents):
    x, lr = latents()
    outputs = [[network(guidance_embeds=knows)(x, lr, 0.5, texts(), texts(), guidance) for guidance in (1.0, 3.5)]
               for knows in (True, False)]
    assert not torch.allclose(*outputs[0], atol=1e-3) and torch.equal(*outputs[1])


def test_anchor_and_head(network, texts, latents):
    """x0 = condition + output; the head adds to the output what it sees of it and of the condition."""
    (x, lr), t = latents(), 0.4
    free, anchored, headed = network(), network(anchor="lr"), network(head_width=6)
    output = free(x, lr, t, texts(), texts())
    torch.testing.assert_close(x - t * anchored(x, lr, t, texts(), texts()), lr + output, atol=1e-4, rtol=1e-4)
    shared = {name: value for name, value in free.state_dict().items()}
    headed.load_state_dict(shared, strict=False)
    torch.testing.assert_close(headed(x, lr, t, texts(), texts()), headed.head(output, lr), atol=1e-5, rtol=1e-5)
    headed.head.init_zero()
    torch.testing.assert_close(headed(x, lr, t, texts(), texts()), output)


def test_from_scratch_an_anchored_network_gives_the_condition_back(network, texts, latents):
    model, (x, lr) = network(anchor="lr", head_width=6), latents()
    model.init_from_scratch()
    torch.testing.assert_close(x - 0.5 * model(x, lr, 0.5, texts(), texts()), lr, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.degradation_removal(lr, texts(), texts()), lr, atol=1e-5, rtol=1e-5)
    assert not model.control.blocks[1].norm1.linear.weight.any()
    ends = {id(p) for p in [*model.base_parameters(), *model.control_parameters(), *model.lora_parameters()]}
    assert ends == {id(p) for p in model.parameters()}, "every weight belongs to one of the three"


def test_half_precision_under_float32_adapters(network, texts, latents, relative_error):
    """As a training at full size: FLUX in bfloat16, what is trained in float32, no autocast."""
    model, (x, lr) = network(), latents()
    for parameter in model.parameters():
        parameter.mul_(0.3)
    whole = model(x, lr, 0.5, texts(), texts())
    for parameter in model.base.parameters():
        parameter.data = parameter.data.bfloat16()
    mixed = model(x, lr, 0.5, texts(), texts())
    assert mixed.dtype == torch.float32 and relative_error(mixed, whole) < 0.15


def test_what_does_not_fit_is_refused(network, texts, latents):
    model, (x, lr) = network(), latents()
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 12\) but the LR latent \(2, 4, 8, 10\).*enlarge"):
        model(x, lr[..., :10], 0.5, texts(), texts())
    with pytest.raises(ValueError, match=r"4 channels, 8 x 11, does not fit: 4 channels and even sides"):
        model(x[..., :11], lr[..., :11], 0.5, texts(), texts())
    with pytest.raises(ValueError, match=r"3 channels, 8 x 12, does not fit"):
        model(x[:, :3], lr[:, :3], 0.5, texts(), texts())
    for name, prompts in (("global", (texts(1), texts())), ("local", (texts(), texts(1)))):
        with pytest.raises(ValueError, match=f"1 {name} prompts for 2 patches"):
            model(x, lr, 0.5, *prompts)
