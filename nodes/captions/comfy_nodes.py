"""The node that captions pictures for all methods: widgets only; the captioners are in nodes/common/captions.py."""

from comfy_api.latest import io

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
            description="Describes each picture of a batch for use as a prompt: one text for each, as a list.",
            inputs=[
                io.Image.Input("image", tooltip="The low-resolution picture, as it comes from LR Prepare."),
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
            outputs=[io.String.Output("prompt", display_name="prompt", is_output_list=True,
                                      tooltip="One prompt for each picture, for CLIP Text Encode.")])

    @classmethod
    def execute(cls, image, captioner, drop_focus_words, suffix) -> io.NodeOutput:
        pixels = from_comfy(image)[:, :3]
        if captioner == EMBEDDED:
            captions = EmbeddedCaptioner(as_good=drop_focus_words)(pixels)
        else:
            folder = find_model(captioner, FOLDERS, "the captioner", "its page")
            describe = load_captioner(folder, dtype=pick_dtype("default"))
            with on_device(host(describe.network, "captioner")):
                captions = describe(pixels)
            if drop_focus_words:
                captions = [clean_caption(caption) for caption in captions]
        return io.NodeOutput([f"{caption} {suffix.strip()}".strip() for caption in captions])


NODES = [CaptionImage]
