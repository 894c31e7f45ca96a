"""Pictures of any size and kind go through and come back in their own form; files are read and written whole."""

import json
import os

import numpy as np
import pytest
import torch
from fourfold.nodes.common.images import (
    crop,
    finish,
    from_comfy,
    pad,
    prepare_lr,
    read_image,
    resize,
    side_by_side,
    to_comfy,
    write_image,
)
from PIL import Image


def picture(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def bytes_of(image):
    """(1, C, H, W) in 0..1 -> (H, W, C) 0..255."""
    return (image[0].permute(1, 2, 0) * 255).round().byte().numpy()


# ---- prepare and finish


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 40), (7, 5), (16, 32), (33, 20)])
@pytest.mark.parametrize("min_short_side", [0, 48])
def test_every_size_and_kind_comes_back_in_its_own_form(channels, height, width, min_short_side):
    image = picture(2, channels, height, width)
    prepared = prepare_lr(image, scale=4, multiple=16, min_short_side=min_short_side)
    target = (4 * height, 4 * width)
    assert prepared.size == target and prepared.lr.shape == (2, 3, *target)
    assert prepared.pixels.shape[:2] == (2, 3) and not any(side % 16 for side in prepared.pixels.shape[-2:])
    assert min(prepared.pixels.shape[-2:]) >= min_short_side
    out = finish(prepared.pixels, prepared)
    assert out.shape == (2, channels, *target)
    assert out.min() >= 0 and out.max() <= 1
    atol = 1e-6 if prepared.work == target else 0.1  # enlarged further and shrunk back: nearly the same
    expected = resize(image, target)
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)
    torch.testing.assert_close(finish(crop(prepared.pixels, prepared), prepared), out)


def test_padding_is_cropped_off_exactly():
    prepared = prepare_lr(picture(1, 3, 9, 13), scale=3, multiple=16)
    assert prepared.pixels.shape == (1, 3, 32, 48) and prepared.size == (27, 39)
    assert torch.equal(crop(prepared.pixels, prepared), prepared.lr)
    spoiled = prepared.pixels.clone()
    spoiled[..., 27:, :] = spoiled[..., :, 39:] = float("nan")
    assert torch.equal(finish(spoiled, prepared), prepared.lr)


def test_padding_mirrors_where_the_picture_is_large_enough_else_repeats_the_edge():
    image = picture(1, 3, 6, 2)
    padded = pad(image, 2, 14)
    assert torch.equal(padded[..., 6:, 0], image[..., [4, 3], 0])
    assert torch.equal(padded[..., :6, 2:], image[..., 1:].expand(-1, -1, -1, 14))
    assert torch.equal(pad(image, 0, 0), image)


def test_the_target_is_exact():
    image = picture(1, 3, 10, 15)
    assert prepare_lr(image, scale=2.55).size == (26, 38)
    assert prepare_lr(image, size=(17, 23)).size == (17, 23)
    assert prepare_lr(image).size == (10, 15)
    assert torch.equal(prepare_lr(image).lr, image)
    assert prepare_lr(image, scale=0.01).size == (1, 1)
    assert prepare_lr(image, size=(100, 7)).lr.shape == (1, 3, 100, 7)


def test_a_small_target_is_worked_on_larger_and_comes_back_exact():
    prepared = prepare_lr(picture(1, 3, 10, 15), scale=4, multiple=16, min_short_side=512)
    assert prepared.work == (512, 768) and prepared.pixels.shape == (1, 3, 512, 768)
    assert finish(prepared.pixels, prepared).shape == (1, 3, 40, 60)
    assert prepare_lr(picture(1, 3, 130, 128), scale=4, min_short_side=512).work == (520, 512)


def test_a_very_long_picture_does_not_explode():
    prepared = prepare_lr(picture(1, 3, 1, 200), scale=1, multiple=16, min_short_side=64)
    assert prepared.work == (1, 256) and prepared.pixels.shape == (1, 3, 64, 256)
    assert finish(prepared.pixels, prepared).shape == (1, 3, 1, 200)


def test_enlarging_is_pillows_bicubic_and_shrinking_is_antialiased():
    image = picture(1, 1, 12, 17)
    for size in ((48, 68), (5, 6)):
        theirs = Image.fromarray(image[0, 0].numpy()).resize(size[::-1], Image.Resampling.BICUBIC)
        ours = resize(image, size)[0, 0]
        torch.testing.assert_close(ours, torch.from_numpy(np.array(theirs)).clamp(0, 1), rtol=0, atol=1e-5)


def test_alpha_is_enlarged_apart_and_put_back():
    image = picture(1, 4, 8, 8)
    prepared = prepare_lr(image, scale=4)
    out = finish(torch.zeros_like(prepared.pixels), prepared)
    assert torch.equal(out[:, 3:], resize(image[:, 3:], (32, 32))) and out[:, :3].max() == 0
    opaque = prepare_lr(image[:, :3], scale=4)
    assert torch.equal(opaque.pixels, prepared.pixels)  # colours do not depend on alpha


