"""The nodes that hand out instances: found by SAM in a picture, or read from the map that InstanceRSR draws."""

import logging
from pathlib import Path

import torch
from comfy_api.latest import io, ui

from ..common import tiny
from ..common.frames import Frame
from ..common.host.files import SAM_FOLDER, find_model, fingerprint, list_models
from ..common.host.models import HostedModel, host, on_device, require_method
from ..common.host.progress import bar_of_calls
from ..common.images import from_comfy, to_comfy, unpad
from .instances import instance_masks, resize_labels
from .palette import colorize, labels_of_map
from .sam import PAGE, SamInstances, SamSettings, load_sam, sam_size

log = logging.getLogger("fourfold")

CATEGORY = "Fourfold/InstanceRSR"
SAM_FOLDERS = (SAM_FOLDER, "fourfold")
_TINY = set(tiny.FILES.values())  # the tiny family, none of which is a SAM
SAMModel = io.Custom("FOURFOLD_SAM")  # HostedModel
FrameSocket = io.Custom("FOURFOLD_FRAME")  # Frame, of LR Prepare
GREYS = 255  # labels that a grey picture of 8 bits can tell apart


def find_sam(name: str) -> Path:
    """The chosen SAM, found to be one from its header.

    Raises: FileNotFoundError, CorruptCheckpointError, WrongFileError, ValueError.
    """
    path = find_model(name, SAM_FOLDERS, "the Segment Anything checkpoint", PAGE)
    sam_size(path)
    return path


class SAMLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldSAMLoader",
            display_name="SAM Loader",
            category=CATEGORY,
            description="Loads Segment Anything (ViT-B, ViT-L or ViT-H), which finds the instances of a picture. "
            "InstanceRSR itself needs it for training only.",
            inputs=[
                io.Combo.Input("checkpoint", options=[name for name in list_models(SAM_FOLDERS) if name not in _TINY],
                               tooltip="sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth or sam_vit_h_4b8939.pth, from "
                               "models/sams or models/fourfold."),
            ],
            outputs=[SAMModel.Output("sam", display_name="sam", tooltip="For SAM Instances.")])

    @classmethod
    def validate_inputs(cls, checkpoint=None) -> bool | str:
        try:
            if checkpoint is not None:  # None: the name comes over a link
                find_sam(checkpoint)
        except (OSError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, checkpoint=None) -> str:
        return fingerprint(find_sam(checkpoint)) if checkpoint else ""

    @classmethod
    def execute(cls, checkpoint) -> io.NodeOutput:
        return io.NodeOutput(host(load_sam(find_sam(checkpoint)), "sam"))


class SAMInstances(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldSAMInstances",
            display_name="SAM Instances",
            category=CATEGORY,
            description="Finds the instances of a picture with Segment Anything. The preview has the colours that "
            "InstanceRSR draws its maps in.",
            inputs=[
                SAMModel.Input("sam", tooltip="From SAM Loader."),
                io.Image.Input("image", tooltip="The picture, or a batch; alpha is not seen."),
                io.Int.Input("points_per_side", default=32, min=1, max=128,
                             tooltip="Side of the grid of points that SAM is asked about: more find smaller instances. "
                             "The time grows with the square."),
                io.Int.Input("points_per_batch", default=64, min=1, max=1024,
                             tooltip="Points at a time; fewer need less memory."),
                io.Float.Input("pred_iou_thresh", default=0.88, min=0.0, max=1.0, step=0.01,
                               tooltip="Masks that SAM itself thinks worse of are dropped."),
                io.Float.Input("stability_score_thresh", default=0.95, min=0.0, max=1.0, step=0.01,
                               tooltip="Masks that change more with SAM's threshold are dropped."),
                io.Float.Input("box_nms_thresh", default=0.7, min=0.0, max=1.0, step=0.01,
                               tooltip="Two masks whose boxes overlap by more count as one."),
                io.Int.Input("crop_n_layers", default=0, min=0, max=3,
                             tooltip="Also look at 4, 16, ... parts of the picture by themselves, for small instances; "
                             "each layer takes 4 times as long as the one before."),
                io.Int.Input("min_area", default=64, min=1, max=2**24,
                             tooltip="Pixels; instances that show less are left out."),
                io.Int.Input("max_masks", default=100, min=0, max=2**16,
                             tooltip="Masks of a picture, the largest instances first; 0 = all. Each takes as much "
                             "memory as a grey picture."),
            ],
            outputs=[
                io.Image.Output("label_map", display_name="label_map",
                                tooltip="One grey for each instance: 255 times its value is the number, 1 = the "
                                "largest, black = none."),
                io.Mask.Output("masks", display_name="masks", is_output_list=True,
                               tooltip="One mask for each instance, the largest first; a batch for each picture."),
                io.Image.Output("preview", display_name="preview", tooltip="Every instance in a colour of its own."),
            ],
            is_output_node=True)

    @classmethod
    def execute(cls, sam, image, max_masks, **settings) -> io.NodeOutput:
        chosen, pixels = SamSettings(**settings), from_comfy(image)
        require_method(sam, "sam", "SAM Instances")
        with (on_device(sam, _working_memory(sam, chosen, pixels)) as network,
              bar_of_calls(network.mask_decoder, len(pixels) * chosen.decoder_calls)):
            labels = SamInstances(network, chosen)(pixels)
        return _outputs(torch.stack(labels), max_masks, cls)


