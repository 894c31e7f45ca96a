"""Equations 3 to 7 by hand, and what surrounds them."""

import pytest
import torch
from fourfold.nodes.dreamsr.discriminator import PatchDiscriminator
from fourfold.nodes.dreamsr.losses import (
    add_noise,
    clean_latent,
    discriminator_loss,
    generator_loss,
    local_or_global,
    logit_normal_times,
    needs_pixel_loss,
    pixel_loss,
    removal_loss,
    velocity_loss,
    velocity_target,
)


@pytest.fixture
def pair():
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 4, 6, 6, generator=draw) for _ in range(2))


def absolute(restored, clean):
    """Stands in for LPIPS."""
    return (restored - clean).abs().mean()


def test_equations_3_to_5(pair):
    z_0, z_1 = pair
    t = torch.tensor([0.0, 0.25, 1.0])
    z_t = add_noise(z_0, z_1, t)
    assert torch.equal(z_t[0], z_0[0]) and torch.equal(z_t[2], z_1[2])
    torch.testing.assert_close(z_t[1], 0.75 * z_0[1] + 0.25 * z_1[1])
    v = velocity_target(z_0, z_1)
    assert torch.equal(v, z_1 - z_0) and velocity_loss(v, z_0, z_1, t) == 0
    torch.testing.assert_close(clean_latent(z_t, v, t), z_0)
    prediction = v + 0.5
    torch.testing.assert_close(velocity_loss(prediction, z_0, z_1, t), torch.tensor(0.25))


def test_weighted_by_t_squared_it_is_the_error_of_the_clean_latent(pair):
    z_0, z_1 = pair
    t, prediction = torch.tensor([0.1, 0.5, 0.9]), torch.randn(3, 4, 6, 6)
    error = clean_latent(add_noise(z_0, z_1, t), prediction, t) - z_0
    loss = velocity_loss(prediction, z_0, z_1, t, weight="t2", l1=0.3)
    torch.testing.assert_close(loss, error.square().mean() + 0.3 * error.abs().mean())
    with pytest.raises(ValueError, match=r"prediction is \(3, 4, 6, 5\), the target \(3, 4, 6, 6\)"):
        velocity_loss(prediction[..., :5], z_0, z_1, t)


def test_times_are_logit_normal_up_to_the_highest():
    t = logit_normal_times(20_000, torch.Generator().manual_seed(0), mean=0.3, std=1.6, highest=0.8)
    logit = torch.logit(t / 0.8)
    assert t.max() < 0.8 and t.min() > 0
    assert float(logit.mean()) == pytest.approx(0.3, abs=0.05) and float(logit.std()) == pytest.approx(1.6, abs=0.05)
    assert torch.equal(t, logit_normal_times(20_000, torch.Generator().manual_seed(0), 0.3, 1.6, 0.8))


def test_equation_6_is_added_up_to_a_fifth():
    assert needs_pixel_loss(torch.tensor([0.0, 0.2, 0.21, 1.0])).tolist() == [True, True, False, False]
    restored, clean = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    mse = (restored - clean).square().mean()
    torch.testing.assert_close(pixel_loss(restored, clean, None), mse)
    torch.testing.assert_close(pixel_loss(restored, clean, absolute), mse + 2 * absolute(restored, clean))
    torch.testing.assert_close(pixel_loss(restored, clean, absolute, 0.5), mse + 0.5 * absolute(restored, clean))
    with pytest.raises(ValueError, match="expected equal"):
        pixel_loss(restored, clean[..., :4], None)


def test_a_batch_without_small_times_has_a_pixel_loss_of_zero_that_can_be_added():
    restored = torch.rand(2, 3, 8, 8, requires_grad=True)
    loss = pixel_loss(restored[:0], torch.rand(0, 3, 8, 8), absolute)
    loss.backward()
    assert loss == 0 and restored.grad is not None


def test_equation_7(pair):
    restored, clean, scores = torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8), torch.randn(3, 1, 2, 2)
    parts = [(pair[0] - pair[1]).square().mean(), (restored - clean).square().mean(),
             2 * absolute(restored, clean), -0.5 * scores.mean()]
    torch.testing.assert_close(removal_loss(*pair, restored, clean, absolute, scores), sum(parts))
    torch.testing.assert_close(removal_loss(*pair, restored, clean, None), parts[0] + parts[1])
    loss = removal_loss(*pair, restored, clean, absolute, scores, perceptual_weight=1.0, gan_weight=2.0)
    torch.testing.assert_close(loss, parts[0] + parts[1] + parts[2] / 2 + 4 * parts[3])
    with pytest.raises(ValueError, match="expected equal"):
        removal_loss(pair[0], pair[1][:1], restored, clean, None)


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert discriminator_loss(real, fake) == pytest.approx((0 + 0.5) / 2 + (0 + 1.5) / 2)
    assert generator_loss(fake) == 1.25


def test_the_discriminator_scores_70_px_patches_and_is_spectrally_normalised():
    torch.manual_seed(0)
    judge = PatchDiscriminator(width=8)
    picture = torch.rand(1, 3, 128, 128, requires_grad=True)
    scores = judge(picture)
    assert scores.shape == (1, 1, 14, 14)
    scores[0, 0, 7, 7].backward()
    seen = picture.grad.abs().sum(1)[0].nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]
    for _ in range(20):
        judge(torch.rand(1, 3, 32, 32))  # each call is a step of the power iteration
    judge.eval()
    for layer in judge.layers:
        if isinstance(layer, torch.nn.Conv2d):
            norm = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
            assert float(norm.detach()) == pytest.approx(1, abs=0.1)


def test_the_discriminator_learns_to_tell_two_kinds_of_pictures():
    torch.manual_seed(0)
    judge = PatchDiscriminator(width=8, layers=2)
    optimizer, losses = torch.optim.Adam(judge.parameters(), lr=5e-3), []
    for _ in range(30):
        real, fake = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32) * 0.2
        loss = discriminator_loss(judge(real), judge(fake))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_some_pictures_take_the_global_prompt_as_local(texts):
    local, whole = texts(3, 5, 1), texts(3, 5, 2)
    mixed = local_or_global(local, whole, torch.tensor([False, True, False]))
    for row, wanted in enumerate((local, whole, local)):
        assert torch.equal(mixed.prompt_embeds[row], wanted.prompt_embeds[row])
        assert torch.equal(mixed.pooled[row], wanted.pooled[row])
