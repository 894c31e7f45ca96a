"""Files: the whole network in one, adapters beside FLUX in both of its layouts, parts apart, and what is wrong."""

import pytest
import torch
from fourfold.nodes.common.checkpoints import read_header
from fourfold.nodes.common.errors import CorruptCheckpointError, MismatchedKeysError, WrongFileError
from fourfold.nodes.dreamsr.config import DreamSRConfig
from fourfold.nodes.dreamsr.model import DreamSR
from fourfold.nodes.dreamsr.weights import read_config, save
from safetensors.torch import load_file, save_file

ADAPTERS = ("control", "ra_lora")


def same(a, b):
    states = a.state_dict(), b.state_dict()
    return set(states[0]) == set(states[1]) and all(torch.equal(value, states[1][n]) for n, value in states[0].items())


@pytest.fixture
def trained(small_flux):
    """A network on the small FLUX whose adapters are random everywhere."""
    torch.manual_seed(1)
    model = DreamSR.from_base(small_flux.folder, lora_rank=4, lora_alpha=6, t_dr=0.9)
    for parameter in [*model.control_parameters(), *model.lora_parameters()]:
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def test_one_file_holds_the_whole_network_and_describes_itself(network, tmp_path):
    model = network(anchor="lr", head_width=6, lora_alpha=2, t_dr=0.7)
    file = tmp_path / "tiny.safetensors"
    model.save_pretrained(file, step=7, training={"hours": 2})
    header = read_header(file)
    assert (header.method, header.step, header.training) == ("dreamsr", 7, {"hours": 2})
    assert {name.split(".")[0] for name in header.tensors} == {"base", "head", "control", "ra_lora"}
    assert not any("base_layer" in name or ".ra_lora." in name for name in header.tensors), "peft's names stay outside"
    loaded = DreamSR.from_pretrained(file)
    assert same(loaded, model) and loaded.config == model.config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_half_precision_and_a_folder(network, texts, latents, tmp_path):
    model, (x, lr) = network(), latents()
    model.save_pretrained(tmp_path / "export", dtype=torch.float16)
    loaded = DreamSR.from_pretrained(tmp_path / "export", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded(x, lr, 0.5, texts(), texts(), lora=True).isfinite().all()
    assert same(DreamSR.from_pretrained(tmp_path / "export"), model.half().float())


@pytest.mark.parametrize("layout", ["diffusers folder", "transformer", "makers' file", "makers' folder"])
def test_adapters_load_on_flux_in_every_layout(trained, small_flux, tmp_path, layout):
    base = {"diffusers folder": small_flux.folder, "transformer": small_flux.folder / "transformer",
            "makers' file": small_flux.files / "flux1-dev.safetensors", "makers' folder": small_flux.files}[layout]
    trained.save_pretrained(tmp_path / "adapters.safetensors", parts=ADAPTERS)
    header = read_header(tmp_path / "adapters.safetensors")
    assert {name.split(".")[0] for name in header.tensors} == set(ADAPTERS), "FLUX is not ours to pass on"
    loaded = DreamSR.from_pretrained(tmp_path / "adapters.safetensors", base)
    assert same(loaded, trained) and loaded.config == trained.config


def test_a_new_network_on_a_single_file_has_flux_own_proportions(small_flux, tmp_path):
    """Heads of 32 rotate 4 : 14 : 14, as the file's sizes tell."""
    sizes = dict(attention_head_dim=32, num_attention_heads=1, axes_dims_rope=(4, 14, 14))
    base = small_flux.transformer(**sizes)
    file = tmp_path / "flux1.safetensors"
    save_file(small_flux.makers_layout(base.state_dict()), file)
    model = DreamSR.from_base(file, lora_rank=2)
    assert model.config.axes_dims_rope == (4, 14, 14)
    model.save_pretrained(tmp_path / "adapters.safetensors", parts=ADAPTERS)
    assert same(DreamSR.from_pretrained(tmp_path / "adapters.safetensors", file), model)


def test_control_net_and_ra_lora_in_two_files(trained, small_flux, tmp_path):
    control, lora = tmp_path / "control.safetensors", tmp_path / "lora.safetensors"
    trained.save_pretrained(control, parts=("control",))
    trained.save_pretrained(lora, parts=("ra_lora",))
    assert read_config(control)[1] == ("control",) and read_config(lora)[1] == ("ra_lora",)
    both = DreamSR.from_pretrained(control, small_flux.folder, lora)
    assert same(both, trained) and (both.config.lora_alpha, both.config.t_dr) == (6, 0.9)
    alone = DreamSR.from_pretrained(control, small_flux.folder)
    assert alone.config.lora_rank == 0 and not alone.lora_parameters()
    with pytest.raises(WrongFileError, match=r"lora\.safetensors holds ra_lora, but no MM-ControlNet"):
        DreamSR.from_pretrained(lora, small_flux.folder)
    with pytest.raises(WrongFileError, match=r"control\.safetensors holds no RA-LoRA, only control"):
        DreamSR.from_pretrained(control, small_flux.folder, control)


def test_a_lora_from_another_file_replaces_the_own_one(trained, small_flux, tmp_path):
    whole, lora = tmp_path / "whole.safetensors", tmp_path / "lora.safetensors"
    trained.save_pretrained(whole)
    other = DreamSR.from_base(small_flux.folder, lora_rank=2)
    other.save_pretrained(lora, parts=("ra_lora",))
    mixed = DreamSR.from_pretrained(whole, ra_lora=lora)
    assert mixed.config.lora_rank == 2 and mixed.config.lora_alpha is None
    assert all(torch.equal(a, b) for a, b in zip(mixed.lora_parameters(), other.lora_parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(mixed.control_parameters(), trained.control_parameters(), strict=True))


def test_an_average_of_some_weights_is_written_in_their_place(trained, tmp_path):
    average = {name: value + 1 for name, value in trained.state_dict().items() if name.startswith("control.x_embedder")}
    trained.save_pretrained(tmp_path / "ema.safetensors", average)
    loaded = DreamSR.from_pretrained(tmp_path / "ema.safetensors").state_dict()
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded[name], average.get(name, value))


def test_what_is_missing_is_named(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"network is missing: .*dreamsr\.safetensors.*train_dreamsr\.py"):
        DreamSR.from_pretrained(tmp_path)
    file = tmp_path / "adapters.safetensors"
    trained.save_pretrained(file, parts=ADAPTERS)
    with pytest.raises(FileNotFoundError, match=r"adapters alone; FLUX\.1-dev is needed with it"):
        DreamSR.from_pretrained(file)
    with pytest.raises(FileNotFoundError, match=r"FLUX transformer is missing"):
        DreamSR.from_pretrained(file, tmp_path / "flux1-dev.safetensors")
    with pytest.raises(ValueError, match=r"parts of a DreamSR file are base, control, ra_lora; got .*'adapters'"):
        trained.save_pretrained(file, parts=("adapters",))


def test_wrong_files_are_refused_before_flux_is_loaded(trained, network, small_flux, tmp_path):
    flux_file = small_flux.files / "flux1-dev.safetensors"
    with pytest.raises(WrongFileError, match=r"flux1-dev\.safetensors is a FLUX\.1-dev transformer.*DreamSR"):
        DreamSR.from_pretrained(flux_file, flux_file)
    network().save_pretrained(tmp_path / "other.safetensors", parts=ADAPTERS)
    with pytest.raises(WrongFileError, match=r"does not fit the MM-ControlNet: .*joint_attention_dim 16 instead of 12"):
        DreamSR.from_pretrained(tmp_path / "other.safetensors", small_flux.folder)
    file = tmp_path / "whole.safetensors"
    trained.save_pretrained(file)
    save_file(load_file(file), tmp_path / "stripped.safetensors")
    with pytest.raises(WrongFileError, match=r"stripped\.safetensors has lost its description"):
        DreamSR.from_pretrained(tmp_path / "stripped.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CorruptCheckpointError, match=r"cut\.safetensors is truncated"):
        DreamSR.from_pretrained(tmp_path / "cut.safetensors")


def test_keys_are_matched_strictly(network, tmp_path):
    model = network()
    model.save_pretrained(tmp_path / "whole.safetensors")
    state = load_file(tmp_path / "whole.safetensors")
    state.pop("control.blocks.1.ff.net.2.bias")
    state["control.surplus"] = torch.zeros(1)
    save(tmp_path / "wrong.safetensors", model.config, state, ("base", "control", "ra_lora"))
    with pytest.raises(MismatchedKeysError, match=r"1 missing: control\.blocks\.1\.ff\.net\.2\.bias; 1 unexpected"):
        DreamSR.from_pretrained(tmp_path / "wrong.safetensors")


def test_config_round_trip_and_unknown_fields(small):
    config = small(t_dr=0.9)
    assert DreamSRConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="has no surprise; update Fourfold"):
        DreamSRConfig.from_json(config.to_json() | {"surprise": 1})
