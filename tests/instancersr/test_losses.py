"""Equations 4 to 6 against numbers computed by hand."""

import pytest
import torch
from fourfold.nodes.instancersr.diffusion import add_noise, clean_latent, levels
from fourfold.nodes.instancersr.instances import patch_instances
from fourfold.nodes.instancersr.losses import (
    alignment_loss,
    denoising_loss,
    instance_scale_loss,
    instance_targets,
    total_loss,
)

# denoising, equation 4 --------------------------------------------------------------------------------------------

def test_denoising_is_the_mean_square_over_both_halves():
    noise = torch.zeros(1, 2, 1, 2)
    eps = torch.tensor([[[[1.0, -3.0]], [[2.0, 0.0]]]])
    t = torch.tensor([500])
    assert denoising_loss(eps, noise, t).item() == pytest.approx((1 + 9 + 4 + 0) / 4)
    assert denoising_loss(eps, noise, t, l1=0.5).item() == pytest.approx(14 / 4 + 0.5 * 6 / 4)
    assert denoising_loss(eps, noise, t, map_weight=0.5).item() == pytest.approx((5 + 0.5 * 2) / 2)
    assert denoising_loss(eps, noise, t, map_weight=0.5, l1=1.0).item() == pytest.approx((5 + 2 + 0.5 * (2 + 1)) / 2)


def test_weighted_for_x0_it_is_the_error_of_the_clean_latent():
    z0, noise, wrong = torch.randn(3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([20, 700])
    z_t = add_noise(z0, noise, t)
    alpha, sigma = levels(t)
    eps = noise + (alpha / sigma) * wrong  # the clean latent is missed by -wrong
    torch.testing.assert_close(clean_latent(z_t, eps, t), z0 - wrong, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(denoising_loss(eps, noise, t, "x0"), wrong.square().mean(), atol=1e-4, rtol=1e-4)


def test_denoising_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 2\), the noise \(1, 8, 2, 2\)"):
        denoising_loss(torch.zeros(1, 4, 2, 2), torch.zeros(1, 8, 2, 2), torch.tensor([0]))


# alignment, equation 5 --------------------------------------------------------------------------------------------

def test_alignment_is_minus_the_mean_cosine():
    target = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]])
    aligned = torch.tensor([[[4.0, 3.0], [-5.0, 0.0], [7.0, 0.0]]])
    assert alignment_loss(aligned, target).item() == pytest.approx(-(24 / 25 - 1 + 0) / 3)


def test_alignment_is_minus_one_for_equal_directions_and_one_for_opposite_ones():
    target = torch.randn(2, 3, 5, 6)
    assert alignment_loss(3 * target.flatten(1, 2), target).item() == pytest.approx(-1)
    assert alignment_loss(-0.1 * target.flatten(1, 2), target).item() == pytest.approx(1)


def test_alignment_reads_a_grid_row_by_row():
    target = torch.eye(6).reshape(1, 2, 3, 6)
    assert alignment_loss(torch.eye(6)[None], target).item() == pytest.approx(-1)
    assert alignment_loss(torch.eye(6).roll(1, 0)[None], target).item() == pytest.approx(0)
    with pytest.raises(ValueError, match=r"features are \(1, 6, 6\), DINOv2's \(1, 4, 6\).*align_dim"):
        alignment_loss(torch.eye(6)[None], torch.zeros(1, 2, 2, 6))


# instance scale, equation 6 ---------------------------------------------------------------------------------------

def test_instance_scale_by_hand():
    """Two instances and a patch of none: norms 5, 1, 2, 0; targets 2 (none), 4, 3."""
    features = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, -2.0], [0.0, 0.0]]])
    assignment = torch.tensor([[1, 2, 0, 1]])
    loss = instance_scale_loss(features, assignment, torch.tensor([[2.0, 4.0, 3.0]]))
    assert loss.item() == pytest.approx(((5 - 4) ** 2 + (1 - 3) ** 2 + 0 + (0 - 4) ** 2) / 4)


def test_instance_scale_is_zero_at_the_target_norms():
    labels = torch.tensor([[[1, 1, 2, 2], [1, 1, 2, 2]], [[0, 0, 3, 3], [0, 0, 3, 3]]])
    assignment = patch_instances(labels, (1, 2))
    targets = instance_targets([4, 5], 3, 16)
    directions = torch.nn.functional.normalize(torch.randn(2, 2, 16), dim=-1)
    features = directions * targets.gather(1, assignment)[..., None]
    assert instance_scale_loss(features, assignment, targets).item() == pytest.approx(0, abs=1e-10)
    assert instance_scale_loss(1.5 * features, assignment, targets) > 0.1


def test_pictures_without_instances_and_of_one_pixel_have_a_loss_and_a_gradient():
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    labels[1, 4, 4] = 1
    features = torch.randn(2, 16, 4, requires_grad=True)
    loss = instance_scale_loss(features, patch_instances(labels, (4, 4)), instance_targets([0, 1], 1, 4))
    loss.backward()
    assert loss > 0 and features.grad.abs().sum(-1).min() > 0
    single = torch.zeros(1, 1, 1, dtype=torch.long)
    assert instance_scale_loss(torch.ones(1, 1, 4), patch_instances(single, (1, 1)), torch.tensor([[3.0]])).item() == 1


def test_a_feature_of_nothing_has_a_finite_gradient():
    features = torch.zeros(1, 1, 4, requires_grad=True)
    instance_scale_loss(features, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)).backward()
    assert features.grad.isfinite().all()


def test_targets_are_random_in_their_range_and_belong_to_picture_and_label():
    targets = instance_targets(list(range(200)), 30, 64)
    assert targets.shape == (200, 31) and 4 <= targets.min() < 4.1 and 11.9 < targets.max() <= 12
    assert targets.mean().item() == pytest.approx(8, abs=0.1)
    assert targets.std().item() == pytest.approx(8 / 12**0.5, abs=0.1)
    assert torch.equal(instance_targets([7], 500, 64)[:, :31], targets[7:8])


def test_instance_scale_refuses_what_does_not_fit():
    features, targets = torch.zeros(1, 4, 8), torch.ones(1, 3)
    with pytest.raises(ValueError, match="labels up to 3"):
        instance_scale_loss(features, torch.tensor([[0, 1, 2, 3]]), targets)
    with pytest.raises(ValueError, match=r"assignment \(1, 3\)"):
        instance_scale_loss(features, torch.zeros(1, 3, dtype=torch.long), targets)


def test_total():
    parts = [torch.tensor(value) for value in (2.0, -0.8, 3.0)]
    assert total_loss(*parts).item() == pytest.approx(2 - 0.4 + 0.3)
    assert total_loss(*parts, alignment_weight=1.0, scale_weight=0.0).item() == pytest.approx(1.2)
    assert total_loss(parts[0]) is parts[0]
