"""The prompts of DiT4SR: the published wording, and which sentences of a caption are left out."""

from __future__ import annotations

import re

POSITIVE = (
    "Cinematic, hyper sharpness, highly detailed, perfect without deformations, camera, hyper detailed photo - "
    "realistic maximum detail, 32k, Color Grading, ultra HD, extreme meticulous detailing, skin pore detailing."
)
NEGATIVE = (
    "motion blur, noisy, dotted, bokeh, pointed, CG Style, 3D render, unreal engine, blurring, dirty, messy, "
    "worst quality, low quality, frames, watermark, signature, jpeg artifacts, deformed, lowres, chaotic"
)
# A captioner that sees a degraded picture describes the degradation; such sentences would ask for it.
DROPPED_WORDS = (
    "focus",
    "focal",
    "prominent",
    "close-up",
    "black and white",
    "blur",
    "depth",
    "dense",
    "locate",
    "position",
)


def clean_caption(caption: str) -> str:
    """The caption without the sentences that contain one of DROPPED_WORDS; ends with a full stop unless empty."""
    sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+", caption.strip()) if s.strip()]
    kept = [s for s in sentences if not any(word in s.lower() for word in DROPPED_WORDS)]
    return " ".join(s if s[-1] in ".!?" else s + "." for s in kept)


def positive_prompt(caption: str, added: str = POSITIVE) -> str:
    """The caption, cleaned, followed by the published words of quality."""
    return f"{clean_caption(caption)} {added}".strip()
