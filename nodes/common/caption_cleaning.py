"""Which sentences of a caption are left out before it becomes a prompt (the published DiT4SR program's list)."""

import re

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
