"""Embedded ICC profiles: what is not sRGB becomes sRGB, everything else stays as it is."""

import logging
import struct

import numpy as np
import pytest
import torch
from fourfold.nodes.common.image_files import read_image
from PIL import Image, ImageCms

# primaries in XYZ under D50, one row a colour
ADOBE = np.array([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]])
SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])
WHITE = (0.9642, 1.0, 0.8249)


def fixed(*numbers):
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def profile(space: bytes, gamma: float, primaries=None) -> bytes:
    """A version 2 ICC profile of a display with one gamma."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(*WHITE)}
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        for name, color in zip((b"r", b"g", b"b"), primaries, strict=True):
            tags |= {name + b"XYZ": b"XYZ " + bytes(4) + fixed(*color), name + b"TRC": curve}
    table, data, offset = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, offset + len(data), len(content))
        data += content
    head = struct.pack(">I4sI4s4s4s12s4s", offset + len(data), bytes(4), 0x02400000, b"mntr", space, b"XYZ ",
                       struct.pack(">6H", 2020, 1, 1, 0, 0, 0), b"acsp")
    return head + bytes(28) + fixed(*WHITE) + bytes(48) + table + data


def encoded(linear):
    """sRGB's curve."""
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def colors(channels: int) -> np.ndarray:
    """Muted ones, which sRGB can show in either space; and any alpha."""
    array = np.random.default_rng(0).integers(90, 170, (12, 16, channels), dtype=np.uint8)
    if channels in (2, 4):
        array[..., -1] = np.arange(192).reshape(12, 16)
    return array.squeeze()


def read(path, array, icc, **options):
    Image.fromarray(array).save(path, icc_profile=icc, **options)
    return read_image(path)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("channels", [3, 4])
def test_wide_gamut_becomes_srgb(tmp_path, channels):
    array = colors(channels)
    result = read(tmp_path / "a.png", array, profile(b"RGB ", 2.2, ADOBE))
    expected = encoded((array[..., :3] / 255) ** 2.2 @ ADOBE @ np.linalg.inv(SRGB))
    assert np.abs(result[..., :3] - expected).max() < 1.6 / 255
    assert np.abs(result[..., :3] - array[..., :3] / 255).max() > 8 / 255  # which makes the difference visible
    if channels == 4:
        assert np.array_equal(result[..., 3], array[..., 3].astype(np.float32) / 255)


@pytest.mark.parametrize("icc", [profile(b"GRAY", 1.0), profile(b"RGB ", 1.0, SRGB)])
@pytest.mark.parametrize("channels", [1, 2])
def test_grey_stays_grey(tmp_path, channels, icc):
    array = colors(channels).reshape(12, 16, channels)
    result = read(tmp_path / "a.png", array.squeeze(), icc)
    assert result.shape == array.shape
    assert np.abs(result[..., 0] - encoded(array[..., 0] / 255)).max() < 1.6 / 255


def test_palettes_follow_the_profile_and_keep_their_transparency(tmp_path):
    picture = Image.fromarray(colors(3)).quantize(8)
    plain = tmp_path / "plain.png"
    picture.save(plain, transparency=3)
    before = read_image(plain)[0].numpy()
    picture.save(tmp_path / "a.png", icc_profile=profile(b"RGB ", 1.0, SRGB), transparency=3)
    result = read_image(tmp_path / "a.png")[0].numpy()
    assert np.array_equal(result[3], before[3]) and 0 < (result[3] == 0).mean() < 1
    assert np.abs(result[:3] - encoded(before[:3])).max() < 1.6 / 255


def test_srgb_and_16_bits_are_left_as_they_are(tmp_path, caplog):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for channels in (1, 2, 3, 4):
        array = colors(channels)
        exact = torch.from_numpy(array.reshape(12, 16, channels) / 255).float().numpy()
        assert np.array_equal(read(tmp_path / "with.png", array, srgb), exact)
        assert np.array_equal(read(tmp_path / "without.png", array, None), exact)
    deep = (colors(1).astype(np.uint16) * 251)
    assert np.array_equal(read(tmp_path / "deep.png", deep, profile(b"GRAY", 1.0))[..., 0],
                          (deep / 65535).astype(np.float32))
    assert not caplog.records


@pytest.mark.parametrize(("icc", "reason"), [
    (b"no profile at all", "cannot be used"),
    (profile(b"RGB ", 2.2, ADOBE)[:200], "cannot be used"),
    (ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(), "expected RGB, GRAY or CMYK"),
    (profile(b"GRAY", 1.0), "is RGB, its colour profile for L"),
])
def test_a_broken_or_wrong_profile_is_said_and_ignored(tmp_path, caplog, icc, reason):
    array = colors(3)
    with caplog.at_level(logging.WARNING):
        result = read(tmp_path / "a.png", array, icc)
    assert np.array_equal(result, array.astype(np.float32) / 255)
    assert len(caplog.records) == 1 and reason in caplog.text and "a.png" in caplog.text


def test_a_jpeg_with_orientation_and_profile_is_both(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    array = np.full((8, 16, 3), 100, np.uint8)
    result = read(tmp_path / "a.jpg", array, profile(b"RGB ", 1.0, SRGB), exif=exif, quality=100)
    assert result.shape == (16, 8, 3)
    assert np.abs(result - encoded(np.array(100 / 255))).max() < 2.6 / 255
