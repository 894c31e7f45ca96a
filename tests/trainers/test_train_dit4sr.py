"""DiT4SR's trainer at both sizes, very small: what trains, what is written, what continues."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from fourfold.nodes.common.checkpoints import read_header
from fourfold.nodes.common.images import read_image, resize, write_image
from fourfold.nodes.dit4sr.config import Ablations
from fourfold.nodes.dit4sr.model import DiT4SRTransformer
from fourfold.nodes.dit4sr.restore import load_system, restore
from fourfold.trainers import dit4sr_cache, train_dit4sr
from fourfold.trainers.data import Photographs
from fourfold.trainers.fit import parse
from fourfold.trainers.order import generator_of
from fourfold.trainers.resume import checkpoints
from fourfold.trainers.train_dit4sr import TINY, DiT4SRTraining, build, train, with_preset_defaults
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("dit4sr_training.py")
CLEAN = Path(__file__).parents[2] / "photographs" / "clean"
SPEC = importlib.util.spec_from_file_location("dit4sr_training", PROGRAM)
program = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(program)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three small photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("cat", "coffee", "astronaut"):
        write_image(folder / f"{name}.png", resize(read_image(CLEAN / f"{name}.jpg")[:, :3], (72, 96)))
    return folder


@pytest.fixture
def config(photographs, tmp_path):
    return DiT4SRTraining(preset="tiny", photographs=str(photographs), output_dir=str(tmp_path / "run"),
                          learning_rate=1e-3, l1=0.3, export_dtype="float16", **program.SETTINGS)


def batch_of(study, config, count=2):
    crops = Photographs(config.photographs, config.crop, config.degradation, config.seed)
    return torch.utils.data.default_collate([crops[i] for i in range(count)])


def trained(study):
    return {name: p for name, p in study.named_parameters() if p.requires_grad}


# settings ---------------------------------------------------------------------------------------------------------

def test_defaults_are_the_papers():
    config = parse(DiT4SRTraining, [])
    assert (config.learning_rate, config.schedule, config.max_steps, config.crop) == (5e-5, "constant", 150_000, 512)
    assert (config.degradation, config.null_prompt, config.t5_length) == ("seesr", 0.2, 77)
    assert (config.sigma_mean, config.sigma_std, config.sigma_shift) == (0, 1, 3)
    assert (config.loss_weight, config.l1) == ("sigma2", 0)
    assert not config.trains_base and DiT4SRTraining(train_base=True).trains_base
    assert config.ablations == Ablations()


def test_tiny_has_defaults_of_its_own_that_can_be_overridden():
    for argv in (["--preset", "tiny", "--l1", "0.1"], ["--preset=tiny", "--l1=0.1"]):
        config = parse(DiT4SRTraining, with_preset_defaults(argv, TINY))
        assert config.l1 == 0.1 and config.crop == TINY["crop"] and config.mixed_precision == "bf16"
        assert config.trains_base
    assert with_preset_defaults(["--preset", "full"], TINY) == ["--preset", "full"]


def test_full_size_needs_the_base(config):
    with pytest.raises(ValueError, match=r"--sd3 is missing: the folder of Stable Diffusion 3\.5"):
        build(replace(config, preset="full"))
    with pytest.raises(FileNotFoundError, match=r"Diffusion 3\.5 medium is missing: nowhere .*huggingface"):
        build(replace(config, preset="full", sd3="nowhere"))


# the loss ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("weight", ["none", "sigma2"])
def test_loss_by_hand(config, weight):
    """The same draws in the same order, each formula written out."""
    config = replace(config, loss_weight=weight, l1=0.0, null_prompt=0.5, sigma_mean=0.2, sigma_std=0.7)
    study = build(config, program.NETWORK)
    torch.nn.init.normal_(study.transformer.proj_out.weight, std=0.1)
    batch = batch_of(study, config, 4)
    draws = generator_of("draws")
    u = torch.sigmoid(0.2 + 0.7 * torch.randn(4, generator=draws))
    sigma = 3 * u / (1 + 2 * u)
    codec, config_of = study.autoencoder, study.transformer.config
    z, z_lr = ((codec.encode(x) - config_of.latent_shift) * config_of.latent_scale
               for x in (batch["hr"], resize(batch["lr"], (32, 32))))
    noise = torch.randn(z.shape, generator=draws)
    null = torch.rand(4, generator=draws) < 0.5
    assert 0 < null.sum() < 4
    text = study.text.encode(["" if n else caption for n, caption in zip(null, batch["caption"], strict=True)])
    s = sigma[:, None, None, None]
    velocity = study.transformer((1 - s) * z + s * noise, z_lr, 1000 * sigma, text.prompt_embeds, text.pooled, 1.0)
    error = (velocity - (noise - z)) * (s if weight == "sigma2" else 1)
    torch.testing.assert_close(study(batch, generator_of("draws")), error.square().mean())


def test_every_prompt_is_null_at_probability_one(config):
    study = build(replace(config, null_prompt=0.999999), program.NETWORK)
    told = []
    study.text.register_forward_pre_hook(lambda _, arguments: told.append(arguments[1].sum(dim=1).tolist()))
    study(batch_of(study, config), generator_of(0))
    assert told == [[1, 1]], "the end-of-text token alone"


@pytest.mark.parametrize("switch", [{}, {"lr_integration": False}, {"lr_residual": False}, {"lr_injection": False},
                                    {"injection_layer": "linear"}, {"train_base": False}],
                         ids=["full method", "A", "B", "C", "D", "control only"])
def test_every_trained_parameter_has_a_gradient(config, switch):
    study = build(replace(config, **switch), program.NETWORK)
    study(batch_of(study, config), generator_of(0)).backward()
    assert [name for name, p in trained(study).items() if p.grad is None] == []
    names = set(trained(study))
    assert any("to_q_control" in name for name in names)
    if "train_base" in switch:
        assert all("control" in name for name in names)
    else:
        assert any(name.startswith("text.") for name in names)


@pytest.mark.parametrize("switch", [{"lr_integration": False}, {"lr_residual": False}, {"lr_injection": False},
                                    {"injection_layer": "linear"}, {"loss_weight": "none"}], ids=[*"ABCD", "none"])
def test_every_switch_trains_and_is_exported(config, switch):
    result = train(replace(config, max_steps=1, **switch), program.NETWORK)
    exported = DiT4SRTransformer.from_pretrained(result.folder / "transformer")
    assert math.isfinite(result.loss)
    for name, value in switch.items():
        assert name == "loss_weight" or getattr(exported.config.ablations, name) == value


def test_gradient_checkpointing_gives_the_same_losses(config, curve):
    train(config, program.NETWORK)
    other = replace(config, output_dir=config.output_dir + "2", gradient_checkpointing=True)
    train(other, program.NETWORK)
    plain, saving = curve(config.output_dir), curve(other.output_dir)
    assert [plain[i]["loss"] for i in range(1, 7)] == pytest.approx([saving[i]["loss"] for i in range(1, 7)], rel=1e-5)


# a whole training -------------------------------------------------------------------------------------------------

def test_training_learns_and_exports_a_system(config, photographs):
    config = replace(config, max_steps=40, batch_size=4, save_every=0, mixed_precision="bf16", ema_decay=0.5,
                     learning_rate=5e-3)
    before = build(config, program.NETWORK)
    result = train(config, program.NETWORK)
    assert {p.name for p in result.folder.iterdir()} == {"transformer", "text.safetensors", "codec.safetensors"}
    after = build(config, program.NETWORK)
    after.transformer.load_state_dict(DiT4SRTransformer.from_pretrained(result.folder / "transformer").state_dict())
    batch = batch_of(before, config, 8)
    losses = [study(batch, generator_of("test")).item() for study in (before, after)]
    assert losses[1] < 0.95 * losses[0]

    system = load_system(result.folder, device="cpu")
    system.sampling = replace(system.sampling, steps=2, min_short_side=32)
    sr = restore(torch.rand(1, 3, 8, 10), system)
    assert sr.shape == (1, 3, 32, 40) and sr.isfinite().all()
    header = read_header(result.folder / "transformer")
    assert header.step == 40 and {dtype for dtype, _ in header.tensors.values()} == {"F16"}
    assert header.training["photographs"] == photographs.name and header.training["learning_rate"] == 5e-3
    for file in ("transformer", "text.safetensors"):
        assert str(photographs.parent) not in json.dumps(read_header(result.folder / file).metadata)


def test_killed_training_continues_with_the_same_losses(config, photographs, curve, tmp_path):
    config = replace(config, max_steps=8, save_every=2)
    train(config, program.NETWORK)
    command = [sys.executable, str(PROGRAM), "--photographs", str(photographs), "--learning_rate", "1e-3",
               "--output_dir", str(tmp_path / "killed"), "--max_steps", "100000", "--save_every", "2", "--l1", "0.3",
               "--export_dtype", "float16"]
    with open(tmp_path / "errors.txt", "w") as errors:
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=errors)
    end = time.monotonic() + 300
    while not checkpoints(tmp_path / "killed"):
        assert process.poll() is None, (tmp_path / "errors.txt").read_text()
        assert time.monotonic() < end, "the training did not get to a checkpoint in time"
        time.sleep(0.01)
    process.kill()
    process.wait()
    first = min(int(folder.name.removeprefix("step-")) for folder in checkpoints(tmp_path / "killed"))
    resumed = replace(config, output_dir=str(tmp_path / "killed"), max_steps=max(8, first + 2), resume="latest")
    train(resumed, program.NETWORK)
    continued, unbroken = curve(tmp_path / "killed"), curve(config.output_dir)
    for step in range(1, 9):  # the last digits may differ: the killed process ran on another number of threads
        assert continued[step] == pytest.approx(unbroken[step], rel=1e-5)


@pytest.mark.slow
def test_two_processes_train(config, photographs, curve, tmp_path):
    """Without GPUs `--multi_gpu` makes processes meet over gloo; here they also share the work of a cache."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               str(PROGRAM), "--cpu", "True", "--photographs", str(photographs), "--output_dir", str(tmp_path / "two"),
               "--max_steps", "3", "--cache", str(tmp_path / "cache"), "--cached_crops", "6", "--sample_every", "3",
               "--samples", "1"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = curve(tmp_path / "two")
    assert sorted(losses) == [1, 2, 3] and (tmp_path / "two" / "samples" / "step-00000003-0.png").is_file()
    state = torch.load(checkpoints(tmp_path / "two")[-1] / "state.pt", weights_only=True)
    assert state["order"]["processes"] == 2


