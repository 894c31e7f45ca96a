"""The shipped tiny weights do what they are for, and every part of the method matters in them."""

import pytest
import torch
from fourfold.nodes.common.captions import EmbeddedCaptioner
from fourfold.nodes.common.evaluation import bicubic
from fourfold.nodes.examples.photos import example_names, load_example
from fourfold.nodes.instantir.restore import load_system, restore

SIDE = 48  # pixels of the low-resolution crop
WARM, COLD = "bright, golden, high contrast, orange and red", "very dark, cool, low contrast, blue"


@pytest.fixture(scope="module")
def system():
    return load_system("tiny", device="cpu")


@pytest.fixture(scope="module")
def pairs():
    """(low quality, clean) crops of the bundled photographs."""
    photographs = [load_example(name) for name in example_names()]
    return [(lr[..., :SIDE, :SIDE], hr[..., : 4 * SIDE, : 4 * SIDE]) for lr, hr in photographs]


def error(pairs, enlarge):
    """Mean squared error over the pictures."""
    return sum(float((enlarge(lr) - hr).square().mean()) for lr, hr in pairs) / len(pairs)


@pytest.fixture(scope="module")
def whole(system, pairs):
    return error(pairs, lambda lr: restore(lr, system))


def test_it_is_closer_to_the_clean_photographs_than_bicubic_enlargement(whole, pairs):
    assert len(pairs) >= 3
    assert whole < error(pairs, bicubic)


def test_without_the_aggregator_fidelity_is_lost(system, pairs, whole):
    assert error(pairs, lambda lr: restore(lr, system, conditioning_scale=0.0)) > 1.3 * whole


def test_previews_come_closer_to_the_result_step_by_step(system, pairs):
    seen = []
    restore(pairs[0][0], system, steps=4, on_sampled=seen.append)
    (run,) = seen
    distances = [float((preview - run.latent).square().mean()) for preview in run.previews]
    assert len(distances) == 4 and distances[-1] < 0.5 * distances[0]


def test_a_prompt_edits_the_picture_only_where_the_input_is_let_go(system, pairs):
    def warmth(prompt, creative_start):
        pictures = torch.cat([restore(lr, system, prompt=prompt, steps=6, guidance=5.0, text_guided=True,
                                      creative_start=creative_start) for lr, _ in pairs[:2]])
        return sum(measured["warmth"] for measured in EmbeddedCaptioner().describe(pictures)) / len(pictures)

    assert warmth(WARM, 0.2) - warmth(COLD, 0.2) > 0.005
    assert abs(warmth(WARM, 1.0) - warmth(COLD, 1.0)) < 0.002
