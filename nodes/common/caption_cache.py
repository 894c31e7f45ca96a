"""Captions kept by content: the same pixels are described once, however often the seed changes."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)


def content_key(pixels: np.ndarray, identity: str) -> str:
    """sha256 of an 8-bit picture (H, W, 3) and of who describes it, 64 hexadecimal digits."""
    digest = hashlib.sha256(f"{identity} {pixels.shape} ".encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


class CaptionCache:
    """Captions by `content_key`, in memory and, if a file is named, in JSON lines {"key": ..., "caption": ...}.

    The file is only ever appended to, so several captioners and processes may share it.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path).expanduser() if path else None
        self._captions: dict[str, str] = {}
        self._torn = False  # the file ends in the middle of a line: its writer was killed
        if self.path and self.path.exists():
            self._read()

    def __contains__(self, key: str) -> bool:
        return key in self._captions

    def __getitem__(self, key: str) -> str:
        return self._captions[key]

    def __len__(self) -> int:
        return len(self._captions)

    def update(self, captions: dict[str, str]) -> None:
        """Keep these captions, and append them to the file."""
        self._captions.update(captions)
        if not self.path:
            return
        lines = "".join(json.dumps({"key": key, "caption": text}) + "\n" for key, text in captions.items())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + lines if self._torn else lines)
        self._torn = False

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8", errors="replace")
        self._torn = bool(text) and not text.endswith("\n")
        for number, line in enumerate(text.splitlines(), 1):
            if not line:
                continue
            try:
                entry = json.loads(line)
                self._captions[entry["key"]] = str(entry["caption"])
            except (ValueError, KeyError, TypeError):
                log.warning("line %d of the caption file %s is not a caption; it is skipped and its picture will be "
                            "captioned again.", number, self.path)
