"""DiT4SR's nodes: what is found when a workflow is queued, and that they do what restore.py does."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fourfold.nodes.common import checkpoints, tiny
from fourfold.nodes.common.sampling import cpu_noise
from fourfold.nodes.common.text import TextEmbedding
from fourfold.nodes.dit4sr.config import PRESETS
from fourfold.nodes.dit4sr.model import DiT4SRTransformer

SHIFT, SCALE = 0.2, 0.5  # z = (latent - shift) * scale


@pytest.fixture
def transformer(model_folder, network):
    """Name of a small checkpoint in ComfyUI's model folder, and its network."""
    made = network(latent_shift=SHIFT, latent_scale=SCALE)
    checkpoints.save_checkpoint(
        model_folder / "small.safetensors", made.state_dict(), method="dit4sr", config=made.config.to_json())
    return "small.safetensors", made


@pytest.fixture
def model(comfyui, network):
    from fourfold.nodes.common.host.models import host

    return host(network(latent_shift=SHIFT, latent_scale=SCALE), "dit4sr")


def prompt(seed=0, **extras):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 5, 12, generator=draw), {"pooled_output": torch.randn(1, 10, generator=draw), **extras}]


def latent(batch=1, height=8, width=8, channels=4):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(3))


def run(nodes, model, samples, positive=None, negative=None, **widgets):
    settings = {"seed": 5, "steps": 2, "guidance": 3.0, "start_sigma": 0.8, "injection_scale": 1.1, "tile": 8,
                "overlap": 4, "tile_batch": 2, **widgets}
    conditions = (positive or [prompt(1)], negative or [prompt(2)])
    return nodes["FourfoldMMDiTControlSampler"].execute(model, *conditions, {"samples": samples}, **settings).args[0]


# loader


def test_the_loader_lists_and_loads_what_lies_in_comfyuis_folders(nodes, model_folder, transformer):
    name, network = transformer
    loader = nodes["FourfoldDiT4SRLoader"]
    (model_folder / tiny.FILES["codec"]).touch()  # not offered: nobody wants it as a transformer
    assert loader.define_schema().inputs[0].options == [name]
    assert loader.validate_inputs(name) is True and loader.validate_inputs(None) is True
    model = loader.execute(name, "auto", "fp32").args[0]
    assert model.method == "dit4sr" and model.network.config == network.config
    assert all(torch.equal(a, b) for a, b in zip(model.network.parameters(), network.parameters(), strict=True))
    assert loader.execute(name, "v1", "bf16").args[0].network.config.variant == "v1"
    assert loader.execute(name, "v1", "bf16").args[0].network.dtype == torch.bfloat16


@pytest.mark.parametrize("variant", ["v1", "r1"])
def test_a_published_folder_is_one_model(nodes, model_folder, recorded, variant):
    folder, _ = recorded(variant)
    shutil.copytree(folder / "transformer", model_folder / f"dit4sr_{variant}" / "transformer")
    loader = nodes["FourfoldDiT4SRLoader"]
    (name,) = [option for option in loader.define_schema().inputs[0].options if option.endswith("transformer")]
    assert loader.validate_inputs(name) is True
    assert loader.execute(name, "auto", "fp32").args[0].network.config.variant == variant


def test_what_is_wrong_with_a_file_is_said_at_queue_time(nodes, model_folder, transformer):
    validate = nodes["FourfoldDiT4SRLoader"].validate_inputs
    whole = (model_folder / "small.safetensors").read_bytes()
    (model_folder / "short.safetensors").write_bytes(whole[:-10])
    (model_folder / "text.safetensors").write_text("this is a letter, not a checkpoint")
    sdxl = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1),
            "model.diffusion_model.label_emb.0.0.weight": torch.zeros(1, 2816)}
    checkpoints.save_file(sdxl, model_folder / "sdxl.safetensors")
    assert "acceptee/DiT4SR" in validate("gone.safetensors") and str(model_folder) in validate("gone.safetensors")
    assert "truncated" in validate("short.safetensors")
    assert "text file" in validate("text.safetensors")
    assert "an SDXL checkpoint, but a DiT4SR transformer" in validate("sdxl.safetensors")


