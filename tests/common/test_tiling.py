"""Windows cover any latent, blending changes nothing that agrees, and running out of memory only costs time."""

import pytest
import torch
from fourfold.nodes.common.tiling import Box, gaussian_weight, plan_tiles, tiled, whole

T = torch.tensor(500.0)
SIZES = [(24, 36, 16, 6), (36, 24, 16, 0), (7, 3, 64, 24), (1, 1, 8, 4), (1, 9, 8, 4), (64, 64, 64, 24), (9, 21, 8, 7)]


def identity(x, t, boxes):
    return x


@pytest.mark.parametrize("height, width, tile, overlap", SIZES)
def test_plan_covers_the_latent_with_windows_of_one_size(height, width, tile, overlap):
    seen = torch.zeros(height, width)
    plan = plan_tiles(height, width, tile, overlap)
    for box in plan:
        assert (box.height, box.width) == (min(tile, height, width),) * 2
        assert box.top >= 0 and box.left >= 0 and box.top + box.height <= height and box.left + box.width <= width
        box.crop(seen).add_(1)
    assert seen.min() >= 1
    assert len(set(plan)) == len(plan)


def test_plan_starts_windows_every_stride_and_shifts_the_last_one_back():
    plan = plan_tiles(24, 36, tile=16, overlap=6)
    assert [(box.top, box.left) for box in plan] == [(0, 0), (0, 10), (0, 20), (8, 0), (8, 10), (8, 20)]
    assert len(plan_tiles(64, 64, 64, 24)) == 1
    assert [box.left for box in plan_tiles(48, 96, 64, 24)] == [0, 24, 48]  # shrunk to 48, the overlap as it was
    assert [box.left for box in plan_tiles(10, 22, 64, 24)] == [0, 5, 10, 12]  # shrunk to 10, the overlap to half


@pytest.mark.parametrize("arguments", [(8, 8, 4, 4), (8, 8, 4, 5), (8, 8, 4, -1), (8, 8, 0, 0), (0, 8, 4, 1)])
def test_impossible_plans_are_refused(arguments):
    with pytest.raises(ValueError, match=r"overlap|tile|latent"):
        plan_tiles(*arguments)


def test_weights_are_a_gaussian_of_variance_001_with_the_published_centres():
    weight = gaussian_weight(8, 10)
    assert weight.shape == (8, 10) and weight.dtype == torch.float32 and weight.min() > 0
    torch.testing.assert_close(weight, weight.flip(1))  # centred on 4.5 of 0..9
    torch.testing.assert_close(weight[3], weight[5])  # centred on row 4 of 0..7
    expected = torch.exp(torch.tensor(-((0.5 / 10) ** 2) / 0.02)) / (2 * torch.pi * 0.01)
    torch.testing.assert_close(weight[4, 4], expected)
    assert gaussian_weight(64, 64).min() > 0


@pytest.mark.parametrize("tile_batch", [1, 3, 100])
@pytest.mark.parametrize("height, width, tile, overlap", SIZES)
def test_identity_returns_its_input(height, width, tile, overlap, tile_batch):
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 4
    out = tiled(identity, plan_tiles(height, width, tile, overlap), tile_batch)(x, T)
    assert out.dtype == x.dtype
    torch.testing.assert_close(out, x, rtol=0, atol=1e-6)


def test_a_constant_field_is_exact():
    plan = plan_tiles(23, 41, 9, 5)
    out = tiled(lambda x, t, boxes: torch.full_like(x, 0.37), plan, 4)(torch.randn(1, 2, 23, 41), T)
    assert torch.equal(out, torch.full_like(out, 0.37))


def test_one_window_is_bit_equal_to_the_untiled_call():
    x = torch.randn(2, 3, 8, 20)
    for plan in (whole(8, 20), [Box(0, 0, 8, 20)]):
        assert torch.equal(tiled(lambda x, t, boxes: torch.sin(x) * t, plan)(x, T), torch.sin(x) * T)