def test_sample_pictures_are_drawn_on_the_way(config, curve):
    config = replace(config, max_steps=2, sample_every=1, samples=2)
    train(config, program.NETWORK)
    folder = Path(config.output_dir) / "samples"
    names = [f"step-0000000{step}-{i}.png" for step in (1, 2) for i in range(2)]
    assert sorted(p.name for p in folder.iterdir()) == names
    sheets = [read_image(folder / name) for name in names]
    assert {sheet.shape for sheet in sheets} == {(1, 3, 32, 96)}
    lr, _, hr = sheets[0].chunk(3, dim=-1)
    crops = Photographs(config.photographs, 32, "seesr", min_scale=config.min_scale)
    item = crops[train_dit4sr.HELD_OUT]
    torch.testing.assert_close(hr[0], item["hr"], atol=0.5 / 255 + 1e-6, rtol=0)
    torch.testing.assert_close(lr[0], resize(item["lr"][None], (32, 32))[0], atol=0.5 / 255 + 1e-6, rtol=0)
    assert torch.equal(sheets[0].chunk(3, dim=-1)[2], sheets[2].chunk(3, dim=-1)[2]), "the same crops every time"
    lines = [json.loads(line) for line in (Path(config.output_dir) / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if 5 < line.get("sample_psnr", 0) < 60] == [1, 2]


# the cache --------------------------------------------------------------------------------------------------------

def spy_on_encode(monkeypatch):
    """Notes how many crops every call of `encode` got."""
    counts = []
    encode = train_dit4sr.DiT4SRStudy.encode
    monkeypatch.setattr(train_dit4sr.DiT4SRStudy, "encode",
                        lambda study, batch: counts.append(len(batch["hr"])) or encode(study, batch))
    return counts


def test_cached_training_reads_the_cache_alone_and_gives_the_same_losses(config, curve, tmp_path, monkeypatch):
    counts = spy_on_encode(monkeypatch)
    config = replace(config, cache=str(tmp_path / "cache"), cached_crops=5, max_steps=4)
    train(config, program.NETWORK)
    assert counts == [2, 2, 1]
    again = replace(config, output_dir=config.output_dir + "2")
    train(again, program.NETWORK)
    assert counts == [2, 2, 1] and curve(again.output_dir) == curve(config.output_dir)

    study = build(config, program.NETWORK)
    batch = batch_of(study, config)
    cached = study.encode(batch)
    assert set(cached) == {"latent", "lr_latent", "prompt_ids", "prompt_mask"}
    assert torch.equal(study(cached, generator_of(1)), study(batch, generator_of(1)))


def test_interrupted_caching_continues(config, tmp_path, monkeypatch):
    config = replace(config, cache=str(tmp_path / "cache"), cached_crops=6, max_steps=1)
    counts = spy_on_encode(monkeypatch)
    encode = train_dit4sr.DiT4SRStudy.encode

    def interrupted(study, batch):
        if len(counts) == 2:
            raise KeyboardInterrupt
        return encode(study, batch)

    monkeypatch.setattr(train_dit4sr.DiT4SRStudy, "encode", interrupted)
    monkeypatch.setattr(dit4sr_cache, "SHARD_ITEMS", 2)
    with pytest.raises(KeyboardInterrupt):
        train(config, program.NETWORK)
    monkeypatch.setattr(train_dit4sr.DiT4SRStudy, "encode", encode)
    train(config, program.NETWORK)
    assert counts == [2, 2, 2]


def test_a_cache_of_another_configuration_is_refused(config, tmp_path):
    config = replace(config, cache=str(tmp_path / "cache"), cached_crops=2, max_steps=1)
    train(config, program.NETWORK)
    other = replace(config, degradation="light", output_dir=config.output_dir + "2")
    with pytest.raises(ValueError, match=r"configuration: photographs and degradation was \w+, now \w+\. Train"):
        train(other, program.NETWORK)
    train(replace(other, degradation=config.degradation, cached_crops=3), program.NETWORK)  # more of the same


# full size, with a small Stable Diffusion 3.5 ---------------------------------------------------------------------

@pytest.fixture(scope="module")
def sd3(small_text_encoders):
    """The whole diffusers folder of a small Stable Diffusion 3.5."""
    folder = small_text_encoders.folder
    torch.manual_seed(0)
    SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=small_text_encoders.width,
        pooled_projection_dim=small_text_encoders.pooled, pos_embed_max_size=64, dual_attention_layers=(0,),
        qk_norm="rms_norm").save_pretrained(folder / "transformer")
    AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1, shift_factor=0.0609,
        scaling_factor=1.5305, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False).save_pretrained(folder / "vae")
    return folder


