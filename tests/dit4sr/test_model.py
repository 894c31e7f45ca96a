"""The network against the published program's records; its ablations, shapes, batches and anchor."""


import pytest
import torch
from fourfold.nodes.common.text import TextEmbedding
from fourfold.nodes.dit4sr.config import Ablations
from fourfold.nodes.dit4sr.model import DiT4SRTransformer
from fourfold.nodes.dit4sr.restore import sample
from torch.nn.functional import linear, pad

VARIANTS = ["v1", "r1"]


def text_of(io, name, prefix=""):
    return TextEmbedding(io[f"{name}.{prefix}prompt_embeds"], io[f"{name}.{prefix}pooled"])


# the published program's records


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("call", ["forward0", "forward1"])
def test_forward_equals_the_published_program(recorded, relative_error, variant, call):
    folder, io = recorded(variant)
    model = DiT4SRTransformer.from_pretrained(folder / "transformer", variant=variant)
    names = ("latent", "lr_latent", "timestep", "prompt_embeds", "pooled")
    velocity = model(*(io[f"{call}.{name}"] for name in names))
    assert relative_error(velocity, io[f"{call}.output"]) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variants_differ(recorded, relative_error, variant):
    """Read as the other variant, the same weights miss the record by far."""
    folder, io = recorded(variant)
    other = "r1" if variant == "v1" else "v1"
    model = DiT4SRTransformer.from_pretrained(folder / "transformer", variant=other)
    names = ("latent", "lr_latent", "timestep", "prompt_embeds", "pooled")
    assert relative_error(model(*(io[f"forward0.{name}"] for name in names)), io["forward0.output"]) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("run", ["sample_untiled", "sample_untiled_lr", "sample_tiled"])
def test_sampling_equals_the_published_program(recorded, relative_error, variant, run):
    folder, io = recorded(variant)
    model = DiT4SRTransformer.from_pretrained(folder / "transformer", variant=variant)
    tile, overlap, steps = io[f"{run}.tile_overlap_steps"].tolist()
    z_lr = (io[f"{run}.vae_latent"] - model.config.latent_shift) * model.config.latent_scale
    z = sample(model, z_lr, io[f"{run}.noise"], text_of(io, run), text_of(io, run, "negative_"),
               steps=steps, guidance=io[f"{run}.guidance"].item(), tile=tile, overlap=overlap)
    assert relative_error(z, io[f"{run}.output"]) < 1e-3


# ablations


def test_case_c_and_a_zero_scale_both_leave_the_injection_out(network, inputs):
    full, without = network(), network(ablations=Ablations(lr_injection=False))
    assert torch.equal(full(*inputs(), injection_scale=0.0), without(*inputs()))
    assert not torch.equal(full(*inputs()), without(*inputs()))


def test_injection_is_a_depthwise_convolution_on_the_grid(network):
    """h_X + scale * conv(h_L), checked at the layer on a grid that is not square."""
    layer, grid = network().transformer_blocks[0].ff, (3, 5)
    streams = torch.randn(2, 2 * 15, 24)
    x, lr = (layer.net[0](part) for part in streams.chunk(2, dim=1))
    framed = pad(lr.reshape(2, 3, 5, 96), (0, 0, 1, 1, 1, 1))
    kernel = layer.control_conv.weight[:, 0]  # (96, 3, 3)
    injected = sum(framed[:, i:i + 3, j:j + 5] * kernel[:, i, j] for i in range(3) for j in range(3))
    injected = (injected + layer.control_conv.bias).flatten(1, 2)
    expected = torch.cat([layer.net[2](x + 0.7 * injected), layer.net[2](lr)], dim=1)
    torch.testing.assert_close(layer(streams, grid, 0.7), expected, atol=1e-5, rtol=1e-5)


def test_case_d_injects_without_a_neighbourhood(network):
    layer = network(ablations=Ablations(injection_layer="linear")).transformer_blocks[0].ff
    streams = torch.randn(1, 2 * 15, 24)
    x, lr = (layer.net[0](part) for part in streams.chunk(2, dim=1))
    injected = linear(lr, layer.control_linear.weight, layer.control_linear.bias)
    expected = torch.cat([layer.net[2](x + 1.2 * injected), layer.net[2](lr)], dim=1)
    torch.testing.assert_close(layer(streams, (3, 5), 1.2), expected, atol=1e-5, rtol=1e-5)
    assert not hasattr(layer, "control_conv")