def test_a_changed_file_is_loaded_again(nodes, model_folder, transformer):
    fingerprint = nodes["FourfoldDiT4SRLoader"].fingerprint_inputs
    before = fingerprint(transformer=transformer[0], variant="auto", dtype="fp32")
    (model_folder / "small.safetensors").touch()
    assert fingerprint(transformer=transformer[0]) != before
    assert fingerprint(transformer=None, variant="auto", dtype="fp32") == ""


# sampler


def test_the_sampler_is_sample_on_scaled_latents(nodes, model):
    from fourfold.nodes.dit4sr.restore import sample

    unscaled = latent(batch=2, height=12, width=8)
    z_lr = (unscaled - SHIFT) * SCALE
    texts = [TextEmbedding(tokens, extras["pooled_output"]) for tokens, extras in (prompt(1), prompt(2))]
    expected = sample(model.network, z_lr, cpu_noise(5, z_lr.shape), *texts, steps=2, guidance=3.0, start_sigma=0.8,
                      injection_scale=1.1, tile=8, overlap=4, tile_batch=2)
    result = run(nodes, model, unscaled)
    assert set(result) == {"samples"}
    assert torch.allclose(result["samples"], expected / SCALE + SHIFT, atol=1e-5)


def test_a_batch_of_two_equals_two_singles(nodes, model):
    both = latent(batch=2)
    together = run(nodes, model, both)["samples"]
    apart = [run(nodes, model, both[b : b + 1], seed=5 + b)["samples"] for b in range(2)]
    assert torch.allclose(together, torch.cat(apart), atol=1e-4)


def test_several_prompts_are_averaged_by_strength(nodes, model):
    def one_step(*positive):
        return run(nodes, model, latent(), positive=list(positive), steps=1, guidance=1.0)["samples"]

    mixed = one_step(prompt(1, strength=1.0), prompt(7, strength=3.0))
    assert torch.allclose(mixed, 0.25 * one_step(prompt(1)) + 0.75 * one_step(prompt(7)), atol=1e-5)
    assert not torch.allclose(one_step(prompt(1)), one_step(prompt(7)), atol=1e-3)


def test_prompts_of_different_lengths_go_together(nodes, model):
    long = [torch.cat([prompt(2)[0], prompt(4)[0]], dim=1), prompt(2)[1]]
    assert run(nodes, model, latent(), negative=[long])["samples"].isfinite().all()


def test_a_cancelled_run_makes_no_further_network_call(nodes, model, monkeypatch):
    import comfy.model_management as management

    calls = []
    monkeypatch.setattr(model.network, "_check", lambda *_: calls.append(management.interrupt_current_processing(True)))
    with pytest.raises(management.InterruptProcessingException):
        run(nodes, model, latent(height=24))
    assert len(calls) == 1
    monkeypatch.undo()
    assert run(nodes, model, latent())["samples"].isfinite().all()


def test_another_vaes_latent_is_refused(nodes, model):
    for samples in (latent(channels=16), latent()[:, :, None]):
        with pytest.raises(ValueError, match=r"lr_latent is .* expected \(B, 4, h, w\)"):
            run(nodes, model, samples)


@pytest.mark.parametrize(
    ("widgets", "complaint"),
    [({"tile": 64, "overlap": 64}, "must be smaller than tile"), ({"tile": 63}, "an even number from 8"),
     ({"tile": 1024}, "an even number from 8 to 512"), ({"overlap": -1}, "overlap is -1"), ({}, True),
     ({"tile": 64, "overlap": 24}, True), ({"tile": None, "overlap": 24}, True)],
)
def test_tile_and_overlap_are_checked_at_queue_time(nodes, widgets, complaint):
    answer = nodes["FourfoldMMDiTControlSampler"].validate_inputs(**widgets)
    assert answer is True if complaint is True else complaint in answer


