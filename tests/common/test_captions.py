"""Captions: the embedded captioner."""

import itertools

import pytest
import torch
from fourfold.nodes.common.captions import EmbeddedCaptioner
from fourfold.nodes.common.embedded_captioner import COLORS, SCALES, sentence

caption = EmbeddedCaptioner()


def flat(*rgb: float, size: int = 32) -> torch.Tensor:
    return torch.tensor(rgb).view(1, -1, 1, 1).expand(1, -1, size, size)


def stripes(angle: float, size: int = 96, period: float = 9.0) -> torch.Tensor:
    """Grey waves whose crests run at `angle` degrees, 0 = horizontal, counter-clockwise."""
    y, x = torch.meshgrid(-torch.arange(size).float(), torch.arange(size).float(), indexing="ij")
    angle = torch.deg2rad(torch.tensor(angle))
    phase = (-x * angle.sin() + y * angle.cos()) * (2 * torch.pi / period)
    return (0.5 + 0.3 * phase.sin()).expand(1, 3, size, size)


def blurred(images: torch.Tensor, size: int) -> torch.Tensor:
    for _ in range(3):
        images = torch.nn.functional.avg_pool2d(images, size, 1, size // 2, count_include_pad=False)
    return images


def test_every_sentence_is_short_ascii():
    scales = [words for words, _ in SCALES.values()]
    longest = sorted(COLORS, key=len)[-2:]
    text = ", ".join([*(max(words, key=len) for words in scales), " and ".join(longest), "horizontal edges"])
    assert len(text.encode("ascii")) <= 96


def test_sentence_puts_every_measure_into_words():
    measured = {"light": 1, "warmth": -1, "contrast": 0, "texture": 0.05, "sharpness": 2, "coherence": 0.5, "angle": 90,
                "colors": {"blue": 0.6, "green": 0.4}}
    assert sentence(measured) == "very bright, cool, low contrast, blue and green, fine texture, crisp, vertical edges"
    measured["colors"] = {"blue": 0.9, "green": 0.1}
    assert "blue, fine" in sentence(measured)


@pytest.mark.parametrize(("rgb", "name"), [
    ((0, 0, 0), "black"), ((0.5, 0.5, 0.5), "grey"), ((1, 1, 1), "white"), ((0.8, 0.1, 0.1), "red"),
    ((1, 0.5, 0), "orange"), ((0.45, 0.25, 0.1), "brown"), ((0.9, 0.9, 0.1), "yellow"), ((0.1, 0.6, 0.1), "green"),
    ((0.1, 0.9, 0.9), "cyan"), ((0.1, 0.2, 0.9), "blue"), ((0.45, 0.1, 0.9), "purple"), ((1, 0.2, 0.8), "pink"),
])
def test_flat_pictures_have_one_colour(rgb, name):
    picture = flat(*rgb)
    assert next(iter(caption.describe(picture)[0]["colors"].items())) == (name, 1.0)
    assert caption(picture)[0].split(", ")[2:] == ["low contrast", name, "flat", "blurred", "mixed edges"]


def test_saturated_colours_count_more_than_grey():
    half = torch.cat([flat(0.5, 0.5, 0.5), flat(0.9, 0.1, 0.1)], dim=3)
    shares = caption.describe(half)[0]["colors"]
    assert list(shares)[:2] == ["red", "grey"] and shares["red"] > 0.55
    assert "red and grey" in caption(half)[0]


def test_light_and_warmth_and_contrast_follow_the_pixels():
    measured = caption.describe(torch.cat([flat(0.2, 0.2, 0.2), flat(0.9, 0.7, 0.5), flat(0.5, 0.7, 0.9)]))
    assert measured[0]["light"] == pytest.approx(0.2) and measured[0]["warmth"] == 0
    assert measured[1]["warmth"] == pytest.approx(0.4, abs=5e-3)
    assert measured[2]["warmth"] == pytest.approx(-0.4, abs=5e-3)
    half = torch.cat([flat(0, 0, 0), flat(1, 1, 1)], dim=3)
    assert caption.describe(half)[0]["contrast"] == pytest.approx(0.5)
    texts = caption(torch.cat([flat(0.5, 0.5, 0.5), flat(0.7, 0.5, 0.3)]))
    assert [text.split(", ")[1] for text in texts] == ["neutral", "golden"]


@pytest.mark.parametrize(("angle", "word"), [
    (0, "horizontal"), (90, "vertical"), (45, "diagonal"), (135, "diagonal"), (174, "horizontal"),
])
def test_direction_of_edges(angle, word):
    measured = caption.describe(stripes(float(angle)))[0]
    assert abs((measured["angle"] - angle + 90) % 180 - 90) < 2
    assert measured["coherence"] > 0.8
    assert caption(stripes(float(angle)))[0].endswith(f"{word} edges")


def test_noise_has_no_direction():
    noise = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert caption.describe(noise)[0]["coherence"] < 0.05


def test_blur_takes_texture_and_sharpness():
    noise = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    measured = [caption.describe(blurred(noise, size))[0] for size in (1, 3, 5, 9)]
    for key in ("texture", "sharpness"):
        values = [m[key] for m in measured]
        assert values == sorted(values, reverse=True) and values[0] > 2 * values[-1]
    assert "dense texture, crisp" in caption(noise)[0] and "blurred" in caption(blurred(noise, 9))[0]


def test_sharpness_does_not_follow_contrast():
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    full, faint = (caption.describe(picture)[0] for picture in (noise, 0.5 + 0.4 * (noise - 0.5)))
    assert faint["sharpness"] == pytest.approx(full["sharpness"], rel=0.1) and faint["texture"] < 0.5 * full["texture"]


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 1, 5, 1), (1, 3, 1, 7), (3, 3, 17, 33)])
def test_any_size(shape):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    texts = caption(images)
    assert len(texts) == shape[0] and all(len(text.split(", ")) == 7 for text in texts)
    assert texts == [caption(image[None])[0] for image in images], "a batch says what its pictures say alone"


def test_grey_equals_three_equal_channels():
    grey = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(2))
    assert caption(grey) == caption(grey.expand(-1, 3, -1, -1))
    assert set(itertools.islice(caption.describe(grey)[0]["colors"], 3)) == {"black", "grey", "white"}


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\)"):
        caption(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="holds NaN"):
        caption(torch.full((1, 3, 8, 8), float("nan")))


def test_a_poor_picture_can_be_described_as_the_good_one_it_should_be():
    grey = torch.full((1, 3, 32, 32), 0.5)
    assert "flat, blurred" in EmbeddedCaptioner()(grey)[0]
    wished = EmbeddedCaptioner(as_good=True)(grey)[0]
    assert "rich texture, crisp" in wished
    assert wished.startswith(EmbeddedCaptioner()(grey)[0].split(", flat")[0])
