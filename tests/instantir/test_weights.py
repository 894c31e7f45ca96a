"""Files: the published ones in every form, what the trainers write, what does not fit, the full size on paper."""

import json
import re
import shutil

import pytest
import torch
from fourfold.nodes.common.checkpoints import detect_family, load_state, read_header
from fourfold.nodes.common.errors import CorruptCheckpointError, MismatchedKeysError, WrongFileError
from fourfold.nodes.common.sdxl_unet import MAKERS_PREFIX, unet_config_from_shapes
from fourfold.nodes.instantir.config import PRESETS, SDXL_UNET, InstantIRConfig
from fourfold.nodes.instantir.model import InstantIR
from fourfold.nodes.instantir.previewer import adapted_modules
from fourfold.nodes.instantir.weights import published_state
from safetensors.torch import save_file


def same(ours, theirs):
    ours, theirs = (published_state(model) for model in (ours, theirs))
    return all(ours[part].keys() == theirs[part].keys() and
               all(torch.equal(value, theirs[part][name]) for name, value in ours[part].items()) for part in ours)


# every form of the files ------------------------------------------------------------------------------------------

def test_a_single_file_in_the_makers_layout(published, recorded, small_sdxl, tmp_path):
    state = {MAKERS_PREFIX + small_sdxl.makers_name(name, 2, {0}): value
             for name, value in load_state(published["unet"]).items()}
    extra = {"first_stage_model.encoder.conv_in.weight": torch.zeros(1), "conditioner.embedders.0.x": torch.zeros(1)}
    save_file(state | extra, tmp_path / "sdxl.safetensors")
    config = json.loads((published["unet"] / "config.json").read_text())
    unknown = {name: config[name] for name in ("attention_head_dim", "norm_num_groups", "addition_time_embed_dim")}
    model = InstantIR.load(**published | {"unet": tmp_path / "sdxl.safetensors"}, unet_config=unknown)
    assert same(model, recorded)
    inferred = model.config.unet
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in inferred.items()}.items() <= (
        config | {"sample_size": 128}).items(), "every size but the three is read off the shapes"


def test_pipeline_folders_unet_folders_and_files_in_them(published, recorded, tmp_path):
    shutil.copytree(published["unet"], tmp_path / "unet")
    for path in (tmp_path, tmp_path / "unet" / "diffusion_pytorch_model.safetensors"):
        assert same(InstantIR.load(**published | {"unet": path}), recorded)


def test_parts_are_found_in_folders(published, recorded):
    folder = published["adapter"].parent
    assert same(InstantIR.load(published["unet"], folder, folder, folder), recorded)
    with pytest.raises(FileNotFoundError, match=r"unet.adapter\.pt does not exist"):
        InstantIR.load(published["unet"], published["unet"])


def test_parts_are_optional(published, recorded):
    base = InstantIR.load(published["unet"])
    assert base.resampler is base.aggregator is base.switch is None
    adapter = InstantIR.load(published["unet"], published["adapter"])
    assert adapter.aggregator is None and adapter.config.resampler == recorded.config.resampler
    with pytest.raises(MismatchedKeysError, match=r"resampler.proj_in.*the adapter"):
        InstantIR.load(published["unet"], previewer_lora=published["previewer_lora"])