def test_the_paper_gives_the_defaults(nodes):
    widgets = [i for i in nodes["FourfoldMMDiTControlSampler"].define_schema().inputs if hasattr(i, "default")]
    assert {widget.id: widget.default for widget in widgets} == {
        "seed": 0, "steps": 40, "guidance": 8.0, "start_sigma": 1.0, "injection_scale": 1.2, "tile": 64, "overlap": 24,
        "tile_batch": 4}


def test_the_help_names_the_values_that_the_tiny_model_wants():
    page = (Path(__file__).parents[2] / "web" / "docs" / "FourfoldTinyModels.md").read_text(encoding="utf-8")
    page = page.split("| DiT4SR |")[1].split("\n\n")[0]
    table = dict(re.findall(r"^\| (?:.*: )?(\w+) \| (\S+) \|$", page, re.MULTILINE))
    sampling = PRESETS["tiny"].sampling
    wanted = {name: str(getattr(sampling, name)) for name in ("steps", "guidance", "start_sigma", "tile", "overlap",
                                                              "tile_batch", "multiple", "min_short_side")}
    wanted |= {"injection_scale": str(PRESETS["tiny"].network.injection_scale), "method": sampling.color_fix}
    assert {name: table[name] for name in wanted} == wanted


# the whole way


@pytest.fixture
def tiny_family(tmp_path, monkeypatch):
    """Checkpoints of a family smaller than the tiny one, with random weights, in place of the shipped ones."""
    from fourfold.nodes.common.codec import LinearCodec
    from fourfold.nodes.common.tiny_text import TinyTextConfig, TinyTextEncoder

    torch.manual_seed(0)
    config = replace(
        PRESETS["tiny"].network, num_layers=2, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
        joint_attention_dim=16, pooled_projection_dim=16, latent_shift=SHIFT, latent_scale=SCALE)
    network = DiT4SRTransformer(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    monkeypatch.setattr(tiny, "CHECKPOINTS", tmp_path)
    checkpoints.save_checkpoint(
        tmp_path / tiny.FILES["dit4sr"], network.state_dict(), method="dit4sr", config=config.to_json())
    TinyTextEncoder(TinyTextConfig(width=16, layers=1, heads=2, hidden=16)).save(tmp_path / tiny.FILES["text"])
    LinearCodec().save(tmp_path / tiny.FILES["codec"])


@torch.inference_mode()
def test_the_graph_of_the_tiny_workflow_is_restore(nodes, only_in_comfyui, tiny_family):
    from fourfold.nodes.dit4sr.restore import load_system, restore

    import nodes as stock

    lr = torch.rand(1, 3, 32, 40)
    expected = restore(lr, load_system("tiny", device="cpu"), scale=4, seed=7).movedim(1, -1)

    settings = PRESETS["tiny"].sampling
    model, clip, vae = nodes["FourfoldTinyModels"].execute("dit4sr").args
    (prepared,), frames = nodes["FourfoldLRPrepare"].execute(
        lr.movedim(1, -1), 4.0, 0, 0, settings.multiple, settings.min_short_side).args
    (caption,) = nodes["FourfoldCaptionImage"].execute([prepared], ["embedded"], [True], [""]).args[0]
    prompts = (caption, PRESETS["tiny"].negative_prompt)
    positive, negative = (stock.CLIPTextEncode().encode(clip, text)[0] for text in prompts)
    (lr_latent,) = stock.VAEEncode().encode(vae, prepared)
    latent = nodes["FourfoldMMDiTControlSampler"].execute(
        model, positive, negative, lr_latent, 7, settings.steps, settings.guidance, settings.start_sigma,
        model.network.config.injection_scale, settings.tile, settings.overlap, settings.tile_batch).args[0]
    (decoded,) = stock.VAEDecode().decode(vae, latent)
    (result,), _ = nodes["FourfoldColorFix"].execute([decoded], frames, [settings.color_fix]).args
    assert result.shape == (1, 128, 160, 3)
    assert torch.allclose(result, expected, atol=1e-4)
