"""The nodes that all methods share: widgets and tensor layout only; what they do is in the modules beside this file.

Sockets. Everything that ComfyUI has a socket for goes over that one: IMAGE, MASK, LATENT (unscaled VAE latents),
CONDITIONING, CLIP, VAE, STRING. Two kinds are our own:

- ``FOURFOLD_<METHOD>``, a method's networks (`host.models.HostedModel`): one type for each method, so that the editor
  refuses to wire one method's loader to another's sampler. The `model` output of Tiny Models has the types of all
  methods, joined by commas, which ComfyUI and its editor both read as "one of these"; a sampler that is given the wrong
  one says so when it runs (`host.models.require_method`). A new method adds its type to that list and renames nothing.
- ``FOURFOLD_FRAME``, what LR Prepare knows of a picture and Color Fix needs (`frames.Frame`): exact target size, alpha,
  reference, and the batch that the picture came in.
"""

import torch
from comfy_api.latest import io, ui

from . import tiny
from .color_fix import METHODS
from .degradation import DEGRADATIONS, degrade
from .frames import put_together, split
from .host.files import fingerprint
from .host.models import TINY_LOADERS
from .images import from_comfy, side_by_side, to_comfy
from .sizing import INTERPOLATIONS, LARGER, prepare_sized

CATEGORY = "Fourfold"
MAX_SIDE = 16384  # pixels, of a restored picture
Frame = io.Custom("FOURFOLD_FRAME")
TinyModel = io.Custom(",".join(f"FOURFOLD_{method.upper()}" for method in tiny.METHODS))


class LRPrepare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldLRPrepare",
            display_name="LR Prepare",
            category=CATEGORY,
            description="Enlarges a low-resolution picture to its target size and pads it so that a network can take "
            "it. Connect the frame to Color Fix, which gives the exact size and the transparency back. A batch goes on "
            "as a list, picture by picture.",
            inputs=[
                io.Image.Input("image", tooltip="The low-resolution picture: any size, grey, RGB or RGBA, or a batch."),
                io.Float.Input("scale", default=4.0, min=0.25, max=16.0, step=0.05,
                               tooltip="How many times larger the result is. Not used where width or height is set."),
                io.Int.Input("width", default=0, min=0, max=MAX_SIDE,
                             tooltip="Width of the result in pixels. 0 = from the height, keeping the proportions; "
                             "both 0 = from the scale."),
                io.Int.Input("height", default=0, min=0, max=MAX_SIDE,
                             tooltip="Height of the result in pixels. 0 = from the width, keeping the proportions; "
                             "both 0 = from the scale."),
                io.Int.Input("multiple", default=16, min=1, max=128,
                             tooltip="Pixels; both sides are padded to a multiple of this. 16 suits every model."),
                io.Int.Input("min_short_side", default=0, min=0, max=4096,
                             tooltip="Pixels; a smaller result is worked on at this short side and shrunk at the end. "
                             "512 for full-size models (InstantIR 768), 128 for tiny ones, 0 = off."),
                io.Mask.Input("mask", optional=True,
                              tooltip="Transparency, as Load Image gives it (white = transparent). It is enlarged with "
                              "the picture and put back by Color Fix."),
                io.Int.Input("max_long_side", default=0, min=0, max=MAX_SIDE, optional=True,
                             tooltip="Pixels, for InstantIR: a result up to this long is drawn whole, its short side "
                             "raised to min_short_side, its sides rounded down to the multiple. 1024 at full size, 128 "
                             "for tiny models, 0 = off."),
                io.Combo.Input("larger", options=list(LARGER), default="pad", optional=True,
                               tooltip="Results longer than max_long_side. pad: keep their size, for windows. shrink: "
                               "are drawn at max_long_side and enlarged."),
                io.Combo.Input("interpolation", options=list(INTERPOLATIONS), default="bicubic", optional=True,
                               tooltip="How the picture is enlarged; bilinear for full-size InstantIR."),
            ],
            outputs=[
                io.Image.Output("prepared", display_name="prepared", is_output_list=True,
                                tooltip="Enlarged, padded, RGB: for VAE Encode. A list with each picture by itself."),
                Frame.Output("frame", display_name="frame", is_output_list=True,
                             tooltip="For Color Fix: size, transparency and colours of each picture."),
            ])

    @classmethod
    def execute(cls, image, scale, width, height, multiple, min_short_side, mask=None, max_long_side=0, larger="pad",
                interpolation="bicubic") -> io.NodeOutput:
        pixels = _with_alpha(from_comfy(image), mask)
        size = _target(pixels, width, height)
        frames = split(prepare_sized(
            pixels, None if size else scale, size, multiple=multiple, min_short_side=min_short_side,
            max_long_side=max_long_side, larger=larger, interpolation=interpolation))
        return io.NodeOutput([to_comfy(frame.prepared.pixels) for frame in frames], frames)


def _target(pixels: torch.Tensor, width: int, height: int) -> tuple[int, int] | None:
    """(height, width) in pixels; None = take the scale."""
    if not width and not height:
        return None
    h, w = pixels.shape[-2:]
    return height or max(1, round(h * width / w)), width or max(1, round(w * height / h))