def test_blend_is_the_weighted_mean_of_the_predictions():
    plan = plan_tiles(20, 27, 12, 7)
    values = {box: float(i + 1) for i, box in enumerate(plan)}

    def denoise(x, t, boxes):
        rows = [torch.full((2, 5, 12, 12), values[box]) for box in boxes]  # another number of channels than x
        return torch.cat(rows)

    total, weights = torch.zeros(20, 27, dtype=torch.float64), torch.zeros(20, 27, dtype=torch.float64)
    for box in plan:
        box.crop(total).add_(gaussian_weight(12, 12).double() * values[box])
        box.crop(weights).add_(gaussian_weight(12, 12).double())
    out = tiled(denoise, plan, 4)(torch.zeros(2, 3, 20, 27), T)
    assert out.shape == (2, 5, 20, 27)
    torch.testing.assert_close(out, (total / weights).float().expand(2, 5, -1, -1))


def test_rows_are_window_major_and_conditions_can_be_cropped_to_the_boxes():
    condition = torch.randn(2, 1, 18, 30)
    calls = []

    def denoise(x, t, boxes):
        calls.append(len(boxes))
        assert torch.equal(x, torch.cat([box.crop(latent) for box in boxes]))
        return x + torch.cat([box.crop(condition) for box in boxes])

    latent = torch.randn(2, 1, 18, 30)
    plan = plan_tiles(18, 30, 10, 4)
    out = tiled(denoise, plan, tile_batch=3)(latent, T)
    torch.testing.assert_close(out, latent + condition)
    assert sum(calls) == len(plan) and max(calls) == 3


def test_half_precision_predictions_are_blended_in_float32():
    x = torch.full((1, 1, 16, 24), 0.1)
    out = tiled(lambda x, t, boxes: x.bfloat16(), plan_tiles(16, 24, 8, 4))(x, T)
    assert out.dtype == torch.float32
    assert torch.equal(out, x.bfloat16().float())
    narrow = tiled(lambda x, t, boxes: x.float(), plan_tiles(16, 24, 8, 4))(x.bfloat16(), T)
    assert narrow.dtype == torch.bfloat16


def test_out_of_memory_halves_the_batch_and_remembers_it():
    plan = plan_tiles(16, 40, 16, 12)  # 7 windows
    tried = []

    def denoise(x, t, boxes):
        tried.append(len(boxes))
        if len(boxes) > 2:
            raise torch.cuda.OutOfMemoryError("too much")
        return x

    x = torch.randn(1, 2, 16, 40)
    run = tiled(denoise, plan, tile_batch=7)
    torch.testing.assert_close(run(x, T), x)
    assert tried == [7, 4, 2, 2, 2, 1]
    tried.clear()
    run(x, T)
    assert tried == [2, 2, 2, 1]  # the next step does not try the large batch again


def test_out_of_memory_with_one_window_is_raised():
    def denoise(x, t, boxes):
        raise torch.cuda.OutOfMemoryError("too much")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        tiled(denoise, plan_tiles(16, 40, 16, 12), 4)(torch.zeros(1, 1, 16, 40), T)


def test_progress_is_reported_after_each_call_and_may_cancel():
    plan = plan_tiles(16, 40, 16, 12)
    seen = []
    tiled(identity, plan, 3, on_window=lambda done, total: seen.append((done, total)))(torch.zeros(1, 1, 16, 40), T)
    assert seen == [(3, 7), (6, 7), (7, 7)]

    def cancel(done, total):
        raise InterruptedError

    calls = []
    with pytest.raises(InterruptedError):
        tiled(lambda x, t, b: calls.append(1) or x, plan, 3, on_window=cancel)(torch.zeros(1, 1, 16, 40), T)
    assert len(calls) == 1


def test_wrong_plans_and_latents_are_named():
    with pytest.raises(ValueError, match="covers a latent of 16x40"):
        tiled(identity, plan_tiles(16, 40, 16, 12))(torch.zeros(1, 1, 16, 41), T)
    with pytest.raises(ValueError, match="gaps"):
        tiled(identity, [Box(0, 0, 4, 4), Box(0, 8, 4, 4)])
    with pytest.raises(ValueError, match="one size"):
        tiled(identity, [Box(0, 0, 4, 4), Box(0, 4, 4, 5)])
    with pytest.raises(ValueError, match="one size"):
        tiled(identity, [])
    with pytest.raises(ValueError, match="tile_batch"):
        tiled(identity, whole(4, 4), tile_batch=0)
