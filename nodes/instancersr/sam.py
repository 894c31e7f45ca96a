"""Instances by the Segment Anything Model (Kirillov et al. 2023), through the package segment-anything.

    segment = SamInstances(load_sam("sam_vit_h_4b8939.pth"))
    labels = segment(images)[0]                 # (H, W), 0 = no instance

Only training and the node *SAM Instances* need it; drawing pictures does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common import checkpoints
from ..common.images import checked
from .instances import labels_of_masks

PAGE = "https://github.com/facebookresearch/segment-anything#model-checkpoints"
_WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}  # of the image encoder
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of a picture in 0..255


@dataclass(frozen=True)
class SamSettings:
    """How masks are found; the defaults are those of SamAutomaticMaskGenerator."""

    points_per_side: int = 32  # of the grid of prompts; cost grows with its square
    points_per_batch: int = 64  # prompts at a time
    pred_iou_thresh: float = 0.88  # masks that SAM thinks worse of are dropped
    stability_score_thresh: float = 0.95  # so are masks that change with the threshold
    box_nms_thresh: float = 0.7  # overlap of boxes from which two masks are the same one
    crop_n_layers: int = 0  # also look at 4, 16, ... crops of the picture
    min_area: int = 64  # not in the paper: pixels, instances that show less are left out

    @property
    def decoder_calls(self) -> int:
        """How often SAM's mask decoder is called for a picture: once for each batch of prompts in each crop."""
        crops = sum(4**layer for layer in range(self.crop_n_layers + 1))
        return crops * math.ceil(self.points_per_side**2 / self.points_per_batch)


class SamInstances:
    """Pictures -> label maps.

    Args:
        model: `segment_anything.modeling.Sam`, on the device that it is to run on.
        settings: see `SamSettings`.
    """

    def __init__(self, model: nn.Module, settings: SamSettings | None = None):
        self.model, self.settings = model, settings or SamSettings()

    def __call__(self, images: Tensor, on_image: Callable[[int, int], None] | None = None) -> list[Tensor]:
        """Finds the instances; overlapping masks are painted from the largest to the smallest.

        Args:
            images: (B, C, H, W) in 0..1, C 1 to 4; alpha is not seen.
            on_image: on_image(done, total) after each picture; may raise to stop.
        Returns: (H, W) int64 on the CPU each, 0 = no instance, 1 = the largest one, and so on.
        """
        from segment_anything import SamAutomaticMaskGenerator

        chosen = asdict(self.settings)
        min_area = chosen.pop("min_area")
        generator = SamAutomaticMaskGenerator(self.model, **chosen)
        images = checked(images)
        images = images[:, :3] if images.shape[1] > 2 else images[:, :1].expand(-1, 3, -1, -1)
        found = []
        for done, image in enumerate(images, start=1):
            pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
            masks = [mask["segmentation"] for mask in generator.generate(pixels)]
            found.append(labels_of_masks(masks, pixels.shape[:2], min_area))
            if on_image is not None:
                on_image(done, len(images))
        return found


def load_sam(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Loads a published SAM checkpoint (ViT-B, ViT-L or ViT-H); its size is read off its shapes.

    Args:
        path: .pth or .safetensors file.
    Raises: FileNotFoundError that says where it comes from; WrongFileError, CorruptCheckpointError,
        MismatchedKeysError.
    """
    path = Path(path).expanduser()
    checkpoints.require_file(path, "the Segment Anything checkpoint", str(path.parent), PAGE)
    size = sam_size(path)
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        model = sam_model_registry[size](checkpoint=None)
    checkpoints.load_strict(model, checkpoints.load_state(path), source=path)
    for name, values in (("pixel_mean", _MEAN), ("pixel_std", _STD)):  # not in the file
        model.register_buffer(name, torch.tensor(values, device="cpu")[:, None, None], persistent=False)
    return model.to(device).eval().requires_grad_(False)


def sam_size(path: str | Path) -> str:
    """Which SAM a checkpoint holds, from its header: "vit_b", "vit_l" or "vit_h".

    Raises: WrongFileError, CorruptCheckpointError; ValueError for a SAM of another size (MobileSAM, say).
    """
    header = checkpoints.read_header(path)
    hint = f"Choose sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth or sam_vit_h_4b8939.pth from {PAGE}."
    checkpoints.require_family(header, "sam", path, hint)
    _, shape = header.tensors.get("image_encoder.pos_embed", ("", (0,)))
    if shape[-1] not in _WIDTHS:
        raise ValueError(f"{path} has an image encoder of shape {shape}, which is no SAM of known size. {hint}")
    return _WIDTHS[shape[-1]]
