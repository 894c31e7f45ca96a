"""The network against the published program's records, against diffusers' Stable Diffusion 3.5, and its files."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from fourfold.nodes.common.checkpoints import read_header
from fourfold.nodes.common.errors import CorruptCheckpointError, MismatchedKeysError, WrongFileError
from fourfold.nodes.common.text import TextEmbedding
from fourfold.nodes.dit4sr.config import PRESETS, Ablations, DiT4SRConfig
from fourfold.nodes.dit4sr.model import DiT4SRTransformer, guess_variant
from fourfold.nodes.dit4sr.restore import sample
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, pad

VARIANTS = ["v1", "r1"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def text_of(io, name, prefix=""):
    return TextEmbedding(io[f"{name}.{prefix}prompt_embeds"], io[f"{name}.{prefix}pooled"])


# the published program's records ----------------------------------------------------------------------------------

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


# file layouts -----------------------------------------------------------------------------------------------------

@pytest.fixture
def published(recorded, tmp_path):
    """A published folder to take apart, with the record of one forward and the model's answer to it."""
    folder, io = recorded("v1")
    copy = shutil.copytree(folder / "transformer", tmp_path / "dit4sr_q" / "transformer")
    names = ("latent", "lr_latent", "timestep", "prompt_embeds", "pooled")
    return copy, lambda model: model(*(io[f"forward1.{name}"] for name in names)), io["forward1.output"]


def shard(folder):
    """Splits the weights into three shards with an index, as large models are published."""
    state = load_file(folder / WEIGHTS)
    names = sorted(state)
    index = {}
    for part in range(3):
        file = f"diffusion_pytorch_model-{part + 1:05d}-of-00003.safetensors"
        save_file({name: state[name] for name in names[part::3]}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names[part::3], file)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("layout", ["folder", "pipeline", "shards", "file", "file alone"])
def test_every_published_layout_loads_with_its_variant(published, tmp_path, relative_error, layout):
    folder, run, output = published
    path = folder
    if layout == "pipeline":
        path = folder.parent
    elif layout == "shards":
        shard(folder)
    elif layout == "file":
        path = folder / WEIGHTS
    elif layout == "file alone":  # no config anywhere: the shapes say the sizes
        state = load_file(folder / WEIGHTS)
        path = tmp_path / "dit4sr_f.safetensors"
        save_file({name: value for name, value in state.items()}, path)
    model = DiT4SRTransformer.from_pretrained(path)
    assert model.config.variant == "v1" == guess_variant(path)
    assert relative_error(run(model), output) < 1e-4
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_saving_and_loading_gives_the_same_network(network, inputs, tmp_path):
    model = network(ablations=Ablations(lr_residual=False, injection_layer="linear"), anchor="lr", latent_shift=0.25)
    model.save_pretrained(tmp_path / "transformer", step=7, training={"photographs": 3})
    for path in (tmp_path, tmp_path / "transformer", tmp_path / "transformer" / WEIGHTS):
        again = DiT4SRTransformer.from_pretrained(path)
        assert again.config == model.config
        assert torch.equal(again(*inputs()), model(*inputs()))
    moved = shutil.move(tmp_path / "transformer" / WEIGHTS, tmp_path / "mine.safetensors")
    assert DiT4SRTransformer.from_pretrained(moved).config == model.config
    header = read_header(moved)
    assert header.method == "dit4sr" and header.step == 7 and header.training == {"photographs": 3}


def test_weights_load_in_the_precision_asked_for(network, inputs, tmp_path):
    model = network()
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert DiT4SRTransformer.from_pretrained(tmp_path).dtype == torch.float32
    half = DiT4SRTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    velocity = half(*inputs())
    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, model(*inputs()), atol=0.5, rtol=0.1)


def test_diffusers_reads_the_folder_that_is_written(network, tmp_path):
    """The published programs build on diffusers' class: the config must be its own, the added keys the only surplus."""
    network().save_pretrained(tmp_path)
    base = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(tmp_path))
    names = set(load_file(tmp_path / WEIGHTS))
    added = {n for n in names if "control" in n or ".attn2.add_" in n or ".attn2.to_add" in n or ".attn2.norm_add" in n}
    assert set(base.state_dict()) == names - added


