"""DINOv2 as the methods use it: pictures in 0..1 in, tokens out; full size from a folder, tiny from one file.

    dino = VisionEncoder.from_pretrained("dinov2-large")          # transformers' folder, or a file of the tiny family
    tokens = dino.encode(pictures)                                # (B, 1 + N, C), class token first
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersModel

from . import checkpoints
from .dinov2_shapes import config_from_shapes
from .images import checked, resize
from .pretrained import fill_pretrained, load_pretrained, require_model_folder

Fit = Literal["crop", "squeeze", "tile"]
FITS = ("crop", "squeeze", "tile")
PAGE = "https://huggingface.co/facebook/dinov2-large"
_MODELS = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}
_LONGEST = 16  # windows along the long side of a tiled picture, at most; a longer one is squeezed to that
_MARGIN = 4  # a picture's centre of this many short sides is all that its centre crop depends on


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of a picture before the network sees it; the defaults are DINOv2's."""

    resize: int = 256  # pixels, the short side before the crop
    crop: int = 224  # pixels, side of the square that the network sees, a multiple of its patch
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of a picture in 0..1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives lists

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Preprocessing:
        """Reads the content of a preprocessor_config.json; what it does not say is DINOv2's."""
        size, crop = content.get("size", {}), content.get("crop_size", {})
        return cls(
            resize=size.get("shortest_edge", cls.resize) if isinstance(size, Mapping) else size,
            crop=crop.get("height", cls.crop) if isinstance(crop, Mapping) else crop,
            mean=content.get("image_mean", cls.mean),
            std=content.get("image_std", cls.std),
        )


