"""The vision encoder: transformers' folder and the tiny file, and what becomes of a picture before the network."""

import json

import pytest
import torch
from fourfold.nodes.common import tiny
from fourfold.nodes.common.checkpoints import read_header
from fourfold.nodes.common.errors import MismatchedKeysError, WrongFileError
from fourfold.nodes.common.vision import Preprocessing, VisionEncoder
from PIL import Image
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig
from transformers import Dinov2WithRegistersModel as WithRegisters

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=70)
CROPS = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "resample": 3,
         "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True,
         "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small DINOv2 as transformers writes it."""
    path = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SIZES)).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(CROPS))
    return path


@pytest.fixture(scope="module")
def dino(folder):
    return VisionEncoder.from_pretrained(folder)


@pytest.fixture
def small():
    """A small network for pictures of 32 px in patches of 8."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=32)
    return VisionEncoder.new(sizes, Preprocessing(resize=32, crop=32)).eval().requires_grad_(False)


def picture(height, width, seed=0, batch=1):
    """A smooth picture of whole grey levels, as a file holds them."""
    coarse = torch.rand(batch, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (image * 255).round() / 255


@pytest.mark.parametrize("size", [(90, 131), (200, 77), (33, 40), (64, 64)])
def test_crop_is_that_of_dinov2s_image_processor(folder, dino, size):
    """To a grey level: the published processor resizes in 8 bits, rows first and then columns."""
    image = picture(*size)
    as_file = Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())
    theirs = BitImageProcessorPil(**CROPS)(as_file, return_tensors="pt").pixel_values
    ours = dino.normalise(dino.squares(image)[0])
    assert (ours - theirs).abs().max() < 1.1 / 255 / min(CROPS["image_std"])
    tokens = dino.encode(image)
    assert tokens.shape == (1, 17, 16)
    torch.testing.assert_close(tokens, dino.network(pixel_values=ours).last_hidden_state)


def test_preprocessing_is_the_folders_or_dinov2s(folder, dino, tmp_path):
    assert dino.preprocessing == Preprocessing(64, 56)
    assert Preprocessing.from_json({}) == Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert Preprocessing.from_json({"size": 100, "crop_size": 98}) == Preprocessing(100, 98)
    with pytest.raises(ValueError, match="a multiple of the network's patch of 14 px and not larger"):
        VisionEncoder(dino.network, Preprocessing(64, 60))


def test_null_features_are_those_of_the_zero_normalised_picture(dino):
    null = dino.null_features(2)
    zero = dino.network(pixel_values=torch.zeros(1, 3, 56, 56)).last_hidden_state
    assert null.shape == (2, 17, 16) and torch.equal(null[1:], zero) and zero.any()
    mean = torch.tensor(dino.preprocessing.mean)[:, None, None].expand(1, 3, 56, 56)
    torch.testing.assert_close(dino.encode(mean), zero, rtol=1e-3, atol=1e-4)


def test_squeeze_and_tile_see_the_ends(dino):
    image = picture(60, 240)
    ends = image.clone()
    ends[..., :20], ends[..., -20:] = 0, 1
    assert torch.equal(dino.encode(image), dino.encode(ends)), "the crop does not"
    for fit, tokens in (("squeeze", 17), ("tile", 1 + 4 * 16)):
        assert dino.encode(image, fit).shape == (1, tokens, 16)
        assert not torch.allclose(dino.encode(image, fit), dino.encode(ends, fit), atol=1e-3)
    squares = dino.squares(image, "tile")
    assert squares.shape == (4, 1, 3, 56, 56) and torch.equal(squares[0, ..., :], dino.squares(image, "tile")[0])
    tall = dino.squares(image.transpose(2, 3), "tile")
    torch.testing.assert_close(tall, squares.transpose(3, 4))
    each = torch.stack([dino(square) for square in squares])
    torch.testing.assert_close(dino.encode(image, "tile")[:, 0], each[:, :, 0].mean(dim=0))
    torch.testing.assert_close(dino.encode(image, "tile")[:, 17:33], each[1, :, 1:])
    square = picture(56, 56)
    torch.testing.assert_close(dino.encode(square, "tile"), dino.encode(square, "squeeze"))


def test_any_picture(small):
    for shape in ((1, 1, 1, 1), (2, 3, 1, 700), (1, 4, 50, 33), (1, 2, 5, 8)):
        for fit in ("crop", "squeeze", "tile"):
            tokens = small.encode(torch.rand(shape), fit)
            assert tokens.shape[0] == shape[0] and tokens.isfinite().all()
    grey = torch.rand(1, 1, 40, 40)
    torch.testing.assert_close(small.encode(grey), small.encode(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match="fit is 'stretch'; choose one of crop, squeeze, tile"):
        small.encode(grey, "stretch")
    with pytest.raises(ValueError, match=r"expected floats in 0\.\.1"):
        small.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_a_batch_equals_singles(small):
    batch = picture(40, 60, batch=2)
    torch.testing.assert_close(small.encode(batch), torch.cat([small.encode(one[None]) for one in batch]))


def test_patches_lie_on_their_grid(small):
    image = torch.zeros(1, 3, 32, 32)
    marked = image.clone()
    marked[..., 8:16, 24:32] = 1  # row 1, column 3
    moved = (small.patches(marked) - small.patches(image)).norm(dim=-1)[0]
    assert moved.shape == (4, 4) and divmod(int(moved.argmax()), 4) == (1, 3)
    assert small.patches(picture(50, 70), size=(6, 8)).shape == (1, 6, 8, 16)


def test_registers_are_no_patches(tmp_path):
    config = Dinov2WithRegistersConfig(num_register_tokens=3, **SIZES)
    torch.manual_seed(0)
    WithRegisters(config).save_pretrained(tmp_path)
    encoder = VisionEncoder.from_pretrained(tmp_path)
    assert encoder.registers == 3 and encoder.preprocessing.crop == 224
    image = picture(28, 42)
    tokens = encoder(encoder.normalise(image) * 0 + image)
    assert tokens.shape == (1, 1 + 3 + 6, 16)
    torch.testing.assert_close(encoder.patches(image, (2, 3)).flatten(1, 2), tokens[:, 4:])


def test_gradients_reach_the_picture(small):
    image = picture(40, 40).requires_grad_()
    small.encode(image).square().sum().backward()
    assert image.grad.abs().sum() > 0


def test_tiny_file_describes_itself(small, tmp_path):
    path = tmp_path / "vision.safetensors"
    small.save(path, step=7, training={"crop": 32})
    loaded, image = VisionEncoder.from_pretrained(path), picture(40, 40)
    assert torch.equal(loaded.encode(image), small.encode(image))
    assert loaded.preprocessing == small.preprocessing and loaded.width == 16 and loaded.patch == 8
    header = read_header(path)
    assert header.method == "vision" and header.step == 7 and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert VisionEncoder.from_pretrained(path, torch.bfloat16).encode(image).dtype == torch.bfloat16


def test_what_is_no_encoder_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"DINOv2 is missing: .*huggingface\.co/facebook/dinov2-large"):
        VisionEncoder.from_pretrained(tmp_path / "nothing")
    with pytest.raises(WrongFileError, match="codec, but"):
        VisionEncoder.from_pretrained(tiny.tiny_checkpoint("codec"))
    broken = tmp_path / "broken"
    broken.mkdir()
    network = Dinov2Model(Dinov2Config(**SIZES))
    network.save_pretrained(broken)
    del network.encoder.layer[1]
    network.save_pretrained(broken, state_dict=network.state_dict())
    content = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 2}))
    with pytest.raises(MismatchedKeysError, match=r"layer\.1"):
        VisionEncoder.from_pretrained(broken)
