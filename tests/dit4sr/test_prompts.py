"""Captions and the published prompts."""

import pytest
from fourfold.nodes.dit4sr.prompts import DROPPED_WORDS, NEGATIVE, POSITIVE, clean_caption, positive_prompt


def test_published_wording():
    assert POSITIVE.startswith("Cinematic, hyper sharpness, highly detailed") and POSITIVE.endswith("pore detailing.")
    assert "hyper detailed photo - realistic maximum detail, 32k, Color Grading" in POSITIVE
    assert NEGATIVE.startswith("motion blur, noisy, dotted, bokeh") and NEGATIVE.endswith("deformed, lowres, chaotic")


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


def test_positive_prompt_is_caption_then_quality():
    assert positive_prompt("A dog") == f"A dog. {POSITIVE}"
    assert positive_prompt("") == POSITIVE == positive_prompt("The background is blurred.")
    assert positive_prompt("A dog.", added="") == "A dog."