def test_sizes_are_read_off_the_weights(published, recorded):
    config = recorded.config
    assert (config.resampler.dim_head, config.resampler.heads, config.resampler.num_queries) == (8, 4, 6)
    assert (config.previewer.rank, config.previewer.alpha, config.aggregator_hidden) == (8, 1.0, 128)
    other = InstantIR.load(published["unet"], published["adapter"], dim_head=16)
    assert (other.config.resampler.dim_head, other.config.resampler.heads) == (16, 2)
    with pytest.raises(ValueError, match="dim_head is 5"):
        InstantIR.load(published["unet"], published["adapter"], dim_head=5)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_one_file_holds_everything_and_describes_itself(network, conditions, tmp_path, dtype):
    model, path = network(prediction="v", downscale=4, latent_scale=1.0), tmp_path / "instantir.safetensors"
    model.save_pretrained(path, step=7, training={"photographs": "some"}, dtype=dtype)
    header = read_header(path)
    assert (detect_family(path), header.step, header.training) == ("instantir", 7, {"photographs": "some"})
    again = InstantIR.from_pretrained(path)
    assert again.config == InstantIRConfig.from_json(json.loads(json.dumps(model.config.to_json())))
    assert not again.training
    assert again.config.previewer.rank == 2 and not any(p.requires_grad for p in again.parameters())
    if dtype is None:
        assert same(again, model)
        args, x, t = conditions(model, previewer=True), torch.randn(2, 4, 8, 8), torch.tensor([5, 900])
        assert torch.equal(again.denoise(x, t, *args, previewer=True), model.denoise(x, t, *args, previewer=True))
    assert InstantIR.from_pretrained(path, torch.bfloat16).dtype == torch.bfloat16


def test_other_weights_can_be_saved(network, tmp_path):
    """An average of what is trained, under the module's names, takes the place of the weights."""
    model, path = network(), tmp_path / "instantir.safetensors"
    state = {name: p.detach() + 1 for name, p in model.part_parameters("previewer").items()}
    model.save_pretrained(path, state)
    again = InstantIR.from_pretrained(path)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in list(state.items())[:4])
    assert torch.equal(again.resampler.latents, model.resampler.latents)
    with pytest.raises(ValueError, match=r"lacks: nothing\.weight"):
        model.save_pretrained(path, {"nothing.weight": torch.zeros(1)})


def test_what_trainers_write_is_loaded_as_the_published_files_are(recorded, published, tmp_path):
    files = {"unet": published["unet"]}
    for part, argument in (("adapter", "adapter"), ("aggregator", "aggregator"), ("previewer", "previewer_lora")):
        files[argument] = tmp_path / f"{part}.safetensors"
        recorded.save_part(files[argument], part, step=3)
        theirs = {k: tuple(v.shape) for k, v in load_state(published[argument]).items()}
        own = {k: tuple(v.shape) for k, v in load_state(files[argument]).items()}
        if part == "previewer":
            theirs = {k.replace("lora.down", "lora_A").replace("lora.up", "lora_B"): v for k, v in theirs.items()}
        assert own == theirs and detect_family(files[argument]) == f"instantir_{part}"
    assert same(InstantIR.load(**files), recorded)
    with pytest.raises(ValueError, match="no part 'unet'"):
        recorded.save_part(tmp_path / "x.safetensors", "unet")
    with pytest.raises(ValueError, match="no aggregator"):
        InstantIR.load(published["unet"]).save_part(tmp_path / "x.safetensors", "aggregator")


def test_a_saved_dim_head_is_found_again(network, tmp_path):
    model = network()
    model.save_part(tmp_path / "adapter.safetensors", "adapter")
    model.unet.save_pretrained(tmp_path / "unet")
    plain = network(previewer=False)
    plain.unet.set_processors(None)
    plain.unet.save_pretrained(tmp_path / "unet")
    again = InstantIR.load(tmp_path / "unet", tmp_path / "adapter.safetensors")
    assert again.config.resampler == model.config.resampler


# what does not fit ------------------------------------------------------------------------------------------------

def test_files_in_the_wrong_place_are_named(published):
    swapped = published | {"adapter": published["aggregator"], "aggregator": published["adapter"]}
    with pytest.raises(WrongFileError, match=r"aggregator\.pt is InstantIR's Aggregator, but InstantIR's adapter"):
        InstantIR.load(**swapped)
    with pytest.raises(WrongFileError, match="SDXL"):
        InstantIR.load(published["adapter"])
    with pytest.raises(WrongFileError, match="InstantIR checkpoint of this project"):
        InstantIR.from_pretrained(published["adapter"])


