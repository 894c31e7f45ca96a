"""Writing results so that a file is either whole or not there."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text under another name and moves it into place."""
    from ..nodes.common.checkpoints import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
