"""The host package: files in ComfyUI's folders, memory management, progress, CLIP and VAE objects."""

import pytest
import torch
from fourfold.nodes.common.text import TextEmbedding

# files


def test_models_are_files_and_folders_with_a_config(model_folder):
    from fourfold.nodes.common.host.files import find_model, list_models

    for file in ("a.safetensors", "sub/b.safetensors", "q/transformer/config.json", "q/transformer/x-1.safetensors",
                 "q/transformer/x-2.safetensors", "notes.txt"):
        (model_folder / file).parent.mkdir(parents=True, exist_ok=True)
        (model_folder / file).write_bytes(b"")
    assert list_models(["fourfold"]) == ["a.safetensors", "q/transformer", "sub/b.safetensors"]
    for name in list_models(["fourfold"]):
        assert find_model(name, ["diffusion_models", "fourfold"], "x", "y") == model_folder / name


def test_a_missing_model_is_said_with_its_folder_and_page(model_folder):
    from fourfold.nodes.common.host.files import find_model

    (model_folder.parent / "outside.safetensors").touch()
    for name in ("gone.safetensors", "../outside.safetensors", ""):
        with pytest.raises(FileNotFoundError, match=r"the transformer .* Download it from my\.page") as error:
            find_model(name, ["fourfold"], "the transformer", "my.page")
        assert str(model_folder) in str(error.value)


def test_a_fingerprint_follows_the_content(model_folder):
    from fourfold.nodes.common.host.files import fingerprint

    (model_folder / "w.safetensors").write_bytes(b"1")
    before = fingerprint(model_folder), fingerprint(model_folder / "w.safetensors")
    assert before == (fingerprint(model_folder), fingerprint(model_folder / "w.safetensors"))
    (model_folder / "w.safetensors").write_bytes(b"22")
    after = fingerprint(model_folder), fingerprint(model_folder / "w.safetensors")
    assert before[0] != after[0] and before[1] != after[1]


def test_captioner_folders_are_found_where_other_suites_keep_them(model_folder):
    from fourfold.nodes.common.host.files import find_model, list_folders

    for file in ("LLM/llava/config.json", "LLM/llava/preprocessor_config.json", "LLM/gpt/config.json", "LLM/empty/x"):
        (model_folder / file).parent.mkdir(parents=True, exist_ok=True)
        (model_folder / file).touch()
    assert list_folders(["fourfold", "LLM"], "preprocessor_config.json") == ["llava"]
    assert find_model("llava", ["fourfold", "LLM"], "the captioner", "-") == model_folder / "LLM" / "llava"


# conditioning


def entry(width=4, pooled=3, **extras):
    return [torch.randn(1, 5, width), {"pooled_output": torch.randn(1, pooled), **extras}]


def test_entries_share_the_prediction_by_their_strength(comfyui):
    from fourfold.nodes.common.host.conditioning import read_conditioning

    (text, alone), = read_conditioning([entry()], 4, 3, "the CLIP")
    assert isinstance(text, TextEmbedding) and alone == 1.0
    shares = [share for _, share in read_conditioning([entry(), entry(strength=3.0)], 4, 3, "the CLIP")]
    assert shares == [0.25, 0.75]


@pytest.mark.parametrize(
    ("conditioning", "complaint"),
    [([], "empty"),
     ([entry(width=7)], r"is 7 channels wide .* takes 4 and 3. Encode the prompt with the CLIP"),
     ([entry(pooled=9)], "pooled prompt of 9"),
     ([[torch.randn(1, 5, 4), {}]], "pooled prompt of none"),
     ([entry(area=(1, 2, 3, 4))], "carries area"),
     ([entry(start_percent=0.5, mask=torch.ones(1))], "carries mask, start_percent"),
     ([entry(strength=0.0)], "add up to 0")],
)
def test_conditioning_that_cannot_be_read_is_refused(comfyui, conditioning, complaint):
    from fourfold.nodes.common.host.conditioning import read_conditioning

    with pytest.raises(ValueError, match=complaint):
        read_conditioning(conditioning, 4, 3, "the CLIP")


# memory and progress


class Network(torch.nn.Linear):
    device = property(lambda self: self.weight.device)  # as the networks have it: ModelPatcher must not write to it


def test_a_network_is_lent_for_a_block_and_watched(comfyui):
    import comfy.model_management as management
    from fourfold.nodes.common.host.models import host, on_device

    model = host(Network(2, 2), "dit4sr")
    with on_device(model, memory_required=1e6) as network:
        assert network is model.network
        network(torch.zeros(1, 2))
        management.interrupt_current_processing(True)
        with pytest.raises(management.InterruptProcessingException):
            network(torch.zeros(1, 2))
    network(torch.zeros(1, 2))  # not watched any more
    with on_device(model) as again:  # and usable after a cancelled run
        again(torch.zeros(1, 2))


def test_another_methods_model_is_refused(comfyui):
    from fourfold.nodes.common.host.models import host, require_method

    model = host(Network(2, 2), "instantir")
    assert require_method(model, "instantir", "Sampler") is model
    with pytest.raises(ValueError, match="Sampler needs a dit4sr model, but a instantir model is connected"):
        require_method(model, "dit4sr", "Sampler")


def test_the_chosen_precision_is_taken(comfyui, monkeypatch):
    import comfy.model_management
    from fourfold.nodes.common.host.models import DTYPES, pick_dtype

    assert [pick_dtype(name) for name in DTYPES] == [torch.bfloat16, torch.float16, torch.float32]
    assert pick_dtype("default", 10**6) in (torch.bfloat16, torch.float32)
    monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda *_, **__: torch.float8_e4m3fn)
    assert pick_dtype("default") == torch.bfloat16, "plain torch layers cannot compute in 8 bits"


