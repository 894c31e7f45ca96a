"""The network against the published program's records, and how it is put together and converted."""

import pytest
import torch
from diffusers import DDIMScheduler
from fourfold.nodes.instantir.config import PreviewerConfig
from fourfold.nodes.instantir.model import InstantIR

FORWARD = 1e-4  # relative error


@pytest.fixture
def call(record):
    io = record("inputs")
    return tuple(io[name] for name in ("latent", "timestep", "prompt_embeds", "pooled", "time_ids"))


# the published program's records ----------------------------------------------------------------------------------

def test_the_resampler_equals_the_record(recorded, record, relative_error):
    dcp = record("dcp")
    assert relative_error(recorded.resample(dcp["features"]), dcp["tokens"]) < FORWARD
    assert relative_error(recorded.resample(dcp["features"], previewer=True), dcp["tokens_previewer"]) < FORWARD
    assert relative_error(dcp["tokens_previewer"], dcp["tokens"]) > 0.01, "the LoRA covers the resampler"


def test_the_unet_equals_the_record(recorded, record, relative_error, call):
    tokens = record("dcp")["tokens"]
    assert relative_error(recorded.denoise(*call, tokens), record("unet")["output"]) < FORWARD


def test_the_previewer_equals_the_record(recorded, record, relative_error, call):
    tokens = record("dcp")["tokens_previewer"]
    output = recorded.denoise(*call, tokens, previewer=True)
    assert relative_error(output, record("previewer")["output"]) < FORWARD


def test_the_aggregator_equals_the_record(recorded, record, relative_error, call):
    io, theirs = record("inputs"), record("aggregator")
    down, mid = recorded.aggregate(io["lq_latent"], io["reference"], *(call[i] for i in (1, 3, 4)))
    assert len(down) == 6 == len(theirs) - 1
    for i, ours in enumerate(down):
        assert relative_error(ours, theirs[f"down{i}"]) < FORWARD
    assert relative_error(mid, theirs["mid"]) < FORWARD
    output = recorded.denoise(*call, record("dcp")["tokens"], residuals=([0.7 * z for z in down], 0.7 * mid))
    assert relative_error(output, record("unet_controlled")["output"]) < FORWARD


def test_half_precision_stays_near(published, record, relative_error, call):
    model = InstantIR.load(**published, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.dtype == torch.bfloat16
    output = model.denoise(*call, model.resample(record("dcp")["features"]))
    assert output.dtype == torch.float32 and relative_error(output, record("unet")["output"]) < 0.1


# epsilon and v ----------------------------------------------------------------------------------------------------

def test_levels_are_those_of_the_sampling_schedulers(recorded):
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.tensor([0, 1, 500, 999])
    alpha, sigma = recorded.alpha_sigma(t)
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod[t], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(4))
    alpha, sigma = recorded.alpha_sigma(torch.tensor([500, 500.5, 501]))
    torch.testing.assert_close((sigma / alpha)[1], (sigma / alpha)[[0, 2]].mean())


def test_denoise_gives_epsilon_whatever_the_unet_puts_out(network, conditions):
    """A UNet for v: epsilon = alpha v + sigma x, and x0 = alpha x - sigma v is (x - sigma epsilon) / alpha."""
    model, t = network(prediction="v"), torch.tensor([700, 20])
    args, x = conditions(model), torch.randn(2, 4, 8, 8)
    v, epsilon = model(x, t, *args), model.denoise(x, t, *args)
    alpha, sigma = (level[:, None, None, None] for level in model.alpha_sigma(t))
    torch.testing.assert_close(epsilon, alpha * v + sigma * x)
    torch.testing.assert_close(model.to_clean(v, x, t), (x - sigma * epsilon) / alpha, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network()(x, t, *args), network().denoise(x, t, *args))


def test_a_network_that_puts_out_the_clean_latent_gives_epsilon_too(network, conditions):
    model, t = network(prediction="sample"), torch.tensor([700, 20])
    args, x = conditions(model), torch.randn(2, 4, 8, 8)
    clean, epsilon = model(x, t, *args), model.denoise(x, t, *args)
    alpha, sigma = (level[:, None, None, None] for level in model.alpha_sigma(t))
    torch.testing.assert_close(alpha * clean + sigma * epsilon, x, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.to_clean(clean, x, t), clean)


def test_the_anchor_is_what_the_output_is_a_residual_on(network, conditions):
    model, t = network(prediction="sample", anchor="lr"), torch.tensor([700, 20])
    args, x, lq = conditions(model), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(model(x, t, *args, anchor=lq), lq + model(x, t, *args))
    with pytest.raises(ValueError, match="'sample'"):
        network(prediction="v", anchor="lr")


def test_the_preview_is_a_clean_latent_through_the_boundary_condition(network, conditions):
    model, t, x = network(), torch.tensor([0, 0]), torch.randn(2, 4, 8, 8)
    args = conditions(model, previewer=True)
    torch.testing.assert_close(model.preview(x, t, *args), x)  # at t = 0 it is the latent itself
    t = torch.tensor([300, 700])
    alpha, sigma = (level[:, None, None, None] for level in model.alpha_sigma(t))
    x0 = (x - sigma * model.denoise(x, t, *args, previewer=True)) / alpha
    torch.testing.assert_close(model.preview(x, t, *args), x0, rtol=1e-3, atol=1e-3)


