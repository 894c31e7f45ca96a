"""Captioners: what turns a photograph into a prompt."""

from .embedded_captioner import EmbeddedCaptioner

__all__ = ["EmbeddedCaptioner"]
