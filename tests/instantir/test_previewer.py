"""The Previewer's LoRA: switched without a trace, its key forms, the boundary condition by hand."""

import pytest
import torch
from fourfold.nodes.common.errors import MismatchedKeysError, WrongFileError
from fourfold.nodes.instantir.model import InstantIR
from fourfold.nodes.instantir.previewer import boundary_scalings, plain_state, published_lora, read_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file


def test_switching_leaves_no_trace(network, conditions):
    """On and off twice a step, a hundred steps: not a bit of the UNet's output, nor of a weight, has changed."""
    model, x, t = network(), torch.randn(2, 4, 8, 8), torch.tensor([100, 900])
    args = conditions(model)
    before, weights = model.denoise(x, t, *args), {k: v.clone() for k, v in model.state_dict().items()}
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    with_lora = model.denoise(x, t, *args, previewer=True)
    assert not torch.allclose(with_lora, before, rtol=1e-2, atol=1e-2)
    for _ in range(100):
        model.switch.turn(True)
        model.switch.turn(False)
    assert torch.equal(model.denoise(x, t, *args), before)
    assert torch.equal(model.denoise(x, t, *args, previewer=True), with_lora)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert layers == [m for m in model.modules() if isinstance(m, BaseTunerLayer)], "nothing was rebuilt"
    assert not any(layer.merged for layer in layers)


def test_it_covers_the_unet_and_the_resampler(network):
    model = network()
    adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert {name for name in adapted if name.startswith("resampler.")} == {
        "resampler.proj_in", "resampler.proj_out",
        *(f"resampler.layers.0.0.{name}" for name in ("to_q", "to_kv", "to_out"))}
    block = "unet.down_blocks.1.attentions.0.transformer_blocks.0."
    inside = {name.removeprefix(block) for name in adapted if name.startswith(block)}
    assert inside == {
        *(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")), "attn2.to_q", "attn2.to_out.0",
        *(f"attn2.processor.{name}" for name in ("to_k_ip", "to_v_ip", "ln_k_ip.linear", "ln_v_ip.linear")),
        "ff.net.0.proj", "ff.net.2"}, "the text's keys and values are not adapted"
    resnet = "unet.up_blocks.0.resnets.0."
    inside = {name.removeprefix(resnet) for name in adapted if name.startswith(resnet)}
    assert inside == {"conv1", "conv2", "conv_shortcut", "time_emb_proj"}
    assert {"unet.down_blocks.0.downsamplers.0.conv", "unet.up_blocks.0.upsamplers.0.conv",
            "unet.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_out"} <= adapted
    assert not any(name.startswith("aggregator.") or "embedding" in name or "conv_in" in name for name in adapted)


def test_the_recorded_lora_adapts_the_modules_that_a_new_one_does(recorded, published):
    fresh = InstantIR.load(**published | {"previewer_lora": None})
    fresh.add_previewer(8)
    shapes = [{k: v.shape for k, v in published_lora(model.state_dict()).items()} for model in (recorded, fresh)]
    assert shapes[0] == shapes[1]


def test_blocks_nest_and_survive_errors(network):
    model = network()
    with model.previewing():
        with model.previewing(False):
            assert not model.switch.on
        assert model.switch.on
        with pytest.raises(RuntimeError, match=r"shape|size"):
            model.resample(torch.zeros(1, 2, 5))
        assert model.switch.on
    assert not model.switch.on


def test_switching_leaves_what_trains_as_it_is(network, recorded):
    with recorded.previewing():
        assert not any(p.requires_grad for p in recorded.parameters())
    model = network()
    for parameter in model.part_parameters("previewer").values():
        parameter.requires_grad_(True)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    with model.previewing():
        assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained


def test_alpha_and_rank_scale_it(network, conditions):
    """Alpha 1 means a scale of 1 / rank."""
    model = network()
    layer = model.unet.mid_block.attentions[0].proj_in
    a, b = layer.lora_A["previewer"].weight, layer.lora_B["previewer"].weight
    x = torch.randn(3, a.shape[1])
    plain = layer(x)
    with model.previewing():
        torch.testing.assert_close(layer(x), plain + x @ a.T @ b.T / 2)


@pytest.mark.parametrize("form", ["new", "old"])
def test_both_forms_of_keys(network, conditions, published, recorded, tmp_path, form):
    """The recorded file mixes both; a file in either form alone gives the same network."""
    state = published_lora(recorded.state_dict())
    if form == "old":
        state = {k.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): v for k, v in state.items()}
    save_file(state, tmp_path / "lora.safetensors")
    model = InstantIR.load(**published | {"previewer_lora": tmp_path / "lora.safetensors"})
    ours = model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in recorded.state_dict().items())


def test_names_outside_and_inside(network):
    model = network()
    state = model.state_dict()
    published = published_lora(state)
    assert "unet.encoder_hid_proj.image_projection_layers.0.layers.0.0.to_kv.lora_B.weight" in published
    block = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    assert f"{block}.to_k_ip.lora_A.weight" in published and f"{block}.ln_v_ip.linear.lora_B.weight" in published
    assert not any("processor" in name or "previewer" in name for name in published)
    back, modules, rank = read_lora(published, "here")
    assert rank == 2 and set(back) == {name for name in state if ".lora_" in name}
    assert set(modules) == {name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert set(plain_state(state)) == set(network(previewer=False).state_dict())


def test_wrong_loras_are_named(network, published, recorded, tmp_path):
    state = published_lora(recorded.state_dict())
    with pytest.raises(WrongFileError, match="text_encoder"):
        read_lora(state | {"text_encoder.layer.lora_A.weight": torch.zeros(8, 2)}, "a file")
    with pytest.raises(WrongFileError, match=r"ranks \[3, 8\]"):
        read_lora(state | {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(3, 32)}, "a file")
    some = dict(list(state.items())[2:]), {**state, "unet.mid_block.extra.lora_A.weight": torch.zeros(8, 2)}
    for wrong, words in zip(some, ("does not fit|missing|in 1 layers", "not there: unet.mid_block.extra"), strict=True):
        save_file({k: v.contiguous() for k, v in wrong.items()}, tmp_path / "lora.safetensors")
        if words.startswith("does"):
            del wrong[next(iter(wrong))]
            save_file(wrong, tmp_path / "lora.safetensors")
        with pytest.raises(MismatchedKeysError, match=words):
            InstantIR.load(**published | {"previewer_lora": tmp_path / "lora.safetensors"})


def test_the_boundary_condition_by_hand():
    """d = 0.5, s = 10 t:  c_skip = 0.25 / (s^2 + 0.25),  c_out = s / sqrt(s^2 + 0.25)."""
    c_skip, c_out = boundary_scalings(torch.tensor([0.0, 0.05, 1.0]))
    torch.testing.assert_close(c_skip, torch.tensor([1.0, 0.5, 0.25 / 100.25]))
    torch.testing.assert_close(c_out, torch.tensor([0.0, 0.5**0.5, 10 / 100.25**0.5]))