class VisionEncoder(nn.Module):
    """DINOv2 (Oquab et al. 2023), with or without registers, and its preprocessing in torch: gradients pass through.

    Args:
        network: transformers' model.
        preprocessing: sizes in pixels and the normalisation.
    Raises: ValueError if the crop is no multiple of the network's patch.
    """

    def __init__(self, network: Dinov2Model | Dinov2WithRegistersModel, preprocessing: Preprocessing | None = None):
        super().__init__()
        self.network, self.preprocessing = network, preprocessing or Preprocessing()
        if self.preprocessing.crop % self.patch or self.preprocessing.crop > self.preprocessing.resize:
            raise ValueError(
                f"the crop is {self.preprocessing.crop} px of a short side of {self.preprocessing.resize} px; it must "
                f"be a multiple of the network's patch of {self.patch} px and not larger than the short side."
            )

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.network.config.hidden_size

    @property
    def patch(self) -> int:
        """Pixels, side of a patch."""
        return self.network.config.patch_size

    @property
    def registers(self) -> int:
        """Register tokens between the class token and the patches."""
        return getattr(self.network.config, "num_register_tokens", 0)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def encode(self, images: Tensor, fit: Fit = "crop") -> Tensor:
        """The network's last hidden state, class token first.

        Args:
            images: (B, C, H, W) in 0..1, C 1 to 4, any size; alpha is not seen.
            fit: "crop" as DINOv2's image processor: the centre square of the picture. not in the paper: "squeeze" the
                whole picture to the square; "tile" squares side by side along the long side, so that its ends are seen
                undistorted: the class token is the mean, the patches (and registers) of all squares follow each other.
        Returns: (B, 1 + N, C), N patches (and registers), times the number of squares with "tile"; the network's dtype.
        Raises: ValueError for another `fit` or images of another shape.
        """
        squares = self.squares(images, fit)
        count, batch = squares.shape[:2]
        tokens = self(squares.flatten(0, 1)).unflatten(0, (count, batch))
        if count == 1:
            return tokens[0]
        return torch.cat([tokens[:, :, :1].mean(dim=0), *tokens[:, :, 1:].unbind(0)], dim=1)

    def null_features(self, batch: int = 1) -> Tensor:
        """Tokens of the all-zero *normalised* picture, InstantIR's "no picture": (batch, 1 + N, C)."""
        side = self.preprocessing.crop
        zero = torch.zeros(1, 3, side, side, device=self.device, dtype=self.dtype)
        return self.network(pixel_values=zero).last_hidden_state.expand(batch, -1, -1)

    def patches(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Patch tokens on their grid, without class and register tokens.

        Args:
            images: (B, C, H, W) in 0..1.
            size: (h, w) of the grid; the whole picture is resized to h x w patches. None = the crop's own grid.
        Returns: (B, h, w, C), the network's dtype.
        """
        height, width = size or (self.preprocessing.crop // self.patch,) * 2
        pixels = resize(_rgb(images), (height * self.patch, width * self.patch))
        return self(pixels)[:, 1 + self.registers :].unflatten(1, (height, width))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1, sides multiples of the patch -> last hidden state (B, 1 + N, C)."""
        return self.network(pixel_values=self.normalise(pixels)).last_hidden_state

    def normalise(self, pixels: Tensor) -> Tensor:
        """(pixels - mean) / std, in the network's dtype and on its device."""
        pixels = pixels.to(self.device, torch.float32)
        mean, std = (pixels.new_tensor(x)[:, None, None] for x in (self.preprocessing.mean, self.preprocessing.std))
        return ((pixels - mean) / std).to(self.dtype)

    def squares(self, images: Tensor, fit: Fit = "crop") -> Tensor:
        """The squares that the network sees, not yet normalised: (K, B, 3, crop, crop), K = 1 unless `fit` is tile."""
        if fit not in FITS:
            raise ValueError(f"fit is {fit!r}; choose one of {', '.join(FITS)}.")
        images, sizes = _rgb(images), self.preprocessing
        if fit == "squeeze":
            return resize(images, (sizes.crop, sizes.crop))[None]
        if fit == "crop":
            images = _centre(images, _MARGIN * min(images.shape[-2:]))
            images = resize(images, _short_side(images, sizes.resize))
            return _centre(images, sizes.crop)[None]
        height, width = (min(side, _LONGEST * sizes.crop) for side in _short_side(images, sizes.crop))
        images, count = resize(images, (height, width)), math.ceil(max(height, width) / sizes.crop)
        starts = [round(i * (max(height, width) - sizes.crop) / max(count - 1, 1)) for i in range(count)]
        return torch.stack([images.narrow(-2 if height > width else -1, start, sizes.crop) for start in starts])

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = None) -> VisionEncoder:
        """Loads a DINOv2 as transformers writes it, or a file of the tiny family. Nothing is downloaded.

        Args:
            path: the folder (config.json, weights, preprocessor_config.json); its weights alone in one file, which
                are then taken for a published DINOv2 (heads of 64, its preprocessing); or a file of the tiny family.
            dtype: of the weights; None = float32.
        Raises: FileNotFoundError that says what is missing and where it comes from; WrongFileError,
            CorruptCheckpointError, MismatchedKeysError.
        """
        path = Path(path).expanduser()
        return cls._from_file(path, dtype) if path.is_file() else cls._from_folder(path, dtype)

    @classmethod
    def _from_folder(cls, folder: Path, dtype: torch.dtype | None) -> VisionEncoder:
        require_model_folder(folder, "DINOv2", PAGE)
        checkpoints.require_family(checkpoints.read_header(folder), "dinov2", folder, f"Choose the folder of {PAGE}.")
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind not in _MODELS:
            raise ValueError(f"{folder}/config.json is of a {kind!r}; {' or '.join(_MODELS)} is expected ({PAGE}).")
        described = folder / "preprocessor_config.json"
        content = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
        network = load_pretrained(_MODELS[kind], folder, dtype or torch.float32)
        return cls(network, Preprocessing.from_json(content)).eval()

    @classmethod
    def _from_file(cls, path: Path, dtype: torch.dtype | None) -> VisionEncoder:
        header = checkpoints.read_header(path)
        hint = f"Choose a DINOv2 ({PAGE}) or the tiny family's vision.safetensors."
        family = checkpoints.require_family(header, ("dinov2", "vision"), path, hint)
        if family == "dinov2":
            config = config_from_shapes({name: shape for name, (_, shape) in header.tensors.items()})
            state = checkpoints.load_state(path)
            return cls(fill_pretrained(_MODELS[config.model_type], config, state, path, dtype or torch.float32)).eval()
        encoder = cls.new(header.config["network"], Preprocessing(**header.config["preprocessing"]))
        state = {name: value.float() for name, value in checkpoints.load_state(path).items()}
        checkpoints.load_strict(encoder.network, state, source=path)
        return encoder.to(dtype or torch.float32).eval().requires_grad_(False)

    @classmethod
    def new(cls, config: Mapping[str, Any], preprocessing: Preprocessing) -> VisionEncoder:
        """A network with random weights; `config` holds the fields of transformers' Dinov2Config."""
        return cls(Dinov2Model(Dinov2Config(**config)), preprocessing)

    def save(self, path: str | Path, state: dict[str, Tensor] | None = None, **summary: Any) -> None:
        """Writes one file that describes itself.

        Args:
            state: other weights of `network` than its own (an EMA, say).
            summary: step, licence, training and dtype for `checkpoints.save_checkpoint`.
        """
        described = self.network.config.to_diff_dict()
        config = {name: value for name, value in described.items() if name not in ("transformers_version", "dtype")}
        config = {"network": config, "preprocessing": asdict(self.preprocessing)}
        checkpoints.save_checkpoint(path, state or self.network.state_dict(), method="vision", config=config, **summary)


def _rgb(images: Tensor) -> Tensor:
    """(B, C, H, W) with C 1 to 4 -> (B, 3, H, W), without alpha."""
    images = checked(images)
    return images[:, :3] if images.shape[1] > 2 else images[:, :1].expand(-1, 3, -1, -1)


def _short_side(images: Tensor, short: int) -> tuple[int, int]:
    """Size (h, w) with a short side of `short` px; the long one is rounded down, as DINOv2's image processor does."""
    height, width = images.shape[-2:]
    return (short, short * width // height) if height <= width else (short * height // width, short)


def _centre(images: Tensor, side: int) -> Tensor:
    """The centre of the pictures, at most `side` px in each direction."""
    for axis in (-2, -1):
        kept = min(side, images.shape[axis])
        images = images.narrow(axis, (images.shape[axis] - kept) // 2, kept)
    return images
