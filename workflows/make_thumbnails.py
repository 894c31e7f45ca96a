"""Makes the thumbnails of the tiny workflows anew: the input on the left, what the network makes of it on the right.

    python workflows/make_thumbnails.py

Run it when a tiny checkpoint has changed. The thumbnail of a full-size workflow is a view of its graph in the editor.
"""

from pathlib import Path

import fourfold
from fourfold.nodes.common.images import resize, to_pillow
from fourfold.nodes.examples.photos import load_example
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
SIDE = 512  # pixels
# workflow -> (photograph, top, left and side of the square that is shown, in pixels of the result)
CROPS = {"dit4sr_tiny": ("cat", 0, 80, 288), "instantir_tiny": ("astronaut", 0, 100, 288)}


def thumbnail(method: str, photo: str, top: int, left: int, side: int) -> Image.Image:
    """A square of the photograph, halved: bicubic enlargement of the input, then the restored picture."""
    lr, clean = load_example(photo)
    sheet = resize(lr, clean.shape[-2:])
    middle = left + side // 2
    sheet[..., middle:] = fourfold.restore(lr, method=method, model="tiny", scale=4, seed=0)[..., middle:]
    image = to_pillow(sheet[0, :, top : top + side, left : left + side])
    image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    ImageDraw.Draw(image).line([(SIDE // 2, 0), (SIDE // 2, SIDE)], fill="white", width=2)
    return image


def main() -> None:
    for workflow, crop in CROPS.items():
        thumbnail(workflow.split("_")[0], *crop).save(HERE / f"{workflow}.jpg", quality=88, optimize=True)


if __name__ == "__main__":
    main()
