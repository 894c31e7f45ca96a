"""The photographs in the suite's folder `photographs`: each once damaged and small, and once clean."""

from pathlib import Path

from torch import Tensor

from ..common.image_files import read_image

FOLDER = Path(__file__).resolve().parents[2] / "photographs"


def example_names(folder: Path = FOLDER) -> list[str]:
    """Names of the photographs of which both versions are there, sorted."""
    damaged = (path.stem for path in (folder / "low_quality").glob("*.png"))
    return sorted(name for name in damaged if (folder / "clean" / f"{name}.jpg").is_file())


def load_example(name: str, folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """The low-quality version, (1, 3, h, w) in 0..1, and the clean one, (1, 3, 4h, 4w).

    Raises: FileNotFoundError if the suite's `photographs` folder lacks it.
    """
    pictures = (folder / "low_quality" / f"{name}.png", folder / "clean" / f"{name}.jpg")
    for path in pictures:
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no example photograph {path}; there are {', '.join(example_names(folder)) or 'none'}. The "
                "suite's repository holds them: clone it whole."
            )
    low_quality, clean = (read_image(path)[:, :3].expand(-1, 3, -1, -1) for path in pictures)
    return low_quality, clean
