"""Whether the ComfyUI around us is new enough; imports nothing of it, so that any version can be told what it lacks."""

import re
import sys

REQUIRED = (0, 3, 64)
KNOWS_ENTRYPOINTS = "comfy_api.latest" in sys.modules  # ComfyUI's loader imports it where it calls comfy_entrypoint


def complaint() -> str | None:
    """One sentence if the running ComfyUI is too old; None if it will do, or if there is no ComfyUI at all."""
    if "folder_paths" not in sys.modules:
        return None
    version = str(getattr(sys.modules.get("comfyui_version"), "__version__", ""))
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if found >= REQUIRED or (found and not any(found)):  # 0.0.0: a host that does not tell
        return None
    needed = ".".join(map(str, REQUIRED))
    return f"Fourfold needs ComfyUI {needed} or newer, and this is {version or 'an older one'}: update ComfyUI."
