"""What a new training on Stable Diffusion 3.5 begins with, and which weights it trains."""

import shutil

import pytest
import torch
from fourfold.nodes.common.errors import WrongFileError
from fourfold.nodes.dit4sr.config import Ablations
from fourfold.nodes.dit4sr.model import DiT4SRTransformer
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


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