def _with_alpha(pixels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Puts ComfyUI's mask (1 = transparent; Load Image gives zeros for an opaque picture) in as fourth channel."""
    if mask is None or not mask.any():
        return pixels
    alpha = 1 - mask.reshape(-1, 1, *mask.shape[-2:])
    if alpha.shape[-2:] != pixels.shape[-2:] or len(pixels) % len(alpha):
        raise ValueError(f"the mask is {tuple(mask.shape)}, but the picture is {tuple(pixels.shape)} (B, C, H, W): use "
                         "the MASK output of the node that the picture comes from.")
    colors = pixels[:, :3].expand(-1, 3, -1, -1)
    return torch.cat([colors, alpha.repeat(len(pixels) // len(alpha), 1, 1, 1).to(colors)], dim=1)


class ColorFix(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldColorFix",
            display_name="Color Fix",
            category=CATEGORY,
            description="Crops a restored picture to the exact target size, gives it the colours of the low-resolution "
            "picture, and puts the transparency back. Pictures that came in one batch leave as one.",
            is_input_list=True,
            inputs=[
                io.Image.Input("image", tooltip="The restored picture from VAE Decode."),
                Frame.Input("frame", tooltip="From the LR Prepare that this picture went through."),
                io.Combo.Input("method", options=list(METHODS), default="adain",
                               tooltip="adain: mean and contrast of each channel from the input. wavelet: its low "
                               "frequencies from the input, truer where the light varies. none: colours stay."),
            ],
            outputs=[
                io.Image.Output("restored", display_name="image", is_output_list=True,
                                tooltip="The result; RGBA where the input was."),
                io.Mask.Output("transparency", display_name="mask", is_output_list=True,
                               tooltip="White = transparent, black = opaque."),
            ])

    @classmethod
    def execute(cls, image, frame, method) -> io.NodeOutput:
        batches = put_together([from_comfy(pixels) for pixels in image], frame, method[0])
        return io.NodeOutput([to_comfy(pictures) for pictures, _ in batches], [clear for _, clear in batches])


class Degrade(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldDegrade",
            display_name="Degrade",
            category=CATEGORY,
            description="Makes a low-resolution picture from a good one, as for training: blur, shrinking, noise and "
            "JPEG, twice. For trying a method where the truth is known.",
            inputs=[
                io.Image.Input("image", tooltip="A good picture, at least 4 pixels on each side; alpha is ignored."),
                io.Combo.Input("preset", options=list(DEGRADATIONS), default="seesr",
                               tooltip="How strong: light < seesr (what DiT4SR trains with) < real_esrgan."),
                io.Int.Input("scale", default=4, min=1, max=16, tooltip="How many times smaller the result is."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
                             tooltip="The same seed gives the same degradation; picture b of a batch takes seed + b."),
            ],
            outputs=[io.Image.Output("degraded", display_name="image", tooltip="The low-resolution picture.")])

    @classmethod
    def execute(cls, image, preset, scale, seed) -> io.NodeOutput:
        hr = from_comfy(image)[:, :3].expand(-1, 3, -1, -1).clamp(0, 1)
        seeds = [(seed + b) % 2**64 for b in range(len(hr))]
        return io.NodeOutput(to_comfy(degrade(hr, DEGRADATIONS[preset], seeds, scale)))


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldCompare",
            display_name="Compare",
            category=CATEGORY,
            description="Before and after side by side on one sheet, with labels; shown on the node.",
            inputs=[
                io.Image.Input("before", tooltip="The low-resolution picture, say; enlarged to the other's size."),
                io.Image.Input("after", tooltip="The restored picture, say."),
                io.String.Input("before_label", default="before", tooltip="Text over the left picture; empty = none."),
                io.String.Input("after_label", default="after", tooltip="Text over the right picture; empty = none."),
            ],
            outputs=[io.Image.Output("sheet", display_name="sheet", tooltip="Both pictures on one sheet.")],
            is_output_node=True)

    @classmethod
    def execute(cls, before, after, before_label, after_label) -> io.NodeOutput:
        sheet = to_comfy(side_by_side(from_comfy(before), from_comfy(after), (before_label, after_label)))
        return io.NodeOutput(sheet, ui=ui.PreviewImage(sheet, cls=cls))


class TinyModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldTinyModels",
            display_name="Tiny Models",
            category=CATEGORY,
            description="The tiny family that comes with Fourfold: a method's network with its text encoder and "
            "autoencoder. Runs on a laptop without any download.",
            inputs=[io.Combo.Input("method", options=tiny.available_methods(),
                                   tooltip="The method whose network is loaded: connect its sampler.")],
            outputs=[
                TinyModel.Output("model", display_name="model", tooltip="For the sampler of the chosen method."),
                io.Clip.Output("clip", display_name="clip", tooltip="The tiny text encoder, for CLIP Text Encode."),
                io.Vae.Output("vae", display_name="vae", tooltip="The tiny autoencoder, for VAE Encode and Decode."),
            ])

    @classmethod
    def validate_inputs(cls, method=None) -> bool | str:
        try:
            for part in ("codec", "text", method or "codec"):  # None: the method comes over a link
                tiny.tiny_checkpoint(part)
        except (FileNotFoundError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, method=None) -> str:
        return "; ".join(fingerprint(tiny.tiny_checkpoint(part)) for part in ("codec", "text", method or "codec"))

    @classmethod
    def execute(cls, method) -> io.NodeOutput:
        from .host.autoencoder import TinyVAE
        from .host.text import tiny_clip

        if method not in TINY_LOADERS:
            raise RuntimeError(f"the nodes of {method} could not be loaded when ComfyUI started; its log says why.")
        model = TINY_LOADERS[method](tiny.tiny_checkpoint(method))
        return io.NodeOutput(model, tiny_clip(tiny.load_text_encoder()), TinyVAE(tiny.load_codec()))


NODES = [LRPrepare, ColorFix, Degrade, Compare, TinyModels]
