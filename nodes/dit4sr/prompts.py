"""The prompts of DiT4SR: the published wording."""

POSITIVE = (
    "Cinematic, hyper sharpness, highly detailed, perfect without deformations, camera, hyper detailed photo - "
    "realistic maximum detail, 32k, Color Grading, ultra HD, extreme meticulous detailing, skin pore detailing."
)
NEGATIVE = (
    "motion blur, noisy, dotted, bokeh, pointed, CG Style, 3D render, unreal engine, blurring, dirty, messy, "
    "worst quality, low quality, frames, watermark, signature, jpeg artifacts, deformed, lowres, chaotic"
)


def positive_prompt(text: str, added: str = POSITIVE) -> str:
    """What the picture shows (a caption, or the user's own words), followed by the published words of quality."""
    text = text.strip()
    if text and added and text[-1] not in ".!?":
        text += "."
    return f"{text} {added}".strip()
