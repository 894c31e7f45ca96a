"""Makes the bundled photographs: clean ones from scikit-image's data folder, and their low-quality counterparts.

    pip install scikit-image
    python photographs/make_photographs.py

The result is in the repository; run this only to change it. Sources and licences: photographs/README.md.
"""

from pathlib import Path

from fourfold.nodes.common.degradation import DEGRADATIONS, degrade
from fourfold.nodes.common.image_files import read_image, write_image

HERE = Path(__file__).resolve().parent
SCALE = 4
DEGRADATION = "seesr"

# name -> (file in skimage/data, seed of the degradation). The seeds were picked by eye: noise, blur and JPEG blocks
# that look like what people bring, each photograph another mixture.
EXAMPLES = {
    "astronaut": ("astronaut.png", 3),
    "camera": ("camera.png", 4),
    "cat": ("chelsea.png", 5),
    "coffee": ("coffee.png", 6),
    "rocket": ("rocket.jpg", 1),
}


def low_quality(clean, seed: int):
    """The low-quality counterpart of a clean photograph (1, C, H, W): (1, C, H / 4, W / 4); grey stays grey."""
    lr = degrade(clean.expand(-1, 3, -1, -1), DEGRADATIONS[DEGRADATION], seed, SCALE)
    return lr if clean.shape[1] == 3 else lr.mean(dim=1, keepdim=True)


def main() -> None:
    import skimage

    for folder in ("clean", "low_quality"):
        (HERE / folder).mkdir(exist_ok=True)
    for name, (file, seed) in EXAMPLES.items():
        photograph = read_image(Path(skimage.__file__).parent / "data" / file)
        height, width = (side // SCALE * SCALE for side in photograph.shape[-2:])
        write_image(HERE / "clean" / f"{name}.jpg", photograph[..., :height, :width])
        clean = read_image(HERE / "clean" / f"{name}.jpg")  # as shipped, so that anyone can degrade it again
        write_image(HERE / "low_quality" / f"{name}.png", low_quality(clean, seed))


if __name__ == "__main__":
    main()
