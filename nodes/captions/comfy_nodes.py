"""The node that captions pictures for all methods: widgets only; the captioners are in nodes/common/captions.py."""

from comfy_api.latest import io
from torch import Tensor

from ..common.caption_cleaning import clean_caption
from ..common.captions import EmbeddedCaptioner, load_captioner
from ..common.host.files import find_model, list_folders
from ..common.host.models import host, on_device, pick_dtype
from ..common.images import from_comfy

FOLDERS = ("fourfold", "LLM")  # where folders of image-to-text models are looked for
EMBEDDED = "embedded"


class CaptionImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldCaptionImage",
            display_name="Caption Image",
            category="Fourfold",
            description="Describes each picture for use as a prompt: a list of texts, in step with the list of "
            "pictures.",
            is_input_list=True,
            inputs=[
                io.Image.Input("image", tooltip="The low-resolution picture, as it comes from LR Prepare, or several."),
                io.Combo.Input("captioner", options=[EMBEDDED, *list_folders(FOLDERS, "preprocessor_config.json")],
                               default=EMBEDDED,
                               tooltip="embedded: measured words such as 'bright, warm, fine texture', as tiny models "
                               "know them; needs no weights. Or a folder with an image-to-text model of "
                               "transformers, in models/fourfold or models/LLM."),
                io.Boolean.Input("drop_focus_words", default=True,
                                 tooltip="Leave out sentences about blur, focus, depth and the like: they describe the "
                                 "damage, and the network would paint it. The embedded captioner then says "
                                 "'rich texture, crisp' whatever it measures."),
                io.String.Input("suffix", default="", multiline=True,
                                tooltip="Added to every caption: words of quality, as dit4sr_full has them. "
                                "Empty for tiny models."),
            ],
            outputs=[
                io.String.Output("prompt", display_name="prompt", is_output_list=True,
                                 tooltip="One prompt for each picture, for CLIP Text Encode."),
                io.Image.Output("picture", display_name="picture", is_output_list=True,
                                tooltip="The pictures themselves, one by one in step with the prompts. Not needed "
                                "behind LR Prepare, whose pictures are in step already."),
            ])

    @classmethod
    def execute(cls, image, captioner, drop_focus_words, suffix) -> io.NodeOutput:
        batches = [from_comfy(pixels)[:, :3] for pixels in image]
        captions = _describe(batches, captioner[0], drop_focus_words[0])
        added = [suffix[min(i, len(suffix) - 1)].strip() for i in range(len(batches))]  # one, or one for each batch
        prompts = [f"{caption} {words}".strip()
                   for words, described in zip(added, captions, strict=True) for caption in described]
        return io.NodeOutput(prompts, [picture for pixels in image for picture in pixels.split(1)])


def _describe(batches: list[Tensor], captioner: str, drop_focus_words: bool) -> list[list[str]]:
    """A caption for each picture of each batch (B, 3, H, W); a captioner's weights are loaded once for all."""
    if captioner == EMBEDDED:
        embedded = EmbeddedCaptioner(as_good=drop_focus_words)
        return [embedded(pixels) for pixels in batches]
    describe = load_captioner(find_model(captioner, FOLDERS, "the captioner", "its page"), dtype=pick_dtype("default"))
    with on_device(host(describe.network, "captioner")):
        captions = [describe(pixels) for pixels in batches]
    if drop_focus_words:
        captions = [[clean_caption(caption) for caption in described] for described in captions]
    return captions


NODES = [CaptionImage]