def _working_memory(model: HostedModel, settings: SamSettings, pixels: torch.Tensor) -> float:
    """Bytes that SAM needs beside the weights: three copies of a block's global attention, or three masks for each
    prompt at SAM's size and at the picture's, as numbers and their comparisons."""
    encoder = model.network.image_encoder
    tokens = encoder.pos_embed.shape[1] * encoder.pos_embed.shape[2]
    attention = 3 * encoder.blocks[0].attn.num_heads * tokens**2
    masks = 3 * settings.points_per_batch * (encoder.img_size**2 + 2 * pixels.shape[-2] * pixels.shape[-1])
    return 4.0 * max(attention, masks)


class InstanceMapDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldInstanceMapDecode",
            display_name="Instance Map Decode",
            category=CATEGORY,
            description="Reads the instances off a decoded instance map: nearest colours, cleaned, then connected "
            "areas.",
            inputs=[
                io.Image.Input("image", tooltip="VAE Decode of the sampler's map."),
                io.Int.Input("min_area", default=64, min=1, max=2**24,
                             tooltip="Pixels of the decoded map; smaller spots are noise and go to what they lie in."),
                io.Int.Input("max_masks", default=100, min=0, max=2**16,
                             tooltip="Masks of a picture, the largest instances first; 0 = all. Each takes as much "
                             "memory as a grey picture."),
                FrameSocket.Input("frame", optional=True,
                                  tooltip="From the LR Prepare that the picture went through: the instances then have "
                                  "exactly the target size, as the picture from Color Fix."),
            ],
            outputs=[
                io.Image.Output("label_map", display_name="label_map",
                                tooltip="One grey for each instance: 255 times its value is the number, 1 = the "
                                "largest, black = none."),
                io.Mask.Output("masks", display_name="masks", is_output_list=True,
                               tooltip="One mask for each instance, the largest first; a batch for each picture."),
                io.Image.Output("preview", display_name="preview", tooltip="Every instance in a colour of its own."),
            ],
            is_output_node=True)

    @classmethod
    def execute(cls, image, min_area, max_masks, frame: Frame | None = None) -> io.NodeOutput:
        pixels = from_comfy(image)
        pixels = pixels[:, :3] if pixels.shape[1] > 1 else pixels.expand(-1, 3, -1, -1)
        if frame is None:
            return _outputs(labels_of_map(pixels, min_area), max_masks, cls)
        labels = labels_of_map(unpad(pixels, frame.prepared), min_area)
        return _outputs(resize_labels(labels, frame.prepared.size), max_masks, cls)


def _outputs(labels: torch.Tensor, max_masks: int, node: type[io.ComfyNode]) -> io.NodeOutput:
    """Label maps (B, H, W), 1 = the largest instance, as grey pictures, masks of each, and in colours."""
    if (most := int(labels.max())) > GREYS:
        log.warning("%d instances, and only %d greys: the label map shows the smallest ones as one.", most, GREYS)
    grey = (labels.clamp(max=GREYS) / GREYS)[..., None].expand(-1, -1, -1, 3).contiguous()
    shown = labels.masked_fill(labels > max_masks, 0) if max_masks else labels
    preview = to_comfy(colorize(labels))
    masks = [instance_masks(each) for each in shown]
    return io.NodeOutput(grey, masks, preview, ui=ui.PreviewImage(preview, cls=node))


NODES = [SAMLoader, SAMInstances, InstanceMapDecode]
