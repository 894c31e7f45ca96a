"""The plan of the patches, their pictures, and the encoded prompt of each."""

import pytest
import torch
from fourfold.nodes.common.text import TextEmbedding
from fourfold.nodes.common.tiling import Box
from fourfold.nodes.dreamsr.patches import PatchText, cut_patches, join_rows, plan_patches, split_rows


def test_a_picture_of_at_most_one_patch_is_one_patch():
    assert plan_patches(64, 64) == [Box(0, 0, 64, 64)]
    assert plan_patches(32, 60) == [Box(0, 0, 32, 60)]


def test_patches_overlap_and_cover_the_picture():
    plan = plan_patches(64, 160, 64, 16)
    assert [(box.top, box.left) for box in plan] == [(0, 0), (0, 48), (0, 96)]
    plan = plan_patches(1024, 512)  # 8192 x 4096 px
    assert len(plan) == 21 * 11 and {(box.height, box.width) for box in plan} == {(64, 64)}
    covered = torch.zeros(1024, 512, dtype=torch.bool)
    for box in plan:
        box.crop(covered)[:] = True
    assert covered.all()


@pytest.mark.parametrize(("sides", "text"), [
    ((64, 65, 64, 16), "latent is 64 x 65; both must be even"), ((128, 128, 63, 16), "tile is 63 latents"),
    ((128, 128, 32, 32), "overlap is 32")])
def test_plans_that_do_not_fit_are_refused(sides, text):
    with pytest.raises(ValueError, match=text):
        plan_patches(*sides)


def test_patches_of_a_batch_come_patch_by_patch():
    pixels = torch.rand(2, 3, 32, 64)
    patches = cut_patches(pixels, plan_patches(8, 16, 8, 2), downscale=4)
    assert patches.shape == (6, 3, 32, 32)
    assert torch.equal(patches[2:4], pixels[..., 24:56]) and torch.equal(patches[5], pixels[1, ..., 32:])


@pytest.fixture
def encoder():
    """Encodes a text as its length, and notes what it was asked."""
    asked = []

    def encode(prompts):
        asked.append(list(prompts))
        values = torch.tensor([float(len(prompt)) for prompt in prompts])
        return TextEmbedding(values[:, None, None].expand(-1, 3, 4), values[:, None].expand(-1, 2))

    encode.asked = asked
    return encode


def test_equal_prompts_are_encoded_once(encoder):
    plan = plan_patches(8, 14, 8, 2)
    local = PatchText.encode([("a", "bbb"), ("bbb", "cc")], plan, encoder, torch.bfloat16)
    assert encoder.asked == [["a", "bbb", "cc"]] and local.texts[0].pooled.dtype == torch.bfloat16
    rows = local.rows([plan[1], plan[0]], batch=2)
    assert [float(row.pooled[0, 0]) for row in rows] == [3, 2, 1, 3]
    assert [row.prompt_embeds.shape for row in rows] == [(1, 3, 4)] * 4


def test_many_prompts_are_encoded_a_few_at_a_time(encoder):
    plan = plan_patches(8, 8 + 6 * 19, 8, 2)
    local = PatchText.encode([["x" * i for i in range(20)]], plan, encoder)
    assert [len(batch) for batch in encoder.asked] == [8, 8, 4]
    assert [float(row.pooled[0, 0]) for row in local.rows(plan, 1)] == list(range(20))


def test_encoded_prompts_of_several_patches_or_one_for_all(texts):
    plan = plan_patches(8, 14, 8, 2)
    a, b, one = texts(2, 5, 1), texts(2, 7, 2), texts(1, 5, 3)
    rows = PatchText.of([a, b], plan).rows(plan, 2)
    for row, wanted in zip(rows, [*split_rows(a), *split_rows(b)], strict=True):
        assert torch.equal(row.prompt_embeds, wanted.prompt_embeds) and torch.equal(row.pooled, wanted.pooled)
    everywhere = PatchText.of([one], plan)
    assert len(everywhere.texts) == 1 and len(everywhere.rows(plan, 3)) == 6
    mixed = PatchText.of([a, one], plan).rows(plan[1:], 2)
    assert all(torch.equal(row.pooled, one.pooled) for row in mixed)
    joined = join_rows(split_rows(a))
    assert torch.equal(joined.prompt_embeds, a.prompt_embeds) and torch.equal(joined.pooled, a.pooled)


def test_prompts_that_do_not_fit_are_refused(texts, encoder):
    plan = plan_patches(8, 14, 8, 2)
    with pytest.raises(ValueError, match=r"3 encoded prompts of .* rows for 2 patches"):
        PatchText.of([texts(1)] * 3, plan)
    with pytest.raises(ValueError, match=r"2 encoded prompts of \[2, 3\] rows"):
        PatchText.of([texts(2), texts(3)], plan)
    with pytest.raises(ValueError, match="1 prompts for 2 patches"):
        PatchText.encode([["a"]], plan, encoder)
    local = PatchText.of([texts(2), texts(2)], plan)
    with pytest.raises(ValueError, match="prompts for 2 pictures, but 3 are drawn"):
        local.rows(plan, 3)
    with pytest.raises(ValueError, match="is no patch of the plan of 2"):
        local.rows([Box(0, 1, 8, 8)], 2)