@pytest.fixture
def full(config, sd3, monkeypatch):
    """Training at full size; its sample pictures would take minutes at the paper's 40 steps and 512 px."""
    preset = train_dit4sr.PRESETS["full"]
    quick = replace(preset, sampling=replace(preset.sampling, steps=1, min_short_side=16, tile=16, overlap=4))
    monkeypatch.setitem(train_dit4sr.PRESETS, "full", quick)
    return replace(config, preset="full", sd3=str(sd3), export_dtype="bfloat16", l1=0.0, max_steps=2)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_full_size_trains_the_lr_stream_alone(full, sd3, precision):
    full = replace(full, mixed_precision=precision, export_dtype="float32", sample_every=2, samples=1)
    result = train(full)
    exported = load_file(result.folder / "transformer" / "diffusion_pytorch_model.safetensors")
    base = load_file(sd3 / "transformer" / "diffusion_pytorch_model.safetensors")
    as_trained = torch.float32 if precision == "no" else torch.bfloat16
    assert all(torch.equal(exported[name], value.to(as_trained).float()) for name, value in base.items())
    added = set(exported) - set(base)
    moved = {name for name in added if "control" in name and exported[name].any()}
    assert all("control" in name or ".attn2." in name for name in added)
    assert {"transformer_blocks.1.attn.to_v_control.weight", "transformer_blocks.0.ff.control_conv.weight"} <= moved
    config = json.loads((result.folder / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "SD3Transformer2DModel" and config["fourfold"]["variant"] == "r1"
    assert sorted(p.name for p in result.folder.iterdir()) == ["transformer"], "the published folder, nothing else"
    assert "Stability AI" in read_header(result.folder / "transformer").metadata["fourfold.licence"]
    assert (Path(full.output_dir) / "samples" / "step-00000002-0.png").is_file()
    system = load_system(result.folder, base=sd3, device="cpu")
    sr = restore(torch.rand(1, 3, 4, 5), system, steps=1)
    assert sr.shape == (1, 3, 16, 20)


def test_frozen_encoders_stay_in_evaluation_mode(full):
    """T5 has dropout: in training mode a prompt would not be the same twice."""
    study = build(full).train()
    assert study.transformer.training and not study.autoencoder.training and not study.text.t5.training
    assert torch.equal(study.encode_text(["a bridge"]).prompt_embeds, study.encode_text(["a bridge"]).prompt_embeds)
    assert study.encode_text(["a bridge"]).prompt_embeds.shape[1] == 77 + 77


def test_cached_full_size_needs_no_text_encoders_afterwards(full, tmp_path, monkeypatch, curve):
    loads = []
    load = train_dit4sr.load_text_encoders
    monkeypatch.setattr(train_dit4sr, "load_text_encoders", lambda config: loads.append(1) or load(config))
    full = replace(full, cache=str(tmp_path / "cache"), cached_crops=4, sample_every=2, samples=1, null_prompt=0.5)
    train(full)
    again = replace(full, output_dir=full.output_dir + "2")
    train(again)
    assert len(loads) == 1 and curve(again.output_dir) == curve(full.output_dir)

    study = build(replace(full, cache=None))
    batch = batch_of(study, full, 4)
    cached = study.encode(batch)
    assert cached["prompt_embeds"].shape == (4, 154, 64)
    on_the_fly = study(batch, generator_of(5))
    torch.testing.assert_close(study(cached, generator_of(5)), on_the_fly)
    study.text = None
    train_dit4sr.cached(full, study, Photographs(full.photographs, full.crop, full.degradation, full.seed))
    torch.testing.assert_close(study(cached, generator_of(5)), on_the_fly)
    with pytest.raises(KeyError, match="not in the cache"):
        study.text.encode(["never asked for"])


def test_a_cache_of_other_text_encoders_is_refused(full, sd3, tmp_path):
    full = replace(full, cache=str(tmp_path / "cache"), cached_crops=2, max_steps=1)
    train(full)
    with pytest.raises(ValueError, match=r"t5_length was 77, now 40"):
        train(replace(full, t5_length=40, output_dir=full.output_dir + "2"))
    (sd3 / "text_encoder" / "note.txt").write_text("other files")
    try:
        with pytest.raises(ValueError, match=r"text encoders was \w+, now \w+"):
            train(replace(full, output_dir=full.output_dir + "2"))
    finally:
        (sd3 / "text_encoder" / "note.txt").unlink()
