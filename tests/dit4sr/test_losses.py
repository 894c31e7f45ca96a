"""The objective against numbers worked out by hand."""

import math

import pytest
import torch
from fourfold.nodes.dit4sr.losses import add_noise, flow_matching_loss, logit_normal_sigma


def draws(seed, count):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).tolist()


def logistic(x):
    return 1 / (1 + math.exp(-x))


def test_noise_levels_are_logit_normal_through_the_shift_of_three():
    sigma = logit_normal_sigma(5, torch.Generator().manual_seed(7))
    expected = [3 * logistic(x) / (1 + 2 * logistic(x)) for x in draws(7, 5)]
    torch.testing.assert_close(sigma, torch.tensor(expected))
    assert sigma.dtype == torch.float32


def test_shift_at_known_points():
    """With no spread u is exactly the logistic of the mean: 1/2 -> 3/4, 1/5 -> 3/7, and shift 1 leaves it."""
    generator = torch.Generator()
    for mean, shift, expected in ((0.0, 3.0, 0.75), (math.log(1 / 4), 3.0, 3 / 7), (0.0, 1.0, 0.5), (0.0, 2.0, 2 / 3)):
        sigma = logit_normal_sigma(2, generator, mean, 0.0, shift)
        torch.testing.assert_close(sigma, torch.full((2,), expected))


def test_noise_levels_follow_mean_and_spread():
    sigma = logit_normal_sigma(40_000, torch.Generator().manual_seed(0), mean=-0.6, std=1.2, shift=1.0)
    logits = torch.log(sigma / (1 - sigma))
    assert logits.mean().item() == pytest.approx(-0.6, abs=0.02) and logits.std().item() == pytest.approx(1.2, abs=0.02)
    assert sigma.min() > 0 and sigma.max() < 1


def test_noise_is_added_on_the_straight_path():
    x0, noise = torch.full((3, 1, 2, 2), 2.0), torch.full((3, 1, 2, 2), -1.0)
    x_t = add_noise(x0, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert x_t[:, 0, 0, 0].tolist() == [2.0, 1.25, -1.0]


@pytest.mark.parametrize(("weight", "l1", "expected"), [
    ("none", 0.0, (4 + 4) / 2), ("sigma2", 0.0, (0.25 * 4 + 1 * 4) / 2),
    ("none", 0.5, 4 + 0.5 * 2), ("sigma2", 0.3, 2.5 + 0.3 * (0.5 * 2 + 1 * 2) / 2)])
def test_loss_by_hand(weight, l1, expected):
    """v is 2 above the target noise - x0 everywhere; sigma 0.5 and 1."""
    x0, noise = torch.full((2, 1, 2, 2), 1.0), torch.full((2, 1, 2, 2), 4.0)
    loss = flow_matching_loss(noise - x0 + 2, x0, noise, torch.tensor([0.5, 1.0]), weight, l1)
    assert loss.item() == pytest.approx(expected)


def test_sigma2_is_the_error_of_the_clean_latent():
    torch.manual_seed(0)
    x0, noise, velocity = torch.randn(3, 4, 4, 5, 5).unbind()[:3]
    sigma = torch.tensor([0.1, 0.4, 0.7, 0.95])
    clean = add_noise(x0, noise, sigma) - sigma[:, None, None, None] * velocity
    torch.testing.assert_close(flow_matching_loss(velocity, x0, noise, sigma), (clean - x0).square().mean())


def test_published_weight_is_the_default_and_half_precision_counts_in_float32():
    x0, noise = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    velocity = torch.full((1, 1, 1, 1), 300.0, dtype=torch.float16)
    loss = flow_matching_loss(velocity, x0.half(), noise.half(), torch.tensor([1.0]))
    assert loss.item() == 90_000 and loss.dtype == torch.float32


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 8\), the target \(2, 4, 8, 6\)"):
        flow_matching_loss(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 6), torch.zeros(2, 4, 8, 6), torch.ones(2))
