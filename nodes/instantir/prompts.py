"""The prompts of InstantIR: the published wording."""

POSITIVE = (
    "Photorealistic, highly detailed, hyper detailed photo - realistic maximum detail, 32k, ultra HD, extreme "
    "meticulous detailing, skin pore detailing, hyper sharpness, perfect without deformations, taken using a Canon EOS "
    "R camera, Cinematic, High Contrast, Color Grading."
)
NEGATIVE = (
    "blurry, out of focus, unclear, depth of field, over-smooth, sketch, oil painting, cartoon, CG Style, 3D render, "
    "unreal engine, dirty, messy, worst quality, low quality, frames, painting, illustration, drawing, art, watermark, "
    "signature, jpeg artifacts, deformed, lowres"
)
