"""Training of InstantIR's Previewer."""

import pytest
import torch
from fourfold.nodes.common.checkpoints import load_state, read_header
from fourfold.nodes.instantir.model import InstantIR
from fourfold.trainers import train_instantir_previewer as previewer
from fourfold.trainers.order import generator_of


@pytest.fixture
def study(config, program):
    return previewer.build(config("previewer", lowest_guidance=3.0, highest_guidance=5.0), program.NETWORK.previewer)


def test_the_lora_alone_trains_and_the_rest_stays_bit_by_bit(study, config, program, batch_of, trained_names, starts):
    names = trained_names(study.train(), batch_of(config("previewer")), generator_of(0))
    assert names == set(study.model.part_parameters("previewer"))
    assert any(name.startswith("resampler.") for name in names), "the LoRA covers the DCP"
    result = previewer.train(config("previewer", export_dtype="float32", sample_every=3, samples=1),
                             program.NETWORK.previewer)
    exported, given = load_state(result.folder / "instantir_tiny.safetensors"), load_state(starts["previewer"])
    assert all(torch.equal(exported[name], value) for name, value in given.items())
    lora = {name: value for name, value in exported.items() if name.startswith("previewer.")}
    assert lora and all(value.any() for name, value in lora.items() if "lora_B" in name)
    assert InstantIR.from_pretrained(result.folder / "instantir_tiny.safetensors").config.previewer.rank == 2
    assert read_header(result.folder / "instantir_tiny.safetensors").step == 3


def test_loss_by_hand(study, config, batch_of):
    """Equation 5 with the teacher's guided DDIM step; gradients come through the preview of z_s alone."""
    study.train()
    model, batch = study.model, batch_of(config("previewer"), 8)
    for name, parameter in study.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    draws = generator_of("draws")
    s = (torch.randint(50, (8,), generator=draws) + 1) * 20 - 1
    z = study.autoencoder.encode(batch["hr"]) * study.autoencoder.scale
    noise = torch.randn(z.shape, generator=draws)
    w = (3 + 2 * torch.rand(8, generator=draws))[:, None, None, None]
    t = (s - 20).clamp(min=0)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    level = lambda t: [((1 - betas).cumprod(0)[t].float()[:, None, None, None] * f + g) ** 0.5  # noqa: E731
                       for f, g in ((1, 0), (-1, 1))]
    (alpha_s, sigma_s), (alpha_t, sigma_t) = level(s), level(t)
    x_s = alpha_s * z + sigma_s * noise
    sizes = torch.tensor([32.0, 32, 0, 0, 32, 32]).expand(8, 6)
    text, empty = study.text.encode(batch["caption"]), study.text.encode([""] * 8)
    features, null = study.vision.encode(batch["lr"]), study.vision.null_features(8)
    with torch.no_grad():
        eps_c = model.denoise(x_s, s, text.prompt_embeds, text.pooled, sizes, model.resample(features))
        eps_u = model.denoise(x_s, s, empty.prompt_embeds, empty.pooled, sizes, model.resample(null))
        eps = eps_c + w * (eps_c - eps_u)
        x_t = alpha_t * (x_s - sigma_s * eps) / alpha_s + sigma_t * eps

    def preview(x, t):
        tokens = model.resample(features, previewer=True)
        eps = model.denoise(x, t, empty.prompt_embeds, empty.pooled, sizes, tokens, previewer=True)
        alpha, sigma = level(t)
        scaled = (10 * t.float())[:, None, None, None] ** 2 + 0.25
        return 0.25 / scaled * x + (1 - 0.25 / scaled) ** 0.5 * (x - sigma * eps) / alpha

    target = preview(x_t, t).detach()
    expected = (((preview(x_s, s) - target) ** 2 + 1e-6) ** 0.5 - 1e-3).mean()
    loss, _ = study(batch, generator_of("draws"))
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)
    chosen = study.model.part_parameters("previewer")["resampler.proj_in.lora_A.previewer.weight"]
    ours, theirs = (torch.autograd.grad(value, chosen)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-6)


def test_the_error_counts_as_much_as_asked(config, program, batch_of):
    losses = []
    for clean in (0.0, 2.0):
        study = previewer.build(config("previewer", clean=clean), program.NETWORK.previewer).train()
        loss, numbers = study(batch_of(study.config), generator_of("draws"))
        losses.append(loss.item())
    assert losses[0] == pytest.approx(numbers["distance"]) and numbers["error"] > 0.01
    assert losses[1] == pytest.approx(numbers["distance"] + 2 * numbers["error"])


def test_training_goes_on_with_a_lora_that_is_there(config, program, starts):
    study = previewer.build(config("previewer", start=starts["nothing"]), program.NETWORK.previewer)
    assert study.model.aggregator is not None
    published = "previewer.unet.encoder_hid_proj.image_projection_layers.0.proj_in.lora_A.weight"
    own = study.model.part_parameters("previewer")["resampler.proj_in.lora_A.previewer.weight"]
    assert own.requires_grad and torch.equal(own, load_state(starts["nothing"])[published])
