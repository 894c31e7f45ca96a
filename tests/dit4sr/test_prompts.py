"""The published prompts."""

from fourfold.nodes.dit4sr.prompts import NEGATIVE, POSITIVE, positive_prompt


def test_published_wording():
    assert POSITIVE.startswith("Cinematic, hyper sharpness, highly detailed") and POSITIVE.endswith("pore detailing.")
    assert "hyper detailed photo - realistic maximum detail, 32k, Color Grading" in POSITIVE
    assert NEGATIVE.startswith("motion blur, noisy, dotted, bokeh") and NEGATIVE.endswith("deformed, lowres, chaotic")


def test_positive_prompt_is_what_the_picture_shows_then_quality():
    assert positive_prompt("A dog") == f"A dog. {POSITIVE}"
    assert positive_prompt("") == POSITIVE
    assert positive_prompt("A dog.", added="") == "A dog."
    assert positive_prompt("bright, warm", added="") == "bright, warm"


def test_the_users_own_words_are_kept_whatever_they_are():
    own = "A black and white portrait in a dense forest, in focus."
    assert positive_prompt(own) == f"{own} {POSITIVE}"