def test_the_bar_counts_steps_times_windows(comfyui, monkeypatch):
    import comfy.utils
    from fourfold.nodes.common.host.models import host
    from fourfold.nodes.common.host.progress import Report

    seen = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda bar, *values: seen.append(values))
    report = Report(2, host(Network(2, 2), "dit4sr"))
    for step in range(2):
        for done in (2, 4, 5):
            report.on_window(done, 5)
        report.on_step(step, 2, torch.zeros(1), torch.zeros(1))
    assert seen == [(2, 10), (4, 10), (5, 10, None), (7, 10), (9, 10), (10, 10, None)]


# CLIP and VAE


@pytest.fixture(scope="module")
def encoder():
    from fourfold.nodes.common.tiny_text import TinyTextConfig, TinyTextEncoder

    torch.manual_seed(0)
    return TinyTextEncoder(TinyTextConfig(width=16, layers=1, heads=2, hidden=16, length=24)).eval()


def encode(clip, text):
    (cond, extras), = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return cond, extras["pooled_output"]


@torch.inference_mode()
def test_the_tiny_clip_encodes_as_the_encoder_itself(only_in_comfyui, encoder):
    from fourfold.nodes.common.host.text import tiny_clip

    clip = tiny_clip(encoder)
    for prompt in ("", "bright, grün", "a (nice) one"):
        plain = prompt.replace("(", "\\(").replace(")", "\\)")  # ComfyUI's escapes
        tokens, pooled = encode(clip, plain)
        expected = encoder.encode([prompt])
        assert torch.allclose(tokens, expected.prompt_embeds, atol=1e-6)
        assert torch.allclose(pooled, expected.pooled, atol=1e-6)
    assert clip.clone().tokenize("x", return_word_ids=True)["fourfold"][0][0] == (ord("x") + 3, 1.0, 0)


@torch.inference_mode()
def test_prompt_weights_move_tokens_away_from_the_empty_prompt(only_in_comfyui, encoder):
    from fourfold.nodes.common.host.text import tiny_clip

    clip = tiny_clip(encoder)
    plain, pooled = encode(clip, "a bright sky")
    nothing, _ = encode(clip, "")
    weighted, weighted_pooled = encode(clip, "a (bright:1.5) sky")
    word = slice(2, 8)  # the bytes of "bright"
    assert torch.allclose(weighted[:, word], nothing[:, word] + 1.5 * (plain - nothing)[:, word], atol=1e-6)
    assert torch.equal(weighted[:, 8:], plain[:, 8:]) and not torch.equal(pooled, weighted_pooled)


@torch.inference_mode()
def test_long_prompts_are_encoded_in_sections(only_in_comfyui, encoder):
    from fourfold.nodes.common.host.text import tiny_clip

    words = "sharp crisp bright warm golden smooth"
    tokens, pooled = encode(tiny_clip(encoder), words)
    sections = ["sharp crisp bright ", "warm golden smooth"]  # 23 bytes fit, cut after a space
    expected = [encoder.encode([section]).prompt_embeds for section in sections]
    assert torch.allclose(tokens, torch.cat(expected, dim=1), atol=1e-6)
    assert pooled.shape == (1, 16)


@pytest.fixture(scope="module")
def codec():
    from fourfold.nodes.common.codec import LinearCodec

    torch.manual_seed(0)
    return LinearCodec().eval()


@torch.inference_mode()
def test_the_tiny_vae_is_the_codec(only_in_comfyui, codec):
    from fourfold.nodes.common.host.autoencoder import TinyVAE

    import nodes as stock

    vae = TinyVAE(codec)
    pixels = torch.rand(2, 64, 96, 3)
    latent = stock.VAEEncode().encode(vae, pixels)[0]
    assert torch.allclose(latent["samples"], codec.encode(pixels.movedim(-1, 1)), atol=1e-5)
    decoded = stock.VAEDecode().decode(vae, latent)[0]
    assert torch.allclose(decoded, codec.decode(latent["samples"]).movedim(1, -1), atol=1e-5)
    tiled = stock.VAEEncodeTiled().encode(vae, pixels, tile_size=64, overlap=16)[0]
    assert torch.allclose(tiled["samples"], latent["samples"], atol=1e-4)
    retiled = stock.VAEDecodeTiled().decode(vae, latent, tile_size=64, overlap=16)[0]
    assert retiled.shape == decoded.shape and (retiled - decoded).abs().mean() < 0.01


@torch.inference_mode()
def test_a_preview_has_the_colours_of_the_picture(only_in_comfyui, codec):
    import latent_preview
    from fourfold.nodes.common.autoencoder import to_model
    from fourfold.nodes.common.host.autoencoder import TinyLatents

    shift, scale = 0.1, 0.7
    latents = TinyLatents(codec, shift, scale)
    previewer = latent_preview.Latent2RGBPreviewer(latents.latent_rgb_factors, latents.latent_rgb_factors_bias)
    z = 0.1 * torch.randn(1, codec.latent_channels, 1, 1).expand(-1, -1, 6, 6)
    image = previewer.decode_latent_to_preview(to_model(z, shift, scale))
    expected = codec.decode(z).mean(dim=(0, 2, 3)) * 255
    assert torch.allclose(torch.tensor(image.getpixel((3, 3))).float(), expected, atol=1.5)