def test_missing_and_damaged_files_are_named(published, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"aggregator\.pt does not exist.*InstantX/InstantIR"):
        InstantIR.load(**published | {"aggregator": tmp_path / "aggregator.pt"})
    with pytest.raises(FileNotFoundError, match="stable-diffusion-xl-base"):
        InstantIR.load(tmp_path / "sdxl.safetensors")
    (tmp_path / "adapter.pt").write_bytes(published["adapter"].read_bytes()[:2000])
    with pytest.raises(CorruptCheckpointError, match=r"adapter\.pt"):
        InstantIR.load(published["unet"], tmp_path / "adapter.pt")
    (tmp_path / "unet").mkdir()
    shutil.copy(published["unet"] / "diffusion_pytorch_model.safetensors", tmp_path / "unet")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        InstantIR.load(tmp_path / "unet")


@pytest.mark.parametrize(("part", "change", "words"), [
    ("adapter", {"image_proj.latents": None}, "latents"),
    ("adapter", {"image_proj.extra": torch.zeros(1)}, "1 unexpected: extra"),
    ("adapter", {"ip_adapter.3.to_k_ip.weight": torch.zeros(2, 2)}, "of another shape"),
    ("adapter", {"ip_adapter.25.to_k_ip.weight": torch.zeros(2, 2)}, "does not fit the UNet"),
    ("adapter", {"more.x": torch.zeros(1)}, "1 unexpected: more.x"),
    ("aggregator", {"mid_block.resnets.0.conv1.bias": None}, "1 missing: mid_block"),
    ("aggregator", {"up_blocks.0.x": torch.zeros(1)}, "1 unexpected: up_blocks.0.x")])
def test_keys_are_matched_strictly(published, tmp_path, part, change, words):
    state = load_state(published[part]) | change
    save_file({k: v.contiguous() for k, v in state.items() if v is not None}, tmp_path / "part.safetensors")
    with pytest.raises((MismatchedKeysError, ValueError), match=words):
        InstantIR.load(**{"unet": published["unet"], part: tmp_path / "part.safetensors"})


# full size, on paper ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def full():
    with torch.device("meta"):
        model = InstantIR(PRESETS["full"].network)
        model.add_previewer(PRESETS["full"].network.previewer, on_meta=True)
    return model


