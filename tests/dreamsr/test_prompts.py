"""Prompts as text: round trip, editing, wrong counts; captions of the picture and of its patches."""

import pytest
import torch
from fourfold.nodes.common.caption_cache import CaptionCache
from fourfold.nodes.common.captions import EmbeddedCaptioner
from fourfold.nodes.dreamsr.patches import plan_patches
from fourfold.nodes.dreamsr.prompts import PatchPrompts, format_prompts, parse_prompts, write_prompts

PLAN = plan_patches(14, 14, 8, 2)  # 2 x 2
PROMPTS = PatchPrompts("A harbour town.", ("sky", "a mast,\nropes\n\nand sails", "", "water [deep], 5: blue"))


@pytest.mark.parametrize("pictures", [1, 3])
def test_round_trip(pictures):
    prompts = [PROMPTS, PatchPrompts("", ("1", "2", "3", "4")), PROMPTS][:pictures]
    text = format_prompts(prompts, PLAN)
    assert parse_prompts(text, 4, pictures) == prompts
    assert parse_prompts(text.replace("\n", "\r\n"), 4, pictures)[0].patches[0] == "sky"


def test_the_text_says_where_a_patch_lies():
    text = format_prompts([PROMPTS], PLAN)
    assert text.startswith("[global]\nA harbour town.\n\n[patch 1: row 1, column 1]\nsky\n")
    assert "[patch 3: row 2, column 1]" in text and text.count("[patch") == 4
    assert "[picture 2, patch 4: row 2, column 2]" in format_prompts([PROMPTS, PROMPTS], PLAN)


def test_blocks_may_be_edited_moved_and_written_briefly():
    text = "[patch 2]\n two \n[Global]\nwhole\n\n[PATCH 1: anything]\none"
    assert parse_prompts(text, 2) == [PatchPrompts("whole", ("one", "two"))]


def test_text_of_other_nodes_needs_no_headers():
    assert parse_prompts("whole\n\none\n \ntwo\n", 2) == [PatchPrompts("whole", ("one", "two"))]
    assert parse_prompts("one text for all", 3, 2) == [PatchPrompts("one text for all", ("one text for all",) * 3)] * 2


@pytest.mark.parametrize(("text", "pictures", "wrong"), [
    ("[global]\na\n[patch 1]\nb", 1, r"1 missing: \[patch 2\]\. Each needs a block \[global\]"),
    ("[global]\na\n[patch 1]\nb\n[patch 2]\nc\n[patch 3]\nd", 1, r"1 surplus: \[patch 3\]"),
    ("[patch 1]\nb\n[patch 2]\nc", 1, r"1 missing: \[global\]"),
    ("[global]\na\n[patch 1]\nb\n[patch 1]\nc", 1, r"hold \[patch 1\] twice"),
    ("[global]\na\n[patch 1]\nb\n[patch 2]\nc", 2, r"3 missing: \[picture 2, global\], \[picture 2, patch 1\]"),
    ("hello\n[global]\na", 1, "begin with text that belongs to no block: 'hello'"),
    ("a\n\nb", 1, r"found 2 blocks of text without headers for 1 picture\(s\) of 2 patches; expected 3"),
    ("a\n\nb\n\nc", 2, "found 3 blocks of text without headers for 2 picture")])
def test_wrong_counts_are_named(text, pictures, wrong):
    with pytest.raises(ValueError, match=wrong):
        parse_prompts(text, 2, pictures)


def test_many_missing_blocks_are_shortened():
    with pytest.raises(ValueError, match=r"440 missing: \[patch 1\].*\[patch 6\], \.\.\.\. Each"):
        parse_prompts("[global]\na", 440)


# captions ---------------------------------------------------------------------------------------------------------

class Captioner:
    """Says the mean of a picture, and notes the sizes of what it is shown."""

    identity = "mean"

    def __init__(self):
        self.shown = []

    def __call__(self, images):
        self.shown.append(tuple(images.shape))
        return [f"{float(image.mean()):.4f} Nice. It is blurred." for image in images]


def test_every_patch_of_every_picture_is_captioned():
    pixels, captioner = torch.rand(2, 3, 56, 56), Captioner()
    prompts = write_prompts(pixels, PLAN, 4, captioner)
    assert captioner.shown == [(2, 3, 56, 56), (8, 3, 32, 32)]
    for b in (0, 1):
        assert prompts[b].whole.startswith(f"{float(pixels[b].mean()):.4f}")
        wanted = [float(box_pixels.mean()) for box_pixels in
                  (pixels[b, :, :32, :32], pixels[b, :, :32, 24:], pixels[b, :, 24:, :32], pixels[b, :, 24:, 24:])]
        assert [text[:6] for text in prompts[b].patches] == [f"{mean:.4f}" for mean in wanted]


def test_damage_is_left_out_where_asked():
    prompts = write_prompts(torch.rand(1, 3, 56, 56), PLAN, 4, Captioner(), clean=True)[0]
    assert all(text.endswith("Nice.") for text in (prompts.whole, *prompts.patches))


def test_captions_are_kept_by_content(tmp_path):
    pixels, captioner, cache = torch.rand(1, 3, 56, 56), Captioner(), CaptionCache(tmp_path / "captions.jsonl")
    first = write_prompts(pixels, PLAN, 4, captioner, cache=cache)
    assert len(captioner.shown) == 2 and len(cache) == 5
    assert write_prompts(pixels, PLAN, 4, captioner, cache=CaptionCache(cache.path)) == first
    assert len(captioner.shown) == 2, "a new seed captions nothing again"
    changed = pixels.clone()
    changed[..., :8, :8] = 0
    again = write_prompts(changed, PLAN, 4, captioner, cache=cache)[0]
    assert captioner.shown[2:] == [(1, 3, 56, 56), (1, 3, 32, 32)] and again.patches[1:] == first[0].patches[1:]


def test_equal_patches_are_shown_once():
    captioner = Captioner()
    write_prompts(torch.full((1, 3, 56, 56), 0.5), PLAN, 4, captioner, cache=CaptionCache())
    assert captioner.shown == [(1, 3, 56, 56), (1, 3, 32, 32)]


def test_a_captioner_without_identity_is_always_asked():
    shown = []
    write_prompts(torch.rand(1, 3, 56, 56), PLAN, 4, lambda x: shown.append(len(x)) or ["text"] * len(x),
                  cache=CaptionCache())
    assert shown == [1, 4]


def test_large_pictures_are_captioned_small_and_patches_a_few_at_a_time():
    captioner = Captioner()
    write_prompts(torch.rand(1, 3, 1056, 2112), plan_patches(66, 132, 66, 0), 16, captioner)
    assert captioner.shown == [(1, 3, 1024, 2048), (2, 3, 1056, 1056)]
    del captioner.shown[:]
    write_prompts(torch.rand(3, 3, 32, 128), plan_patches(8, 32, 8, 2), 4, captioner)
    assert captioner.shown == [(3, 3, 32, 128), *[(6, 3, 32, 32)] * 2, (3, 3, 32, 32)]


def test_the_embedded_captioner_of_good_photographs_has_captions_of_its_own():
    pixels, cache = torch.rand(1, 3, 56, 56), CaptionCache()
    measured, wished = (write_prompts(pixels, PLAN, 4, EmbeddedCaptioner(as_good), cache=cache) for as_good in
                        (False, True))
    assert "rich texture, crisp" in wished[0].whole and measured != wished
