"""InstantIR's nodes: what is found when a workflow is queued, and that they do what sampler.py and restore.py do."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from fourfold.nodes.common import checkpoints, tiny
from fourfold.nodes.common.images import from_comfy
from fourfold.nodes.common.sampling import cpu_noise
from fourfold.nodes.common.text import TextEmbedding
from fourfold.nodes.common.vision import Preprocessing, VisionEncoder
from fourfold.nodes.instantir.config import PRESETS, Sampling
from fourfold.nodes.instantir.preview import preview_at
from fourfold.nodes.instantir.sampler import sample

SHIFT, SCALE = 0.2, 0.5  # z = (latent - shift) * scale
NODE = "Fourfold{}".format


@pytest.fixture
def model(comfyui, network):
    from fourfold.nodes.common.host.models import host

    return host(network(latent_shift=SHIFT, latent_scale=SCALE), "instantir")


@pytest.fixture
def other(comfyui, network):
    """`other(**fields)`: another hosted network."""
    from fourfold.nodes.common.host.models import host

    return lambda **fields: host(network(latent_shift=SHIFT, latent_scale=SCALE, **fields), "instantir")


@pytest.fixture(scope="session")
def dino():
    """A small DINOv2 with random weights, whose tokens the small network takes."""
    torch.manual_seed(2)
    config = dict(hidden_size=6, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14)
    return VisionEncoder.new(config, Preprocessing(resize=32, crop=28)).eval().requires_grad_(False)


@pytest.fixture
def hosted_dino(comfyui, dino):
    from fourfold.nodes.common.host.models import host

    return host(dino, "dino")


@pytest.fixture
def folders(model_folder, monkeypatch):
    """`folders("loras")`: a folder of models of that kind, the only one that ComfyUI knows."""
    import folder_paths

    for name in ("checkpoints", "controlnet", "loras", "clip_vision", "fourfold", "diffusion_models"):
        (model_folder / name).mkdir()
        extensions = {".safetensors", ".pt", ".bin"}
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(model_folder / name)], extensions))
    return lambda name: model_folder / name


def prompt(seed=0, tokens=5, **extras):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(1, tokens, 12, generator=draw), {"pooled_output": torch.randn(1, 10, generator=draw), **extras}]


def embedding(seed):
    tokens, extras = prompt(seed)
    return TextEmbedding(tokens, extras["pooled_output"])


def latent(batch=1, height=8, width=8, channels=4, seed=3):
    return {"samples": torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))}


def picture(batch=1, height=40, width=56):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(4))


def see(nodes, hosted_dino, model, weight=0.9):
    """DCP tokens of a picture."""
    (features,) = nodes[NODE("DINOEncoder")].execute(hosted_dino, picture(), "crop").args
    return nodes[NODE("DCPResampler")].execute(model, features, weight).args[0]


def preview(nodes, model, tokens, **widgets):
    widgets = {"text_guided": False, "empty_prompt": [prompt(9)], **widgets}
    return nodes[NODE("Previewer")].execute(model, tokens, **widgets).args[0]


def aggregate(nodes, model, lq_latent, **widgets):
    widgets = {"conditioning_scale": 0.8, "preview_start": 0.0, "creative_start": 1.0, "adaptive": "off", **widgets}
    return nodes[NODE("Aggregator")].execute(model, lq_latent, **widgets).args[0]


def run(nodes, model, tokens, lq_latent, positive=None, negative=None, **widgets):
    settings = {"seed": 5, "steps": 2, "guidance": 3.0, "scheduler": "ddim", "tile": 16, "overlap": 4, "tile_batch": 2,
                **widgets}
    conditions = (positive or [prompt(1)], negative or [prompt(2)])
    return nodes[NODE("InstantIRSampler")].execute(model, tokens, *conditions, lq_latent, **settings).args


# loaders


@pytest.fixture
def placed(folders, published):
    """The recorded files in ComfyUI's folders, and what the loader's widgets call them."""
    shutil.copytree(published["unet"], folders("diffusion_models") / "sdxl" / "unet")
    shutil.copy(published["adapter"], folders("fourfold"))
    shutil.copy(published["aggregator"], folders("controlnet"))
    shutil.copy(published["previewer_lora"], folders("loras"))
    return {"base": "sdxl/unet", "adapter": "adapter.pt", "aggregator": "aggregator.pt",
            "previewer": "previewer_lora_weights.bin"}


def test_the_loader_lists_and_loads_the_published_files(nodes, placed, recorded):
    loader = nodes[NODE("InstantIRLoader")]
    listed = {widget.id: widget.options for widget in loader.define_schema().inputs}
    assert all(name in listed[widget] for widget, name in placed.items())
    assert listed["aggregator"][0] == listed["previewer"][0] == "none" and "none" in listed["adapter"]
    assert loader.validate_inputs(**placed) is True and loader.validate_inputs() is True
    model = loader.execute(**placed, dtype="fp32").args[0]
    assert model.method == "instantir" and model.network.config == recorded.config
    state, expected = model.network.state_dict(), recorded.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    alone = loader.execute(**placed | {"aggregator": "none", "previewer": "none"}, dtype="bf16").args[0].network
    assert alone.config.previewer is None and not alone.config.aggregator and alone.dtype == torch.bfloat16


def test_one_file_with_all_parts_is_a_base_of_its_own(nodes, folders, network):
    made = network()
    made.save_pretrained(folders("fourfold") / "own.safetensors")
    (folders("fourfold") / tiny.FILES["dit4sr"]).touch()  # not offered: nobody wants it here
    loader = nodes[NODE("InstantIRLoader")]
    assert loader.define_schema().inputs[0].options == ["own.safetensors"]
    alone = {"base": "own.safetensors", "adapter": "none", "aggregator": "none", "previewer": "none"}
    assert loader.validate_inputs(**alone) is True
    loaded = loader.execute(**alone, dtype="fp32").args[0].network
    state, expected = loaded.state_dict(), made.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    made.save_part(folders("fourfold") / "mine.safetensors", "aggregator")
    complaint = loader.validate_inputs(**alone | {"aggregator": "mine.safetensors"})
    assert "own.safetensors holds all parts" in complaint and "set aggregator to none" in complaint


def test_what_is_wrong_with_a_file_is_said_at_queue_time(nodes, folders, placed):
    validate = nodes[NODE("InstantIRLoader")].validate_inputs
    sdxl = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1),
            "model.diffusion_model.label_emb.0.0.weight": torch.zeros(1, 2816)}
    checkpoints.save_file(sdxl, folders("fourfold") / "sdxl.safetensors")
    whole = (folders("controlnet") / "aggregator.pt").read_bytes()
    (folders("controlnet") / "short.pt").write_bytes(whole[:-100])
    (folders("loras") / "letter.safetensors").write_text("this is a letter, not a checkpoint")
    cases = [
        ({"adapter": "sdxl.safetensors"}, "adapter: sdxl.safetensors is an SDXL checkpoint, but InstantIR's adapter"),
        ({"aggregator": "adapter.pt"}, "aggregator: adapter.pt is InstantIR's adapter"),
        ({"aggregator": "short.pt"}, "short.pt is truncated"),
        ({"previewer": "letter.safetensors"}, "text file"),
        ({"base": "adapter.pt"}, "base: adapter.pt is InstantIR's adapter"),
        ({"previewer": "gone.bin"}, "the Previewer's LoRA 'gone.bin' is not there"),
        ({"base": "gone.safetensors"}, "stabilityai/stable-diffusion-xl-base-1.0"),
        ({"adapter": "none"}, "adapter is none, but sdxl/unet is a plain SDXL"),
    ]
    for changed, complaint in cases:
        answer = validate(**placed | changed)
        assert answer.startswith("InstantIR Loader, ") and complaint in answer, answer
    assert "InstantX/InstantIR" in validate(**placed | {"adapter": "gone.pt"})
    assert str(folders("fourfold")) in validate(**placed | {"adapter": "gone.pt"})


def test_a_changed_file_is_loaded_again(nodes, folders, placed):
    fingerprint = nodes[NODE("InstantIRLoader")].fingerprint_inputs
    before = fingerprint(**placed, dtype="fp32")
    (folders("loras") / placed["previewer"]).touch()
    assert fingerprint(**placed, dtype="fp32") != before
    assert fingerprint(base=None, adapter=None, aggregator=None, previewer=None, dtype="fp32") == ""


def test_dino_comes_as_a_folder_or_a_file(nodes, folders, dino):
    folder = folders("clip_vision")
    dino.network.save_pretrained(folder / "dinov2-small")
    shutil.copy(folder / "dinov2-small" / "model.safetensors", folder / "one.safetensors")
    dino.save(folders("fourfold") / tiny.FILES["vision"])
    (folders("fourfold") / tiny.FILES["codec"]).touch()
    loader = nodes[NODE("DINOLoader")]
    names = ["dinov2-small", "one.safetensors", tiny.FILES["vision"]]
    assert loader.define_schema().inputs[0].options == names
    for name in names:
        assert loader.validate_inputs(name) is True
        loaded = loader.execute(name, "fp32").args[0]
        assert loaded.method == "dino" and loaded.network.dtype == torch.float32
        pixels = torch.rand(1, 3, 28, 28)
        assert torch.equal(loaded.network(pixels), dino(pixels))
    assert loader.fingerprint_inputs(names[0], dtype="fp32") != loader.fingerprint_inputs(names[1], dtype="fp32")
    checkpoints.save_file({"vision_model.embeddings.patch_embedding.weight": torch.zeros(1)},
                          folder / "clip.safetensors")
    assert "a CLIP vision encoder, but a DINOv2" in loader.validate_inputs("clip.safetensors")
    assert "facebook/dinov2-large" in loader.validate_inputs("gone") and loader.validate_inputs(None) is True


# what the network is told


def test_features_and_tokens_are_the_networks_own(nodes, hosted_dino, model, dino):
    for fit in ("crop", "squeeze", "tile"):
        (features,) = nodes[NODE("DINOEncoder")].execute(hosted_dino, picture(), fit).args
        assert torch.equal(features.image, dino.encode(from_comfy(picture()), fit))
    assert torch.equal(features.null, dino.null_features(1))
    (tokens,) = nodes[NODE("DCPResampler")].execute(model, features, 0.7).args
    expected = model.network.perceive(features.image)
    assert torch.equal(tokens.image.tokens, expected.tokens) and torch.equal(tokens.image.previewer, expected.previewer)
    assert torch.equal(tokens.null.tokens, model.network.resample(features.null)) and tokens.weight == 0.7
    assert not torch.equal(expected.tokens, expected.previewer)


def test_another_dino_is_refused(nodes, model):
    from fourfold.nodes.instantir.comfy_sockets import Features

    with pytest.raises(ValueError, match="the features are 384 wide, this model's resampler takes 6"):
        nodes[NODE("DCPResampler")].execute(model, Features(torch.zeros(1, 3, 384), torch.zeros(1, 3, 384)), 1.0)


def test_the_previewer_alone_is_its_answer_at_that_noise_level(nodes, hosted_dino, model):
    tokens, unscaled = see(nodes, hosted_dino, model), latent(batch=2)
    handle = preview(nodes, model, tokens)
    (made,) = nodes[NODE("OneStepPreview")].execute(handle, [prompt(1)], unscaled, 0.6, 5).args
    z = (unscaled["samples"] - SHIFT) * SCALE
    expected = preview_at(model.network, z, cpu_noise(5, z.shape), 0.6, tokens.image, embedding(9), 0.9)
    assert torch.allclose(made["samples"], expected / SCALE + SHIFT, atol=1e-5)
    guided = preview(nodes, model, tokens, text_guided=True, empty_prompt=None)
    (other,) = nodes[NODE("OneStepPreview")].execute(guided, [prompt(1)], unscaled, 0.6, 5).args
    assert not torch.allclose(other["samples"], made["samples"], atol=1e-3)
    (nearly,) = nodes[NODE("OneStepPreview")].execute(handle, [prompt(1)], unscaled, 0.0, 5).args
    error = [(answer["samples"] - unscaled["samples"]).norm() for answer in (nearly, made)]
    assert error[0] < error[1]


def test_what_the_model_lacks_is_said_at_the_node_that_needs_it(nodes, hosted_dino, model, other):
    bare = other(previewer=False, aggregator=False)
    tokens = see(nodes, hosted_dino, bare)
    with pytest.raises(ValueError, match=r"no Previewer: choose previewer_lora_weights\.bin"):
        preview(nodes, bare, tokens)
    with pytest.raises(ValueError, match=r"no Aggregator: choose aggregator\.pt"):
        aggregate(nodes, bare, latent())
    with pytest.raises(ValueError, match="connect a CLIP Text Encode with an empty text"):
        preview(nodes, model, see(nodes, hosted_dino, model), empty_prompt=None)
    with pytest.raises(ValueError, match=r"the reference is \(1, 4, 8, 16\), lq_latent \(1, 4, 8, 8\)"):
        aggregate(nodes, model, latent(), reference=latent(width=16))


# sampler


def expected_run(model, tokens, unscaled, steps=2, **options):
    """`sample` called by hand."""
    z = (unscaled["samples"] - SHIFT) * SCALE
    draws = [torch.Generator().manual_seed(5 + b) for b in range(len(z))]
    noise = torch.stack([torch.randn(z.shape[1:], generator=draw) for draw in draws])
    drawn = sample(model.network, z, noise, tokens.image, embedding(1), embedding(2), tokens.null, steps=steps,
                   guidance=3.0, image_scale=0.9, tile=16, overlap=4, tile_batch=2, generator=draws, **options)
    return drawn.latent / SCALE + SHIFT, drawn.previews.flatten(0, 1) / SCALE + SHIFT, drawn.deltas


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_the_sampler_is_sample_on_scaled_latents(nodes, hosted_dino, model, scheduler):
    from fourfold.nodes.common.images import to_comfy
    from fourfold.nodes.instantir.delta_plot import delta_plot

    tokens, unscaled = see(nodes, hosted_dino, model), latent(batch=2, height=24, width=16)
    steering = {"conditioning_scale": 0.8, "creative_start": 0.7, "preview_start": 0.2, "adaptive": "paper"}
    made, previews, plot = run(
        nodes, model, tokens, unscaled, steps=4, scheduler=scheduler, previewer=preview(nodes, model, tokens),
        aggregator=aggregate(nodes, model, unscaled, **steering))
    expected, expected_previews, deltas = expected_run(
        model, tokens, unscaled, steps=4, scheduler=scheduler, previewer_text=embedding(9), **steering)
    assert set(made) == {"samples"} and torch.allclose(made["samples"], expected, atol=1e-4)
    assert len(expected_previews) and torch.allclose(previews["samples"], expected_previews, atol=1e-4)
    assert torch.equal(plot, to_comfy(delta_plot(deltas)))


def test_without_previewer_the_input_is_the_reference(nodes, only_in_comfyui, hosted_dino, model):
    tokens, unscaled = see(nodes, hosted_dino, model), latent()
    made, nothing, _ = run(nodes, model, tokens, unscaled, aggregator=aggregate(nodes, model, unscaled))
    reference = (unscaled["samples"] - SHIFT) * SCALE
    expected, *_ = expected_run(model, tokens, unscaled, reference=reference, conditioning_scale=0.8)
    assert torch.allclose(made["samples"], expected, atol=1e-4)
    assert type(nothing).__name__ == "ExecutionBlocker" and nothing.message is None


def test_without_aggregator_the_tokens_alone_guide(nodes, only_in_comfyui, hosted_dino, model):
    tokens, unscaled = see(nodes, hosted_dino, model), latent()
    made = run(nodes, model, tokens, unscaled, previewer=preview(nodes, model, tokens))[0]["samples"]
    expected, *_ = expected_run(model, tokens, unscaled, conditioning_scale=0.0)
    assert torch.allclose(made, expected, atol=1e-4)
    steered = run(nodes, model, tokens, unscaled, aggregator=aggregate(nodes, model, unscaled))[0]["samples"]
    assert not torch.allclose(made, steered, atol=1e-3)


def test_a_reference_and_another_lq_latent_reach_the_aggregator(nodes, hosted_dino, model, only_in_comfyui):
    tokens, unscaled = see(nodes, hosted_dino, model), latent()
    previewer = preview(nodes, model, tokens)
    results = [run(nodes, model, tokens, unscaled, aggregator=aggregate(nodes, model, lq, reference=reference),
                   previewer=previewer)[0]["samples"]
               for lq, reference in ((unscaled, latent(seed=8)), (latent(seed=8), latent(seed=8)), (unscaled, None))]
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(results, results[1:] + results[:1], strict=True))


def full_run(nodes, hosted_dino, model, unscaled, **widgets):
    tokens = see(nodes, hosted_dino, model)
    return run(nodes, model, tokens, unscaled, previewer=preview(nodes, model, tokens, text_guided=True),
               aggregator=aggregate(nodes, model, unscaled), **widgets)[0]["samples"]


def test_a_batch_of_two_equals_two_singles(nodes, hosted_dino, model):
    both = latent(batch=2)
    together = full_run(nodes, hosted_dino, model, both, scheduler="euler ancestral")
    apart = [full_run(nodes, hosted_dino, model, {"samples": both["samples"][b : b + 1]}, seed=5 + b,
                      scheduler="euler ancestral") for b in range(2)]
    assert torch.allclose(together, torch.cat(apart), atol=1e-4)


def test_several_prompts_are_averaged_by_strength(nodes, hosted_dino, model):
    tokens = see(nodes, hosted_dino, model)
    unscaled = latent()

    def one_step(*positive, **widgets):
        return run(nodes, model, tokens, unscaled, positive=list(positive), steps=1, **{"guidance": 1.0, **widgets},
                   aggregator=aggregate(nodes, model, unscaled),
                   previewer=preview(nodes, model, tokens), scheduler="ddim")[0]["samples"]

    singles = one_step(prompt(1)), one_step(prompt(7))
    mixed = one_step(prompt(1, strength=1.0), prompt(7, tokens=8, strength=3.0))
    longer = one_step(prompt(7, tokens=8))
    assert torch.allclose(mixed, 0.25 * singles[0] + 0.75 * longer, atol=1e-5)
    assert not torch.allclose(*singles, atol=1e-3)
    guided = one_step(prompt(1), prompt(7), guidance=3.0)  # two positive prompts, one negative
    assert torch.allclose(guided, 0.5 * one_step(prompt(1), guidance=3.0) + 0.5 * one_step(prompt(7), guidance=3.0),
                          atol=1e-4)


def test_a_cancelled_run_makes_no_further_network_call(nodes, hosted_dino, model, monkeypatch):
    import comfy.model_management as management

    calls = []
    forward = model.network.unet.forward
    monkeypatch.setattr(model.network.unet, "forward", lambda *args, **named: (
        calls.append(management.interrupt_current_processing(True)), forward(*args, **named))[1])
    with pytest.raises(management.InterruptProcessingException):
        full_run(nodes, hosted_dino, model, latent(height=24))
    assert len(calls) == 1
    monkeypatch.undo()
    assert full_run(nodes, hosted_dino, model, latent()).isfinite().all()


@pytest.mark.parametrize(
    ("unscaled", "complaint"),
    [(latent(channels=16), r"lq_latent is .* expected \(B, 4, h, w\)"),
     ({"samples": torch.zeros(1, 4, 1, 8, 8)}, r"expected \(B, 4, h, w\)"),
     (latent(height=9), r"\(9, 8\) latents high and wide; both must be multiples of 2")])
def test_latents_of_another_kind_are_refused(nodes, hosted_dino, model, unscaled, complaint):
    with pytest.raises(ValueError, match=complaint):
        run(nodes, model, see(nodes, hosted_dino, model), unscaled)


def test_handles_of_another_model_are_refused(nodes, hosted_dino, model, other):
    tokens, second = see(nodes, hosted_dino, model), other(prediction="v")
    handles = {"previewer": preview(nodes, second, tokens), "aggregator": aggregate(nodes, second, latent())}
    for name, handle in handles.items():
        with pytest.raises(ValueError, match="made from another model"):
            run(nodes, model, tokens, latent(), **{name: handle})
    reloaded = {"previewer": preview(nodes, other(), tokens), "aggregator": aggregate(nodes, other(), latent())}
    first, again = (run(nodes, model, tokens, latent(), **handles)[0]["samples"] for handles in (reloaded, {
        "previewer": preview(nodes, model, tokens), "aggregator": aggregate(nodes, model, latent())}))
    assert torch.equal(first, again)  # ComfyUI may load a model anew and keep what was made from it


def test_another_methods_model_is_refused(nodes, hosted_dino, dino):
    with pytest.raises(ValueError, match="InstantIR Sampler needs a instantir model, but a dino model is connected"):
        run(nodes, hosted_dino, None, latent())


@pytest.mark.parametrize(
    ("widgets", "complaint"),
    [({"tile": 64, "overlap": 64}, "must be smaller than tile"), ({"tile": 100}, "a multiple of 8 from 16"),
     ({"tile": 8}, "a multiple of 8 from 16 to 512"), ({"overlap": -1}, "overlap is -1"), ({}, True),
     ({"tile": 0, "overlap": 32}, True), ({"tile": 64, "overlap": 24}, True), ({"tile": None, "overlap": 24}, True)],
)
def test_tile_and_overlap_are_checked_at_queue_time(nodes, widgets, complaint):
    answer = nodes[NODE("InstantIRSampler")].validate_inputs(**widgets)
    assert answer is True if complaint is True else complaint in answer


# settings


def test_the_paper_gives_the_defaults(nodes):
    paper = Sampling()
    defaults = {}
    for node in ("InstantIRSampler", "Aggregator", "Previewer", "DCPResampler"):
        widgets = nodes[NODE(node)].define_schema().inputs
        defaults |= {widget.id: widget.default for widget in widgets if hasattr(widget, "default")}
    assert defaults.pop("seed") == 0 and defaults.pop("weight") == paper.image_scale
    assert defaults == {name: getattr(paper, name) for name in defaults}
    assert set(defaults) == {"steps", "guidance", "scheduler", "tile", "overlap", "tile_batch", "conditioning_scale",
                             "preview_start", "creative_start", "adaptive", "text_guided"}


def test_the_help_names_the_values_that_the_tiny_model_wants():
    page = (Path(__file__).parents[2] / "web" / "docs" / "FourfoldTinyModels.md").read_text(encoding="utf-8")
    page = page.split("| InstantIR |")[1].split("\n\n")[0]
    table = dict(re.findall(r"^\| (?:.*: )?(\w+) \| (.+) \|$", page, re.MULTILINE))
    sampling = PRESETS["tiny"].sampling
    names = ("steps", "guidance", "scheduler", "tile", "overlap", "tile_batch", "preview_start", "creative_start",
             "adaptive", "conditioning_scale", "multiple", "min_short_side", "max_long_side", "interpolation")
    wanted = {name: str(getattr(sampling, name)) for name in names}
    wanted |= {"weight": str(sampling.image_scale), "method": sampling.color_fix,
               "text_guided": "on" if sampling.text_guided else "off"}
    assert {name: table[name] for name in wanted} == wanted


# the whole way


@pytest.fixture
def tiny_family(tmp_path, monkeypatch):
    """Checkpoints of a family smaller than the tiny one, with random weights, in place of the shipped ones."""
    from dataclasses import asdict

    from fourfold.nodes.common.codec import LinearCodec
    from fourfold.nodes.common.tiny_text import TinyTextConfig, TinyTextEncoder
    from fourfold.nodes.instantir.model import InstantIR

    torch.manual_seed(0)
    config = PRESETS["tiny"].network
    unet = config.unet | dict(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=(1, 2),
                              cross_attention_dim=16, addition_time_embed_dim=4,
                              projection_class_embeddings_input_dim=16 + 6 * 4)
    resampler = asdict(config.resampler) | dict(embedding_dim=6, dim=8, depth=1, dim_head=4, heads=2, num_queries=3,
                                                output_dim=16)
    network = InstantIR.new(unet, type(config.resampler)(**resampler), prediction=config.prediction,
                            downscale=config.downscale, latent_shift=SHIFT, latent_scale=SCALE)
    network.add_aggregator()
    network.add_previewer(2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    monkeypatch.setattr(tiny, "CHECKPOINTS", tmp_path)
    network.save_pretrained(tmp_path / tiny.FILES["instantir"])
    TinyTextEncoder(TinyTextConfig(width=16, layers=1, heads=2, hidden=16)).save(tmp_path / tiny.FILES["text"])
    LinearCodec().save(tmp_path / tiny.FILES["codec"])
    vision = dict(hidden_size=6, num_hidden_layers=1, num_attention_heads=1, image_size=32, patch_size=8)
    VisionEncoder.new(vision, Preprocessing(resize=36, crop=32)).save(tmp_path / tiny.FILES["vision"])


def test_tiny_models_gives_the_network(nodes, only_in_comfyui, tiny_family):
    model, _, _ = nodes[NODE("TinyModels")].execute("instantir").args
    assert model.method == "instantir" and model.network.config.previewer.rank == 2


@torch.inference_mode()
def test_the_graph_of_the_tiny_workflow_is_restore(nodes, only_in_comfyui, tiny_family, monkeypatch):
    from fourfold.nodes.common.host.models import host
    from fourfold.nodes.instantir.restore import load_system, restore

    import nodes as stock

    lr = torch.rand(1, 3, 32, 40)
    expected = restore(lr, load_system("tiny", device="cpu"), scale=4, seed=7).movedim(1, -1)

    preset = PRESETS["tiny"]
    settings = preset.sampling
    model, clip, vae = nodes[NODE("TinyModels")].execute("instantir").args
    dino = host(VisionEncoder.from_pretrained(tiny.tiny_checkpoint("vision")), "dino")
    (prepared,), frames = nodes[NODE("LRPrepare")].execute(
        lr.movedim(1, -1), 4.0, 0, 0, settings.multiple, settings.min_short_side, None, settings.max_long_side, "pad",
        settings.interpolation).args
    (caption,) = nodes[NODE("CaptionImage")].execute([prepared], ["embedded"], [True], [preset.prompt]).args[0]
    positive, negative, empty = (
        stock.CLIPTextEncode().encode(clip, text)[0] for text in (caption, preset.negative_prompt, ""))
    (lq_latent,) = stock.VAEEncode().encode(vae, prepared)
    (features,) = nodes[NODE("DINOEncoder")].execute(dino, prepared, "crop").args
    (tokens,) = nodes[NODE("DCPResampler")].execute(model, features, settings.image_scale).args
    (previewer,) = nodes[NODE("Previewer")].execute(model, tokens, settings.text_guided, empty).args
    (aggregator,) = nodes[NODE("Aggregator")].execute(
        model, lq_latent, settings.conditioning_scale, settings.preview_start, settings.creative_start,
        settings.adaptive).args
    latents, previews, _ = nodes[NODE("InstantIRSampler")].execute(
        model, tokens, positive, negative, lq_latent, 7, settings.steps, settings.guidance, settings.scheduler,
        settings.tile, settings.overlap, settings.tile_batch, previewer, aggregator).args
    assert len(previews["samples"]) == settings.steps
    (decoded,) = stock.VAEDecode().decode(vae, latents)
    (result,), _ = nodes[NODE("ColorFix")].execute([decoded], frames, [settings.color_fix]).args
    assert result.shape == (1, 128, 160, 3)
    assert torch.allclose(result, expected, atol=1e-4)