def test_the_full_adapter_has_the_published_keys_and_shapes(full):
    """SDXL: 1, 2 and 10 transformer blocks deep; attentions only in the two lower levels: 2 + 2 of 640 and 1280 on the
    way down, 3 + 3 on the way up (1280 first), one in the middle; each block holds a self- and a cross-attention."""
    shapes = {name: tuple(value.shape) for name, value in published_state(full)["adapter"].items()}
    down, up = [640] * 2 * 2 + [1280] * 2 * 10, [1280] * 3 * 10 + [640] * 3 * 2
    widths = down + up + [1280] * 10
    assert len(full.unet.attn_processors) == 140 and len(widths) == 70
    expected = {}
    for i, width in enumerate(widths):
        for name, shape in (("to_k_ip.weight", (width, 2048)), ("to_v_ip.weight", (width, 2048)),
                            ("ln_k_ip.linear.weight", (2 * width, 1280)), ("ln_k_ip.linear.bias", (2 * width,)),
                            ("ln_v_ip.linear.weight", (2 * width, 1280)), ("ln_v_ip.linear.bias", (2 * width,))):
            expected[f"ip_adapter.{2 * i + 1}.{name}"] = shape
    head = {"latents": (1, 64, 1280), "proj_in.weight": (1280, 1024), "proj_in.bias": (1280,),
            "proj_out.weight": (2048, 1280), "proj_out.bias": (2048,),
            "norm_out.weight": (2048,), "norm_out.bias": (2048,)}
    for i in range(4):
        head |= {f"layers.{i}.0.{norm}.{kind}": (1280,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        head |= {f"layers.{i}.0.to_q.weight": (1280, 1280), f"layers.{i}.0.to_kv.weight": (2560, 1280),
                 f"layers.{i}.0.to_out.weight": (1280, 1280), f"layers.{i}.1.0.weight": (1280,),
                 f"layers.{i}.1.0.bias": (1280,), f"layers.{i}.1.1.weight": (5120, 1280),
                 f"layers.{i}.1.3.weight": (1280, 5120)}
    assert shapes == expected | {f"image_proj.{name}": shape for name, shape in head.items()}
    names = list(full.unet.attn_processors)
    cross = {i: names[i] for i in full.unet.cross_attentions()}
    assert sorted(cross) == list(range(1, 140, 2)) and all("attn2" in name for name in cross.values())
    assert cross[1].startswith("down_blocks.1") and cross[49].startswith("up_blocks.0")
    assert cross[139].startswith("mid_block"), "the middle comes last"


def test_the_full_aggregator_has_the_published_keys_and_shapes(full):
    shapes = {name: tuple(value.shape) for name, value in published_state(full)["aggregator"].items()}
    unet = {name: tuple(v.shape) for name, v in published_state(full)["unet"].items()}
    copied = {name: shape for name, shape in unet.items()
              if "transformer_blocks" not in name or re.search(r"\.(norm1|norm3|attn1|ff)\.", name)}
    copied = {k: v for k, v in copied.items() if not k.startswith(("up_blocks.", "conv_norm_out.", "conv_out."))}
    expected = copied | {"ref_conv_in.weight": (320, 4, 3, 3), "ref_conv_in.bias": (320,)}
    widths = [320] * 4 + [640] * 3 + [1280] * 2  # of the nine skips
    connectors = {f"controlnet_down_blocks.{i}": width for i, width in enumerate(widths)}
    connectors["controlnet_mid_block"] = 1280
    for place, width in connectors.items():
        expected |= {f"{place}.0.mlp_shared.0.weight": (128, width, 3, 3), f"{place}.0.mlp_shared.0.bias": (128,),
                     f"{place}.0.mul.weight": (width, 128, 3, 3), f"{place}.0.mul.bias": (width,),
                     f"{place}.0.add.weight": (width, 128, 3, 3), f"{place}.0.add.bias": (width,),
                     f"{place}.1.weight": (width, width, 1, 1), f"{place}.1.bias": (width,)}
    assert shapes == expected


def test_the_full_previewer_is_of_rank_64(full):
    """B (out, 64) and A (64, in) around every adapted layer, 3x3 kernels in A."""
    shapes = {name: tuple(value.shape) for name, value in published_state(full)["previewer"].items()}
    with torch.device("meta"):
        plain = InstantIR(PRESETS["full"].network)
    modules, expected = dict(plain.named_modules()), {}
    for name in adapted_modules(plain):
        weight = modules[name].weight.shape
        place = name.replace("attn2.processor.", "attn2.")
        place = place.replace("resampler.", "unet.encoder_hid_proj.image_projection_layers.0.")
        ones = (1, 1)[: len(weight) - 2]
        expected |= {f"{place}.lora_A.weight": (64, *weight[1:]), f"{place}.lora_B.weight": (weight[0], 64, *ones)}
    assert shapes == expected
    # 70 blocks of 12, proj_in and proj_out of 11 transformers, 17 resnets of 3, 11 shortcuts, 4 samplers, the resampler
    assert len(shapes) == 2 * (70 * 12 + 11 * 2 + 17 * 3 + 11 + 4 + 2 + 4 * 3)
    assert full.config.previewer.alpha == 1


def test_the_config_of_sdxl_is_read_off_the_makers_layout(full, small_sdxl):
    state = {name: value for name, value in published_state(full)["unet"].items()}
    shapes = {small_sdxl.makers_name(name, 2, {0, 1}): tuple(value.shape) for name, value in state.items()}
    assert len(shapes) == len(state) == 1680
    config = unet_config_from_shapes(shapes)
    assert config.items() <= (SDXL_UNET | {"norm_num_groups": 32}).items()
    assert set(SDXL_UNET) - set(config) == {"_class_name"}
