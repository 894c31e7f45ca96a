"""The tiny network's prediction: a residual on the LQ latent where the Aggregator works, else the clean latent."""

import torch
from fourfold.nodes.instantir.losses import diffusion_loss
from fourfold.nodes.instantir.sampler import sample


def run(model, inputs, **options):
    given = inputs() | {"steps": 4, "guidance": 1.0, "tile": 0} | options
    return sample(model, given.pop("lq_latent"), given.pop("noise"), given.pop("image"), given.pop("positive"),
                  given.pop("negative", None), given.pop("null_image", None), **given)


class Anchors:
    """Notes the anchor of every evaluation of a network."""

    def __init__(self, model):
        self.seen, self.output = [], model.output
        model.output = self

    def __call__(self, x, t, condition, residuals=None, rows=None, anchor=None):
        if not condition.previewer:
            self.seen.append(anchor)
        return self.output(x, t, condition, residuals, rows, anchor)


def test_steps_with_the_aggregator_are_anchored_and_others_are_not(network, inputs):
    model = network(prediction="sample", anchor="lr")
    anchors = Anchors(model)
    run(model, inputs, creative_start=0.5)
    lq = inputs()["lq_latent"].float()
    assert [anchor is not None for anchor in anchors.seen] == [True, True, False, False]
    assert all(torch.equal(anchor, lq) for anchor in anchors.seen[:2])


def test_a_network_without_an_anchor_is_given_none(network, inputs):
    model = network(prediction="sample")
    anchors = Anchors(model)
    run(model, inputs)
    assert anchors.seen == [None] * 4


def test_the_objective_of_a_clean_latent_is_its_own_error():
    x0, noise, output = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 0.5)
    alpha = sigma = torch.full((2,), 0.5**0.5)
    for weight in ("none", "x0"):
        loss = diffusion_loss(output, x0, noise, alpha, sigma, "sample", weight, l1=0.1)
        torch.testing.assert_close(loss, torch.tensor(0.25 + 0.05))