# parts, one after the other ---------------------------------------------------------------------------------------

def test_parts_are_added_to_a_base_without_changing_it(network, conditions, inputs):
    model = network(previewer=False, aggregator=False)
    args, x, t = conditions(model), torch.randn(2, 4, 8, 8), torch.tensor([100, 900])
    before = model.denoise(x, t, *args)
    model.add_previewer(PreviewerConfig(rank=3))
    model.add_aggregator()
    assert torch.equal(model.denoise(x, t, *args), before), "switched off"
    assert torch.equal(model.denoise(x, t, *args, previewer=True), before), "B of a new LoRA is zero"
    down, mid = model.aggregate(torch.randn_like(x), x, t, args[1], args[2])
    assert all(not z.any() for z in (*down, mid)), "the connectors end in zero convolutions"
    assert (model.config.previewer.rank, model.config.aggregator) == (3, True)
    own, base = model.aggregator.state_dict(), model.unet.state_dict()
    assert torch.equal(own["conv_in.weight"], base["conv_in.weight"])
    assert torch.equal(own["ref_conv_in.weight"], base["conv_in.weight"])
    for name in ("down_blocks.0.resnets.0.conv1", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"):
        assert torch.equal(own[f"{name}.weight"], base[f"{name}.base_layer.weight"]), "not the LoRA's wrapped name"


def test_a_base_without_dcp_reads_the_text_alone(network, conditions):
    model = network()
    args = conditions(model)
    base = InstantIR.new(model.unet.config | {}, downscale=4)
    assert base.resampler is None and base.config.downscale == 4
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(500)
    assert base.denoise(x, t, *args[:3]).shape == x.shape
    with pytest.raises(ValueError, match="adapter"):
        base.resample(torch.randn(1, 7, 6))


def test_a_unet_of_diffusers_becomes_a_base(network, conditions, relative_error):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(3)
    config = {name: value for name, value in network().config.unet.items() if not name.startswith("_")}
    unet = UNet2DConditionModel(**config).eval()
    model = InstantIR.new(unet)
    args, x, t = conditions(network()), torch.randn(2, 4, 8, 8), torch.tensor([100, 900])
    with torch.no_grad():
        theirs = unet(x, t, args[0], added_cond_kwargs={"text_embeds": args[1], "time_ids": args[2]}).sample
        torch.testing.assert_close(model.denoise(x, t, *args[:3]), theirs)
    assert model.unet.conv_in.weight.data_ptr() == unet.conv_in.weight.data_ptr(), "shared, not copied"


def test_what_each_training_trains(network):
    model = network()
    names = {part: set(model.part_parameters(part)) for part in ("adapter", "previewer", "aggregator", "unet")}
    assert set().union(*names.values()) == {name for name, _ in model.named_parameters()}
    assert sum(map(len, names.values())) == len(set().union(*names.values())), "no parameter in two parts"
    assert any(".processor.to_k_ip" in name for name in names["adapter"])
    with pytest.raises(ValueError, match="no part 'teacher'"):
        model.part_parameters("teacher")


def test_gradients_reach_what_is_trained_and_nothing_else(network, conditions):
    model, x, t = network(), torch.randn(2, 4, 8, 8), torch.tensor([100, 900])
    for part, previewer in (("adapter", False), ("previewer", True)):
        chosen = model.requires_grad_(False).part_parameters(part)
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        model(x, t, *conditions(model, previewer=previewer), previewer=previewer).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in chosen.values()), part
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        model.zero_grad(set_to_none=True)


def test_gradient_checkpointing_gives_the_same_gradients(network, conditions):
    """Layers run again in backward: the LoRA must still be on there, which the block around both sees to."""
    x, t, grads = torch.randn(2, 4, 8, 8), torch.tensor([100, 900]), []
    for checkpointing in (False, True):
        model = network()
        chosen = model.part_parameters("previewer")
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        if checkpointing:
            model.unet.enable_gradient_checkpointing()
            model.unet.train()
        with model.previewing():
            args = conditions(model, previewer=True)
            model(x, t, *args, previewer=True).square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in chosen.items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


def test_errors_say_what_to_do(network, conditions):
    model = network(previewer=False, aggregator=False)
    x, t, args = torch.randn(2, 4, 8, 8), torch.tensor(1), conditions(model)
    with pytest.raises(ValueError, match="add_previewer"):
        model.denoise(x, t, *args, previewer=True)
    with pytest.raises(ValueError, match="add_aggregator"):
        model.aggregate(x, x, t, args[1], args[2])
    with pytest.raises(ValueError, match="3 rows"):
        model.denoise(torch.randn(3, 4, 8, 8), t, *args)
    model.add_previewer(2)
    with pytest.raises(ValueError, match="already"):
        model.add_previewer(2)
    with pytest.raises(ValueError, match="adapter first"):
        model.add_adapter(model.config.resampler)
    model.add_aggregator()
    with pytest.raises(ValueError, match="expected equal"):
        model.aggregate(x, x[..., :4], t, args[1], args[2])
