"""Batches go through a workflow picture by picture and come out as the batches they were."""

import pytest
import torch
from fourfold.nodes.common.frames import put_together, split
from fourfold.nodes.common.images import prepare_lr


def batch(size: int, channels: int = 3, seed: int = 0):
    """Pictures of 4 x 5 px, made ready at twice the size."""
    return prepare_lr(torch.rand(size, channels, 4, 5, generator=torch.Generator().manual_seed(seed)), 2, None, 4)


def test_a_batch_becomes_one_frame_a_picture_and_a_batch_again():
    prepared = batch(3)
    frames = split(prepared)
    assert [len(frame.prepared.pixels) for frame in frames] == [1, 1, 1]
    (pictures, clear), = put_together([frame.prepared.pixels for frame in frames], frames, "none")
    assert torch.equal(pictures, prepared.lr) and clear.shape == (3, 8, 10) and not clear.any()


def test_pictures_that_came_apart_stay_apart():
    first, second, third = split(batch(2)), split(batch(1, seed=1)), split(batch(1, seed=2))
    frames = [*first, *second, *third]
    results = put_together([frame.prepared.pixels for frame in frames], frames, "adain")
    assert [len(pictures) for pictures, _ in results] == [2, 1, 1]
    assert torch.allclose(results[1][0], second[0].prepared.lr, atol=1e-5)  # its own colours, not those of another


def test_every_picture_gets_its_own_transparency_and_its_own_colours():
    prepared = batch(2, channels=4)
    white = [torch.ones(1, 3, 8, 12), torch.ones(1, 3, 8, 12)]
    (pictures, clear), = put_together(white, split(prepared), "adain")
    assert torch.equal(pictures[:, 3:], prepared.alpha) and torch.allclose(clear, 1 - prepared.alpha[:, 0])
    assert torch.allclose(pictures[:, :3].mean((2, 3)), prepared.lr.mean((2, 3)), atol=1e-4)


def test_grey_pictures_leave_as_rgb_that_is_grey():
    prepared = batch(2, channels=1)
    (pictures, _), = put_together(list(prepared.pixels.split(1)), split(prepared), "none")
    assert pictures.shape == (2, 3, 8, 10) and torch.equal(pictures[:, 0], pictures[:, 2])


def test_pictures_may_be_put_into_batches_of_another_size_on_the_way():
    prepared = batch(3)
    (pictures, _), = put_together([prepared.pixels[:2], prepared.pixels[2:]], split(prepared), "none")
    assert torch.equal(pictures, prepared.lr)


def test_several_results_of_one_picture():
    prepared = batch(1, channels=4)
    variants = [torch.rand(3, 3, 8, 12), torch.rand(1, 3, 8, 12)]
    (pictures, clear), = put_together(variants, split(prepared), "none")
    assert torch.equal(pictures[:, :3], torch.cat(variants)[..., :10]) and clear.shape == (4, 8, 10)
    (pictures, _), = put_together(variants[:1], split(prepared), "wavelet")
    assert pictures.shape == (3, 4, 8, 10)


def test_pictures_and_frames_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="2 restored pictures and 3 frames; connect the frame of"):
        put_together([torch.rand(2, 3, 8, 12)], split(batch(3)), "none")