def test_grey_is_three_equal_channels_inside():
    prepared = prepare_lr(picture(1, 1, 8, 8), scale=2)
    assert prepared.grey and torch.equal(prepared.pixels[:, 0], prepared.pixels[:, 2])
    tinted = torch.tensor([0.2, 0.3, 0.7]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    torch.testing.assert_close(finish(tinted, prepared), torch.full((1, 1, 16, 16), 0.4))


def test_a_batch_equals_its_singles():
    image = picture(3, 4, 9, 14)
    both = prepare_lr(image, scale=4, min_short_side=64)
    for b in range(3):
        single = prepare_lr(image[b : b + 1], scale=4, min_short_side=64)
        torch.testing.assert_close(single.pixels, both.pixels[b : b + 1])


@pytest.mark.parametrize(
    "image, reason",
    [
        (torch.full((1, 3, 4, 4), float("nan")), "NaN"),
        (torch.full((1, 3, 4, 4), float("inf")), "infinity"),
        (torch.full((1, 3, 4, 4), 128.0), "128"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "uint8"),
        (torch.zeros(3, 4, 4), "shape"),
        (torch.zeros(1, 5, 4, 4), "shape"),
        (torch.zeros(1, 3, 0, 4), "shape"),
        (torch.zeros(0, 3, 4, 4), "shape"),
    ],
)
def test_what_is_no_picture_is_refused_with_the_reason(image, reason):
    with pytest.raises(ValueError, match=reason):
        prepare_lr(image, scale=4)


def test_wrong_targets_and_results_are_refused():
    image = picture(1, 3, 8, 8)
    for arguments in ({"scale": 0}, {"scale": float("nan")}, {"size": (0, 8)}, {"scale": 2, "size": (8, 8)}):
        with pytest.raises(ValueError, match=r"scale|target"):
            prepare_lr(image, **arguments)
    with pytest.raises(ValueError, match="expected the prepared size"):
        finish(picture(1, 3, 7, 7), prepare_lr(image, scale=2))


def test_comfy_layout():
    image = picture(2, 5, 7, 4)
    assert from_comfy(image).shape == (2, 4, 5, 7)
    assert torch.equal(to_comfy(from_comfy(image)), image)
    assert to_comfy(torch.full((1, 3, 2, 2), 1.2)).max() == 1
    with pytest.raises(ValueError, match=r"\(B, H, W, C\)"):
        from_comfy(picture(5, 7, 3))


# ---- files

RGB = (picture(20, 30, 3, seed=3) * 255).byte().numpy()


def test_modes_keep_their_channels_and_values(tmp_path):
    rgba = np.concatenate([RGB, RGB[..., :1]], axis=2)
    for mode, array in (("L", RGB[..., 0]), ("LA", rgba[..., 2:]), ("RGB", RGB), ("RGBA", rgba)):
        Image.fromarray(array).save(tmp_path / "a.png")
        image = read_image(tmp_path / "a.png")
        assert image.dtype == torch.float32
        assert np.array_equal(bytes_of(image).reshape(array.shape), array), mode


def test_bilevel_palette_and_cmyk(tmp_path):
    Image.fromarray(RGB[..., 0] > 127).save(tmp_path / "bits.png")
    assert set(read_image(tmp_path / "bits.png").unique().tolist()) == {0.0, 1.0}

    palette = Image.fromarray(RGB).quantize(16)
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(bytes_of(read_image(tmp_path / "palette.png")), np.array(palette.convert("RGB")))
    palette.save(tmp_path / "clear.png", transparency=3)
    clear = read_image(tmp_path / "clear.png")
    assert clear.shape == (1, 4, 20, 30)
    assert np.array_equal(clear[0, 3].numpy() == 0, np.array(palette) == 3)

    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cyan.jpg", quality=100)
    cyan = read_image(tmp_path / "cyan.jpg")[0, :, 4, 4]
    torch.testing.assert_close(cyan, torch.tensor([0.0, 1, 1]), rtol=0, atol=0.02)


def test_sixteen_bits_are_all_read(tmp_path):
    values = (np.arange(600, dtype=np.uint16) * 109).reshape(20, 30)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image.shape == (1, 1, 20, 30)
        assert np.array_equal((image[0, 0].double().numpy() * 65535).round(), values)


def test_float_tiff_must_be_in_range(tmp_path):
    for value, reason in ((0.25, None), (80.0, "80"), (float("nan"), "nan")):
        Image.fromarray(np.full((4, 5), value, np.float32)).save(tmp_path / "f.tif")
        if reason is None:
            assert torch.equal(read_image(tmp_path / "f.tif"), torch.full((1, 1, 4, 5), 0.25))
        else:
            with pytest.raises(ValueError, match=rf"f\.tif holds floats from {reason}"):
                read_image(tmp_path / "f.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = Image.fromarray(RGB)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's Transpose that stores the picture turned
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(bytes_of(read_image(tmp_path / "turned.png")), RGB)


def test_the_first_frame_of_an_animation_counts(tmp_path):
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "lime", "blue")]
    for name in ("a.gif", "a.png", "a.tif", "a.webp"):
        lossless = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **lossless)
        assert read_image(tmp_path / name)[0, :3, 1, 1].tolist() == [1, 0, 0], name


