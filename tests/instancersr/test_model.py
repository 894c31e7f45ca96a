"""The network against diffusers' DiT, its branch, its files, its size."""

import json
import shutil

import pytest
import torch
from diffusers import DiTTransformer2DModel
from fourfold.nodes.common.checkpoints import read_header
from fourfold.nodes.common.errors import CorruptCheckpointError, MismatchedKeysError, WrongFileError
from fourfold.nodes.instancersr.config import PRESETS, Ablations
from fourfold.nodes.instancersr.diffusion import add_noise, clean_latent, levels
from fourfold.nodes.instancersr.model import InstanceRSR
from safetensors.torch import load_file, save_file

NO_MASKS = Ablations(mask_modelling=False)
NO_LEARNING = Ablations(representation_learning=False)


def plain(dit, z, timestep, null_class=5):
    """Noise and variance of diffusers' DiT without a class, (B, C, h, w) each."""
    classes = torch.full((len(z),), null_class)
    return dit(z, timestep=timestep, class_labels=classes).sample.chunk(2, dim=1)


# a new training on a DiT ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("side", [8, 4, 12])
def test_before_training_the_picture_half_is_the_base_whatever_map_and_lr(begun, dit, inputs, side):
    model = begun().eval()
    latent, lr_latent, timestep = inputs(3, side, side)
    eps, variance = plain(dit, latent[:, :4], timestep)
    with torch.no_grad():
        first = model(latent, lr_latent, timestep)
        other = model(torch.cat([latent[:, :4], 9 * latent[:, 4:].flip(0)], dim=1), -7 * lr_latent, timestep)
    for prediction in (first, other):
        torch.testing.assert_close(prediction.eps[:, :4], eps, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(prediction.variance[:, :4], variance, atol=2e-6, rtol=1e-5)
        assert not prediction.eps[:, 4:].any() and not prediction.variance[:, 4:].any()


def test_before_training_without_mask_modelling_the_network_is_the_base(begun, dit, inputs):
    model = begun(ablations=NO_MASKS).eval()
    latent, lr_latent, timestep = inputs(channels=4)
    for ours, theirs in zip(model(latent, lr_latent, timestep)[:2], plain(dit, latent, timestep), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_a_base_without_learned_variance_is_widened_too(begun, inputs, tmp_path):
    base = DiTTransformer2DModel(3, 8, 4, 4, num_layers=3, sample_size=8, num_embeds_ada_norm=5)
    base.save_pretrained(tmp_path)
    model = begun(tmp_path).eval()
    latent, lr_latent, timestep = inputs()
    prediction = model(latent, lr_latent, timestep)
    theirs = base.eval()(latent[:, :4], timestep=timestep, class_labels=torch.full((2,), 5)).sample
    assert prediction.variance is None and not model.config.learned_variance
    torch.testing.assert_close(prediction.eps[:, :4], theirs, atol=2e-6, rtol=1e-5)


def test_widened_rows_lie_between_the_base_rows_of_every_position(begun, dit_folder):
    """[eps_x, eps_m, var_x, var_m] at each of the 2 x 2 positions of a patch."""
    model = begun()
    base = load_file(dit_folder / "transformer" / "diffusion_pytorch_model.safetensors")["proj_out_2.bias"]
    for position in range(4):
        ours, theirs = model.proj_out_2.bias[16 * position:][:16], base[8 * position:][:8]
        assert torch.equal(ours[0:4], theirs[:4]) and torch.equal(ours[8:12], theirs[4:])
        assert not ours[4:8].any() and not ours[12:].any()


def test_zero_layers_have_gradients_at_once_and_all_others_after_one_step(begun, inputs):
    model = begun()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    silent = []
    for _ in range(2):
        eps, variance, features = model(*inputs())
        (eps - 1).square().mean().add(variance.mean()).add(model.align(features).square().mean()).backward()
        silent.append({name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()})
        if len(silent) == 1:
            new_rows = model.proj_out_2.weight.grad.unflatten(0, (4, 2, 2, 4))[:, 0, 1]
            assert (new_rows.abs().sum(-1) > 0).all(), "every row that writes the map"
            assert (model.pos_embed.proj.weight.grad[:, 4:].abs().sum((2, 3)) > 0).all(), "all that reads the map"
            assert all(p.weight.grad.any() and p.bias.grad.any() for p in model.control.projections)
        optimizer.step()
        optimizer.zero_grad()
    # keys' biases shift all scores of a query alike: the softmax does not see them
    deaf = {name for name in silent[0] | silent[1] if name.endswith("attn1.to_k.bias")}
    assert silent[0] - deaf and all(name.startswith("control.") for name in silent[0] - deaf)
    assert not any("projections" in name for name in silent[0])
    assert not silent[1] - deaf


def test_the_branch_copies_the_first_blocks(begun):
    model = begun()
    state = model.state_dict()
    for name, value in model.control.blocks.state_dict().items():
        assert torch.equal(value, state[f"transformer_blocks.{name}"]) and value.data_ptr() != state[
            f"transformer_blocks.{name}"].data_ptr()
    assert torch.equal(state["control.pos_embed.proj.weight"], state["pos_embed.proj.weight"][:, :4])
    assert not any(p.any() for p in model.control.projections.parameters())


def test_added_parameters_leave_the_base_alone(begun):
    model = begun()
    added = {id(p) for p in model.added_parameters()}
    kept = {name.split(".")[0] for name, p in model.named_parameters() if id(p) not in added}
    assert kept == {"transformer_blocks", "proj_out_1"}


def test_other_folders_are_refused(begun, dit_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the DiT is missing.*facebook/DiT-XL-2-512"):
        begun(tmp_path / "nowhere")
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(1), "y_embedder.embedding_table.weight": torch.zeros(1)},
              tmp_path / "DiT-XL-2-512x512.safetensors")
    with pytest.raises(ValueError, match="not in diffusers' layout"):
        begun(tmp_path / "DiT-XL-2-512x512.safetensors")
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WrongFileError, match=r"other\.safetensors.*class-conditional DiT"):
        begun(tmp_path / "other.safetensors")
    folder = shutil.copytree(dit_folder / "transformer", tmp_path / "dit")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"attention_bias": False}))
    with pytest.raises(ValueError, match="attention_bias"):
        begun(folder)
    (folder / "config.json").write_text(json.dumps(content | {"num_layers": 4}))
    with pytest.raises(MismatchedKeysError, match=r"missing: transformer_blocks\.3"):
        begun(folder)


