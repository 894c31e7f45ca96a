"""ComfyUI's CONDITIONING as the encoded prompts that the methods take."""

from torch import Tensor

from ..text import TextEmbedding

Conditioning = list[list]  # ComfyUI's: [tokens (B, L, C), {"pooled_output": (B, P), "strength": ..., ...}] each
_UNSUPPORTED = ("area", "mask", "control", "gligen", "hooks", "start_percent", "end_percent")


def read_conditioning(
    conditioning: Conditioning, width: int, pooled_width: int, encoder: str
) -> list[tuple[TextEmbedding, float]]:
    """Every entry with its share in the prediction; the shares add up to 1.

    As in ComfyUI's own samplers, several entries (Conditioning Combine) are averaged predictions, each weighted by the
    strength it carries.

    Args:
        conditioning: as it comes over the socket.
        width, pooled_width: channels of the tokens and of the pooled prompt that the network takes.
        encoder: which CLIP gives them, for the error.
    Raises: ValueError for another width, a missing pooled prompt, or an entry with an area, a mask, a range of steps, a
        ControlNet or hooks, which the methods do not read.
    """
    if not conditioning:
        raise ValueError(f"the conditioning is empty; connect a CLIP Text Encode with {encoder}.")
    entries = []
    for tokens, extras in conditioning:
        found = [key for key in _UNSUPPORTED if extras.get(key) is not None]
        if found:
            raise ValueError(
                f"the conditioning carries {', '.join(found)}, which this sampler does not read; expected prompts for "
                "the whole picture and all steps. Remove the node that sets it."
            )
        pooled: Tensor | None = extras.get("pooled_output")
        if tokens.shape[-1] != width or pooled is None or pooled.shape[-1] != pooled_width:
            pooled_found = "none" if pooled is None else str(pooled.shape[-1])
            raise ValueError(
                f"the conditioning is {tokens.shape[-1]} channels wide with a pooled prompt of {pooled_found}; this "
                f"model takes {width} and {pooled_width}. Encode the prompt with {encoder}."
            )
        entries.append((TextEmbedding(tokens, pooled), float(extras.get("strength", 1.0))))
    total = sum(strength for _, strength in entries)
    if total <= 0:
        raise ValueError(f"the strengths of the conditioning add up to {total:g}; at least one must be above 0.")
    return [(text, strength / total) for text, strength in entries]
