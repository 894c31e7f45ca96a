"""The shipped tiny weights do what they are for, and every part of the method matters in them."""

import pytest
import torch
from fourfold.nodes.common.captions import EmbeddedCaptioner
from fourfold.nodes.common.evaluation import bicubic
from fourfold.nodes.dit4sr.restore import load_system, restore
from fourfold.nodes.examples.photos import example_names, load_example

SIDE = 48  # pixels of the low-resolution crop


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


def test_it_is_closer_to_the_clean_photographs_than_bicubic_enlargement(system, pairs):
    assert len(pairs) >= 3
    assert error(pairs, lambda lr: restore(lr, system)) < error(pairs, bicubic)


@pytest.mark.parametrize("part", ["to_v_control", "to_k_control", "to_out_control", "control_conv"])
def test_every_part_of_the_lr_stream_matters(system, pairs, part):
    whole = error(pairs[:2], lambda lr: restore(lr, system))
    parameters = {name: p for name, p in system.transformer.named_parameters() if part in name}
    assert parameters
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for p in parameters.values():
                p.zero_()
        assert error(pairs[:2], lambda lr: restore(lr, system)) > 1.02 * whole
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(kept[name])


def test_a_prompt_moves_the_picture_in_the_direction_asked_for(system, pairs):
    light = "mid light, neutral, mid contrast, grey"
    measured = {}
    for words in ("dense texture, crisp", "flat, blurred"):
        pictures = [restore(lr, system, prompt=f"{light}, {words}, mixed edges") for lr, _ in pairs]
        numbers = [EmbeddedCaptioner().describe(picture)[0] for picture in pictures]
        measured[words] = [sum(n[key] for n in numbers) for key in ("texture", "sharpness")]
    rich, flat = measured.values()
    assert rich[0] > 1.05 * flat[0] and rich[1] > 1.05 * flat[1]