def test_wrong_missing_and_broken_files_are_named(published, sd3_folder, tmp_path):
    folder, _, _ = published
    with pytest.raises(WrongFileError, match=r"Stable Diffusion 3\.5 medium checkpoint, but a DiT4SR transformer"):
        DiT4SRTransformer.from_pretrained(sd3_folder)
    with pytest.raises(FileNotFoundError, match=r"DiT4SR transformer is missing.*nowhere.*huggingface\.co/acceptee"):
        DiT4SRTransformer.from_pretrained(tmp_path / "nowhere")
    (folder / "config.json").rename(folder / "config.txt")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json.*acceptee/DiT4SR"):
        DiT4SRTransformer.from_pretrained(folder)
    (folder / "config.txt").rename(folder / "config.json")

    state = load_file(folder / WEIGHTS)
    broken = {name: value for name, value in state.items() if name != "transformer_blocks.1.ff.control_conv.bias"}
    save_file(broken | {"extra": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(MismatchedKeysError, match=r"missing: transformer_blocks\.1\.ff\.control_conv\.bias.*extra"):
        DiT4SRTransformer.from_pretrained(folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(CorruptCheckpointError, match="truncated"):
        DiT4SRTransformer.from_pretrained(folder)


def test_an_unknown_variant_is_refused(published):
    with pytest.raises(ValueError, match="variant is 'v3'"):
        DiT4SRTransformer.from_pretrained(published[0], variant="v3")


# a new training on Stable Diffusion 3.5 ---------------------------------------------------------------------------

class WithSilentTokens:
    """Attention of diffusers' SD3 whose softmax also runs over one zero key, with a zero value, for every image token:
    what the LR stream is before anything was learned."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        def heads(tokens):
            return tokens.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        n = hidden_states.shape[1]
        q, k, v = (heads(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        keys, values = [k, torch.zeros_like(k)], [v, torch.zeros_like(v)]
        if encoder_hidden_states is not None:
            q_t, k_t, v_t = (heads(getattr(attn, f"add_{name}_proj")(encoder_hidden_states)) for name in "qkv")
            q = torch.cat([q, attn.norm_added_q(q_t)], dim=2)
            keys.append(attn.norm_added_k(k_t))
            values.append(v_t)
        scores = q @ torch.cat(keys, dim=2).transpose(-1, -2) / q.shape[-1] ** 0.5
        out = (scores.softmax(-1) @ torch.cat(values, dim=2)).transpose(1, 2).flatten(2)
        image = attn.to_out[0](out[:, :n])
        if encoder_hidden_states is None:
            return image
        return image, out[:, n:] if attn.context_pre_only else attn.to_add_out(out[:, n:])


def plain(sd3, latent, timestep, prompt, pooled):
    return sd3(latent, encoder_hidden_states=prompt, pooled_projections=pooled, timestep=timestep).sample


def test_before_training_only_the_softmax_knows_of_the_lr_stream(sd3_folder, sd3, inputs):
    latent, lr_latent, timestep, prompt, pooled = inputs(height=8, width=12)
    velocity = DiT4SRTransformer.from_base(sd3_folder)(latent, lr_latent, timestep, prompt, pooled, 1.2)
    untouched = plain(sd3, latent, timestep, prompt, pooled)
    processors = sd3.attn_processors
    sd3.set_attn_processor(WithSilentTokens())
    try:
        expected = plain(sd3, latent, timestep, prompt, pooled)
    finally:
        sd3.set_attn_processor(processors)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)
    assert (velocity - untouched).norm() > 1e-2 * untouched.norm(), "it is not plain SD3.5"


def test_before_training_case_a_is_plain_sd35(sd3_folder, sd3, inputs):
    latent, lr_latent, timestep, prompt, pooled = inputs(height=12, width=8)
    model = DiT4SRTransformer.from_base(sd3_folder, Ablations(lr_integration=False))
    velocity = model(latent, lr_latent, timestep, prompt, pooled)
    torch.testing.assert_close(velocity, plain(sd3, latent, timestep, prompt, pooled), atol=1e-5, rtol=1e-5)


def test_before_training_the_lr_picture_changes_nothing(sd3_folder, inputs):
    latent, lr_latent, *rest = inputs()
    model = DiT4SRTransformer.from_base(sd3_folder)
    assert torch.equal(model(latent, lr_latent, *rest), model(latent, -lr_latent, *rest))


def test_a_new_training_is_always_r1_and_copies_the_output_layer_of_the_base(sd3_folder, tmp_path):
    folder = shutil.copytree(sd3_folder, tmp_path / "dit4sr_q")
    model = DiT4SRTransformer.from_base(folder)
    assert model.config.variant == "r1"
    state, base = model.state_dict(), load_file(sd3_folder / WEIGHTS)
    assert all(torch.equal(state[name], value) for name, value in base.items())
    attention = "transformer_blocks.1.attn2"
    assert torch.equal(state[f"{attention}.to_out_control.weight"], base[f"{attention}.to_out.0.weight"])
    zero = ("to_q_control", "to_k_control", "to_v_control", "control_conv")
    assert not any(value.any() for name, value in state.items() if any(layer in name for layer in zero))


def test_every_added_weight_has_a_gradient_after_one_step(sd3_folder, inputs):
    model = DiT4SRTransformer.from_base(sd3_folder)
    control = {name: p for name, p in model.named_parameters() if "control" in name}
    assert len(control) == 2 * (3 * 4 + 2 * 4 + 3) and len(model.control_parameters()) == len(control)
    model.requires_grad_(False)
    for parameter in control.values():
        parameter.requires_grad_(True)
    optimizer, silent = torch.optim.AdamW(control.values(), lr=1e-3), []
    for _ in range(2):
        model(*inputs()).square().mean().backward()
        silent.append({name for name, p in control.items() if p.grad is None or not p.grad.any()})
        assert all(p.grad is not None for p in control.values()), "on several processes no gradient may be missing"
        optimizer.step()
        optimizer.zero_grad()
    assert silent[0], "what L becomes is not heard while its values and the convolutions are zero"
    assert all("to_q_control" in name or "to_out_control" in name for name in silent[0])
    assert not silent[1], f"no gradient: {silent[1]}"


@pytest.mark.parametrize("fields", [
    {}, {"variant": "v1"}, {"ablations": Ablations(lr_integration=False)}, {"ablations": Ablations(lr_residual=False)},
    {"ablations": Ablations(lr_injection=False)}, {"ablations": Ablations(injection_layer="linear")}],
    ids=["r1", "v1", "A", "B", "C", "D"])
def test_unused_parameters_are_exactly_those_without_gradient(network, inputs, fields):
    model = network(**fields).requires_grad_(True)
    model(*inputs()).square().mean().backward()
    unused = {id(p) for p in model.unused_parameters()}
    assert {name for name, p in model.named_parameters() if id(p) in unused} == {
        name for name, p in model.named_parameters() if p.grad is None}


def test_a_base_in_another_layout_is_refused(tmp_path):
    save_file({"joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(3, 1),
               "joint_blocks.0.x_block.attn2.qkv.weight": torch.zeros(3, 1)}, tmp_path / "sd3.5_medium.safetensors")
    with pytest.raises(ValueError, match="not in diffusers' layout"):
        DiT4SRTransformer.from_base(tmp_path / "sd3.5_medium.safetensors")
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WrongFileError, match=r"other\.safetensors.*Stable Diffusion 3\.5 medium"):
        DiT4SRTransformer.from_base(tmp_path / "other.safetensors")


# ablations --------------------------------------------------------------------------------------------------------

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


# shapes, batches, anchor ------------------------------------------------------------------------------------------

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


# full size, without memory ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def full():
    with torch.device("meta"):
        return DiT4SRTransformer(PRESETS["full"].network)


def test_full_size_is_sd35_medium_with_the_added_layers(full):
    """Position embeddings of 384 x 384 take diffusers a minute to compute: the base is built with smaller ones."""
    config = {name: value for name, value in PRESETS["full"].network.to_json().items() if not isinstance(value, dict)}
    with torch.device("meta"):
        base = SD3Transformer2DModel.from_config(config | {"pos_embed_max_size": 8, "sample_size": 8})
    ours = {name: tuple(value.shape) for name, value in full.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in base.state_dict().items()}
    theirs["pos_embed.pos_embed"] = (1, 384 * 384, 1536)
    assert {name: ours[name] for name in theirs} == theirs

    added = {}
    for block in range(24):
        for attention in ("attn", "attn2")[: 2 if block <= 12 else 1]:
            for layer in ("to_q_control", "to_k_control", "to_v_control", "to_out_control"):
                added[f"transformer_blocks.{block}.{attention}.{layer}"] = (1536, 1536)
        if block <= 12:
            for layer in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
                added[f"transformer_blocks.{block}.attn2.{layer}"] = (1536, 1536)
        added[f"transformer_blocks.{block}.ff.control_conv"] = (6144, 1, 3, 3)
    expected = {f"{name}.weight": shape for name, shape in added.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in added.items()}
    norms = [f"transformer_blocks.{b}.attn2.norm_added_{n}.weight" for b in range(13) for n in "qk"]
    expected |= dict.fromkeys(norms, (64,))
    assert {name: shape for name, shape in ours.items() if name not in theirs} == expected


def test_full_size_in_numbers(full):
    def count(parameters):
        return sum(p.numel() for p in parameters)

    linear_layer = 1536 * 1536 + 1536
    assert count(full.control_parameters()) == (24 + 13) * 4 * linear_layer + 24 * 6144 * 10 == 350_877_696
    assert count(full.unused_parameters()) == 13 * (4 * linear_layer + 2 * 64) == 122_764_928
    assert count(full.parameters()) == 2_716_814_144
    assert full.transformer_blocks[-1].last and not hasattr(full.transformer_blocks[-1].attn, "to_add_out")
    assert [block.attn2 is not None for block in full.transformer_blocks] == [True] * 13 + [False] * 11


def test_full_size_header_is_read_as_the_full_preset(full):
    shapes = {name: tuple(value.shape) for name, value in full.state_dict().items()}
    assert DiT4SRConfig.from_shapes(shapes) == PRESETS["full"].network == replace(full.config)