def test_broken_files_are_named(tmp_path):
    Image.fromarray(RGB).resize((300, 200)).save(tmp_path / "whole.jpg", quality=95)
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(RGB).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, reason in (("cut.jpg", "cut off"), ("cut.png", "cut off"), ("text.png", "not a"), ("empty.png", "not a")):
        with pytest.raises(ValueError, match=rf"{name}.* {reason}"):
            read_image(tmp_path / name)
    for missing in (tmp_path / "none.png", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file"):
            read_image(missing)


@pytest.mark.parametrize("name, tolerance", [("a.png", 0), ("a.tif", 0), ("a.PNG", 0), ("a.webp", 25), ("a.jpg", 25)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_written_pictures_read_back(tmp_path, name, tolerance, channels):
    smooth = torch.linspace(0, 1, 24 * 32).reshape(1, 1, 24, 32)
    image = torch.cat([smooth, smooth.flip(-1), smooth.flip(-2), smooth.sqrt()], dim=1)[:, :channels]
    if name == "a.jpg" and channels in (2, 4):
        with pytest.raises(ValueError, match="JPEG holds no transparency"):
            write_image(tmp_path / name, image)
        assert not os.listdir(tmp_path)
        return
    write_image(tmp_path / name, image)
    again = read_image(tmp_path / name)
    if name == "a.webp" and channels < 3:  # WebP has no grey
        again = torch.cat([again[:, :1], again[:, 3:]], dim=1)
    assert again.shape == image.shape
    assert (again - (image * 255).round() / 255).abs().max() * 255 <= tolerance
    assert os.listdir(tmp_path) == [name]


def test_metadata(tmp_path):
    metadata = {"fourfold": '{"seed": 1}', "prompt": "größer, 高い"}
    write_image(tmp_path / "a.png", picture(1, 3, 4, 4), metadata)
    assert Image.open(tmp_path / "a.png").text == metadata
    for name in ("a.jpg", "a.webp", "a.tif"):
        write_image(tmp_path / name, picture(1, 3, 4, 4), metadata)
        description = Image.open(tmp_path / name).getexif()[0x010E]
        assert json.loads(description) == metadata


def test_an_existing_file_is_replaced_or_left_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_image(path, torch.zeros(1, 3, 4, 4))
    write_image(path, torch.ones(1, 3, 4, 4))
    before = path.read_bytes()
    assert read_image(path).min() == 1

    def fail(self, target, **options):
        with open(target, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        write_image(path, torch.zeros(1, 3, 4, 4))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_what_cannot_be_written_is_refused(tmp_path):
    image = picture(1, 3, 4, 4)
    for name, bad, error, reason in (
        ("a.bmp", image, ValueError, "suffix '.bmp'; expected one of .png"),
        ("a.png", image.repeat(2, 1, 1, 1), ValueError, "2 pictures"),
        ("a.png", image * float("nan"), ValueError, "NaN"),
        ("none/a.png", image, FileNotFoundError, "none does not exist"),
        ("a.webp", torch.zeros(1, 1, 1, 20000), ValueError, "WEBP file cannot hold"),
    ):
        with pytest.raises(error, match=reason):
            write_image(tmp_path / name, bad)
    with pytest.raises(ValueError, match="JPEG file cannot hold"):
        write_image(tmp_path / "a.jpg", image, {"workflow": "x" * 70000})
    assert not os.listdir(tmp_path)


# ---- sheet


def test_sheet_shows_both_pictures_under_their_labels():
    before, after = picture(2, 3, 30, 40, seed=1), picture(2, 3, 60, 120, seed=2)
    sheet = side_by_side(before, after, ("LR", "DiT4SR"))
    assert sheet.shape[:2] == (2, 3) and sheet.shape[-1] == 80 + 4 + 120
    strip = sheet.shape[-2] - 60
    assert strip > 10
    torch.testing.assert_close(sheet[..., strip:, 84:], after, rtol=0, atol=1 / 255)
    enlarged = before.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(sheet[..., strip:, :80], enlarged, rtol=0, atol=1 / 255)
    for panel in (sheet[..., :strip, :80], sheet[..., :strip, 84:]):
        assert panel.max() > 0.9 and panel.median() < 0.2  # bright letters on dark


def test_sheet_of_odd_pictures():
    sheet = side_by_side(picture(1, 1, 1, 1), torch.zeros(1, 4, 3, 3), ("a long label", "b"))
    assert sheet.shape[1] == 3 and sheet.shape[-1] > 60
    assert (sheet[0, :, -1] == 1).all(0).sum() == 3  # the transparent pixels show white
    with pytest.raises(ValueError, match="2 and 1 pictures"):
        side_by_side(picture(2, 3, 4, 4), picture(1, 3, 4, 4))