@pytest.mark.parametrize("case", [Ablations(lr_integration=False), Ablations(lr_residual=False),
                                  Ablations(lr_injection=False), Ablations(injection_layer="linear")], ids=list("ABCD"))
def test_every_ablation_changes_the_picture(network, inputs, case):
    full, ablated = network(), network(ablations=case)
    shared = {n: v for n, v in full.state_dict().items() if n in ablated.state_dict()}
    ablated.load_state_dict(shared, strict=False)
    assert not torch.allclose(full(*inputs()), ablated(*inputs()), atol=1e-3)


def test_without_integration_and_injection_the_lr_picture_is_not_heard(network, inputs):
    model = network(ablations=Ablations(lr_integration=False, lr_injection=False))
    latent, lr_latent, *rest = inputs()
    assert torch.equal(model(latent, lr_latent, *rest), model(latent, -lr_latent, *rest))


# shapes, batches, anchor


@pytest.mark.parametrize(("height", "width"), [(2, 2), (6, 14), (22, 6), (32, 32), (2, 30)])
def test_any_grid_and_batch_of_two_equals_two_singles(network, inputs, height, width):
    model, arguments = network(), inputs(2, height, width)
    velocity = model(*arguments)
    assert velocity.shape == arguments[0].shape and velocity.isfinite().all()
    for row in range(2):
        single = model(*(tensor[row:row + 1] for tensor in arguments))
        torch.testing.assert_close(velocity[row:row + 1], single, atol=1e-4, rtol=1e-4)


def test_rows_and_columns_are_not_exchanged(network, inputs):
    """A grid of 3 x 5 is not one of 5 x 3: moving the input by a token moves the convolution with it."""
    model, (latent, lr_latent, *rest) = network(), inputs(1, 6, 10)
    wide = model(latent, lr_latent, *rest)
    tall = model(latent.reshape(1, 4, 10, 6), lr_latent.reshape(1, 4, 10, 6), *rest)
    assert not torch.allclose(wide.flatten(), tall.flatten(), atol=1e-3)


def test_latents_that_do_not_fit_are_refused(network, inputs):
    model = network()
    latent, lr_latent, *rest = inputs()
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 8\) but the LR latent \(2, 4, 8, 6\).*enlarge"):
        model(latent, lr_latent[..., :6], *rest)
    for height, width in ((8, 7), (34, 8)):
        latent, lr_latent, *rest = inputs(1, height, width)
        with pytest.raises(ValueError, match=f"{height} x {width} does not fit.*multiples of 2 and at most 32"):
            model(latent, lr_latent, *rest)


def test_scalar_and_batched_timesteps_agree(network, inputs):
    latent, lr_latent, _, prompt, pooled = inputs()
    model = network()
    each = model(latent, lr_latent, torch.tensor([300.0, 300.0]), prompt, pooled)
    assert torch.equal(model(latent, lr_latent, torch.tensor(300.0), prompt, pooled), each)


def test_anchor_reads_the_output_as_a_residual_on_the_lr_latent(network, inputs):
    free, anchored = network(), network(anchor="lr")
    latent, lr_latent, timestep, *rest = inputs()
    output, velocity = (model(latent, lr_latent, timestep, *rest) for model in (free, anchored))
    sigma = (timestep / 1000)[:, None, None, None]
    torch.testing.assert_close(latent - sigma * velocity, lr_latent + output, atol=1e-4, rtol=1e-4)
    anchored.init_from_scratch()
    start = anchored(latent, lr_latent, timestep, *rest)
    torch.testing.assert_close(latent - sigma * start, lr_latent, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(network, inputs):
    gradients = []
    for checkpointing in (False, True):
        model = network().requires_grad_(True)
        model.gradient_checkpointing = checkpointing
        model(*inputs()).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