# the forward ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("height", "width"), [(2, 2), (6, 14), (22, 6), (2, 30)])
def test_any_grid_and_batch_of_two_equals_two_singles(network, inputs, height, width):
    model, arguments = network(), inputs(2, height, width)
    both = model(*arguments)
    assert both.eps.shape == both.variance.shape == arguments[0].shape
    assert both.features.shape == (2, height * width // 4, 24)
    for row in range(2):
        single = model(*(tensor[row:row + 1] for tensor in arguments))
        for a, b in zip(both, single, strict=True):
            torch.testing.assert_close(a[row:row + 1], b, atol=1e-4, rtol=1e-4)


def test_a_wide_grid_is_put_together_row_by_row(network, inputs):
    """With tokens that only know their own patch, a wide latent is the blocks of a square one, side by side."""
    model = network()
    for block in (*model.transformer_blocks, *model.control.blocks):
        block.norm1.linear.weight.zero_()
        block.norm1.linear.bias.zero_()
    model.pos_embed.base = model.control.pos_embed.base = 1e-9  # every token at the origin
    latent, lr_latent, timestep = inputs(1, 4, 10)
    wide = model(latent, lr_latent, timestep).eps
    for top in (0, 2):
        for left in range(0, 10, 2):
            one = model(latent[..., top:top + 2, left:left + 2], lr_latent[..., top:top + 2, left:left + 2], timestep)
            torch.testing.assert_close(wide[..., top:top + 2, left:left + 2], one.eps, atol=1e-5, rtol=1e-4)


def test_both_halves_and_the_lr_latent_matter_to_both_halves(network, inputs):
    model = network()
    latent, lr_latent, timestep = inputs()
    eps = model(latent, lr_latent, timestep).eps
    picture, instances = latent.chunk(2, dim=1)
    for changed in ((torch.cat([-picture, instances], 1), lr_latent), (torch.cat([picture, -instances], 1), lr_latent),
                    (latent, -lr_latent)):
        other = model(*changed, timestep).eps
        assert all((a - b).norm() > 1e-3 * b.norm() for a, b in zip(other.chunk(2, 1), eps.chunk(2, 1), strict=True))


def test_features_are_those_after_the_aligned_block_with_the_branchs_addition(network, inputs):
    model = network()
    latent, lr_latent, timestep = inputs()
    every = model.block_features(latent, lr_latent, timestep)
    assert len(every) == 3
    for block in (1, 2, 3):
        aligned = network(align_block=block)
        assert torch.equal(aligned(latent, lr_latent, timestep).features, every[block - 1])
    silent = network()
    silent.control.init_projections()
    tokens = silent.block_features(latent, lr_latent, timestep)[0]
    added = model.control(lr_latent, lambda block, x: block(
        x, timestep=timestep, class_labels=torch.full((2,), 5)))
    torch.testing.assert_close(every[0], tokens + added[0])
    assert model.align(every[1]).shape == (2, 16, 6)


def test_the_variance_is_left_out_where_the_network_has_none(network, inputs):
    assert network(learned_variance=False)(*inputs()).variance is None


@pytest.mark.parametrize("ablations", [NO_MASKS, NO_LEARNING])
def test_ablations_leave_their_part_out(network, inputs, ablations):
    model = network(ablations=ablations)
    prediction = model(*inputs(channels=model.config.joint_channels))
    assert prediction.eps.shape[1] == (8 if ablations.mask_modelling else 4)
    assert (model.align is None) == (not ablations.representation_learning)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_every_parameterisation_gives_the_noise(network, inputs, prediction):
    """The same output, read as noise, as v = alpha eps - sigma z0, or as the clean latent."""
    latent, lr_latent, timestep = inputs()
    output = network()(latent, lr_latent, timestep).eps
    eps = network(prediction=prediction)(latent, lr_latent, timestep).eps
    alpha, sigma = levels(timestep)
    clean = clean_latent(latent, eps, timestep)
    told = {"epsilon": eps, "v": alpha * eps - sigma * clean, "x0": clean}[prediction]
    torch.testing.assert_close(told, output, atol=1e-3, rtol=1e-3)


def test_anchor_reads_the_output_as_a_residual_on_the_lr_latent(network, inputs):
    latent, lr_latent, timestep = inputs()
    output = network()(latent, lr_latent, timestep).eps
    anchored = network(prediction="x0", anchor="lr")
    clean = clean_latent(latent, anchored(latent, lr_latent, timestep).eps, timestep)
    torch.testing.assert_close(clean[:, :4], lr_latent + output[:, :4], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(clean[:, 4:], output[:, 4:], atol=1e-3, rtol=1e-3)
    anchored.init_from_scratch()
    start = clean_latent(latent, anchored(latent, lr_latent, timestep).eps, timestep)
    torch.testing.assert_close(start[:, :4], lr_latent, atol=1e-3, rtol=1e-3)


def test_from_scratch_every_weight_is_heard_after_a_few_steps(small, inputs):
    torch.manual_seed(0)
    model = InstanceRSR(small(prediction="x0", anchor="lr", learned_variance=False, head_width=6))
    model.init_from_scratch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        eps, _, features = model(*inputs())
        (eps.clamp(-9, 9).square().mean() + model.align(features).square().mean()).backward()
        optimizer.step()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not {name for name in silent if not name.endswith("attn1.to_k.bias")}


def test_the_head_starts_as_the_identity_and_sees_the_lr_latent(network, inputs):
    latent, lr_latent, timestep = inputs()
    plain_eps = network()(latent, lr_latent, timestep).eps
    model = network(head_width=6)
    model.load_state_dict(network().state_dict(), strict=False)
    assert not torch.allclose(model(latent, lr_latent, timestep).eps, plain_eps, atol=1e-3)
    model.head.init_zero()
    assert torch.equal(model(latent, lr_latent, timestep).eps, plain_eps)


def test_latents_that_do_not_fit_are_refused(network, inputs):
    model = network()
    latent, lr_latent, timestep = inputs()
    with pytest.raises(ValueError, match=r"\(2, 8, 8, 8\) and the LR latent \(2, 4, 8, 6\).*enlarge"):
        model(latent, lr_latent[..., :6], timestep)
    with pytest.raises(ValueError, match=r"expected \(B, 8, h, w\)"):
        model(latent[:, :4], lr_latent, timestep)
    with pytest.raises(ValueError, match=r"8 x 7 does not fit.*multiples of 2"):
        model(latent[..., :7], lr_latent[..., :7], timestep)


def test_scalar_and_batched_timesteps_agree(network, inputs):
    latent, lr_latent, _ = inputs()
    model = network()
    each = model(latent, lr_latent, torch.tensor([300, 300]))
    assert torch.equal(model(latent, lr_latent, torch.tensor(300)).eps, each.eps)


def test_gradient_checkpointing_changes_no_gradient(network, inputs):
    gradients = []
    for checkpointing in (False, True):
        model = network().requires_grad_(True).train()
        model.gradient_checkpointing = checkpointing
        eps, _, features = model(*inputs())
        (eps.square().mean() + model.align(features).square().mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


# files ------------------------------------------------------------------------------------------------------------

def test_saving_and_loading_gives_the_same_network(network, inputs, tmp_path):
    model = network(ablations=NO_LEARNING, prediction="v", latent_shift=0.25)
    file = model.save_pretrained(tmp_path / "export", step=7, training={"photographs": 3})
    moved = shutil.copy(file, tmp_path / "mine.safetensors")
    for path in (tmp_path / "export", file, moved):
        again = InstanceRSR.from_pretrained(path)
        assert again.config == model.config and torch.equal(again(*inputs()).eps, model(*inputs()).eps)
        assert not again.training and not any(p.requires_grad for p in again.parameters())
        assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))
    header = read_header(moved)
    assert header.method == "instancersr" and header.step == 7 and header.training == {"photographs": 3}


def test_under_autocast_tokens_stay_in_full_precision(network, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        prediction = network()(*inputs())
    assert prediction.features.dtype == prediction.eps.dtype == torch.float32
    torch.testing.assert_close(prediction.eps, network()(*inputs()).eps, atol=0.3, rtol=0.1)


def test_weights_load_in_the_precision_asked_for(network, inputs, tmp_path):
    model = network()
    model.save_pretrained(tmp_path, dtype=torch.float16)
    assert InstanceRSR.from_pretrained(tmp_path).dtype == torch.float32
    half = InstanceRSR.from_pretrained(tmp_path, dtype=torch.bfloat16)
    eps = half(*inputs()).eps
    assert half.dtype == torch.bfloat16 and eps.dtype == torch.float32
    torch.testing.assert_close(eps, model(*inputs()).eps, atol=0.3, rtol=0.1)


def test_wrong_missing_and_broken_files_are_named(network, dit_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"InstanceRSR network is missing.*nowhere.*train_instancersr"):
        InstanceRSR.from_pretrained(tmp_path / "nowhere")
    weights = dit_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(WrongFileError, match=r"class-conditional DiT .*but an InstanceRSR checkpoint is needed"):
        InstanceRSR.from_pretrained(weights)
    file = network().save_pretrained(tmp_path)
    state, metadata = load_file(file), read_header(file).metadata
    save_file({name: value for name, value in state.items() if name != "control.projections.1.bias"}, file, metadata)
    with pytest.raises(MismatchedKeysError, match=r"missing: control\.projections\.1\.bias"):
        InstanceRSR.from_pretrained(file)
    save_file(state, file)
    with pytest.raises(ValueError, match="does not describe itself"):
        InstanceRSR.from_pretrained(file)
    save_file(state, file, metadata)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptCheckpointError, match="truncated"):
        InstanceRSR.from_pretrained(file)


# noise ------------------------------------------------------------------------------------------------------------

def test_noise_levels_undo_each_other():
    z0, noise = torch.randn(2, 3, 8, 4, 4)
    t = torch.tensor([0, 500, 999])
    z_t = add_noise(z0, noise, t)
    torch.testing.assert_close(clean_latent(z_t, noise, t), z0, atol=1e-3, rtol=1e-3)
    alpha, sigma = levels(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(3, 1, 1, 1))
    assert sigma[0].item() == pytest.approx(1e-4**0.5, rel=1e-3) and alpha[2] < 0.01
    with pytest.raises(ValueError, match=r"\[1000\]; expected whole numbers in 0..999"):
        levels(torch.tensor([1000]))


# full size, without memory ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def full():
    with torch.device("meta"):
        return InstanceRSR(PRESETS["full"].network)


def test_full_size_is_dit_xl_2_with_the_added_layers(full):
    with torch.device("meta"):
        base = DiTTransformer2DModel(in_channels=4, out_channels=8, sample_size=64)
    ours = {name: tuple(value.shape) for name, value in full.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in base.state_dict().items()}
    wider = {"pos_embed.proj.weight": (1152, 8, 2, 2), "proj_out_2.weight": (64, 1152), "proj_out_2.bias": (64,)}
    assert theirs["pos_embed.proj.weight"] == (1152, 4, 2, 2) and theirs["proj_out_2.weight"] == (32, 1152)
    assert {name: ours[name] for name in theirs} == theirs | wider
    expected = {f"control.{name.removeprefix('transformer_')}": shape for name, shape in theirs.items()
                if name.startswith(tuple(f"transformer_blocks.{i}." for i in range(10)))}
    expected |= {"control.pos_embed.proj.weight": (1152, 4, 2, 2), "control.pos_embed.proj.bias": (1152,)}
    for i in range(10):
        expected |= {f"control.projections.{i}.weight": (1152, 1152), f"control.projections.{i}.bias": (1152,)}
    for i, (rows, columns) in {0: (2048, 1152), 2: (2048, 2048), 4: (1024, 2048)}.items():
        expected |= {f"align.{i}.weight": (rows, columns), f"align.{i}.bias": (rows,)}
    assert {name: shape for name, shape in ours.items() if name not in theirs} == expected


def test_sizes_in_numbers(full):
    def count(module):
        return sum(p.numel() for p in module.parameters())

    d = 1152
    attention, mlp, modulation = 4 * (d * d + d), 8 * d * d + 5 * d, 6 * d * d + 6 * d
    embedding = 256 * d + d + d * d + d + 1001 * d  # of timestep and class, in every block
    block = attention + mlp + modulation + embedding
    assert count(full.transformer_blocks) == 28 * block == 747_113_472
    assert count(full.control) == 10 * (block + d * d + d) + 16 * d + d == 280_128_384
    assert count(full.align) == 2048 * (d + 1) + 2048 * 2049 + 1024 * 2049 == 8_655_872
    assert count(full) == 1_038_666_048
    with torch.device("meta"):
        tiny = InstanceRSR(PRESETS["tiny"].network)
    assert 5_000_000 < count(tiny) < 8_000_000


def test_full_size_config_is_read_off_the_published_one():
    """The fields of facebook/DiT-XL-2-512's config.json that say something."""
    content = {"_class_name": "Transformer2DModel", "activation_fn": "gelu-approximate", "attention_bias": True,
               "attention_head_dim": 72, "in_channels": 4, "norm_type": "ada_norm_zero", "num_attention_heads": 16,
               "num_embeds_ada_norm": 1000, "num_layers": 28, "out_channels": 8, "patch_size": 2, "sample_size": 64}
    config = PRESETS["full"].network
    assert type(config).from_base(content) == config and config.null_class == 1000
    assert type(config).from_json(json.loads(json.dumps(config.to_json()))) == config
