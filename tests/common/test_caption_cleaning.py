"""Sentences that describe damage do not become prompts."""

import pytest
from fourfold.nodes.common.caption_cleaning import DROPPED_WORDS, clean_caption


@pytest.mark.parametrize("word", DROPPED_WORDS)
def test_sentences_about_the_degradation_are_dropped(word):
    caption = f"A cat sits on a wall. The picture is {word.upper()}red here! Red roofs behind it?"
    assert clean_caption(caption) == "A cat sits on a wall. Red roofs behind it?"


@pytest.mark.parametrize(("caption", "expected"), [
    ("A bridge.", "A bridge."), ("A bridge", "A bridge."), ("", ""), ("   ", ""), ("Slightly blurred.", ""),
    ("bright, warm, green", "bright, warm, green."), ("A 3.5 m wall. Sky", "A 3.5 m wall. Sky."),
    ("In focus.\nA dog runs.  A tree.", "A dog runs. A tree.")])
def test_cleaned_captions(caption, expected):
    assert clean_caption(caption) == expected
