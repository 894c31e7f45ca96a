"""The example photographs as a node: Load Image knows only ComfyUI's own input folder."""

from comfy_api.latest import io, ui

from ..common.images import to_comfy
from .photos import example_names, load_example


class ExamplePhoto(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldExamplePhoto",
            display_name="Example Photo",
            category="Fourfold",
            description="A photograph that comes with Fourfold, damaged and at a quarter of its size, with the clean "
            "original beside it. For trying a workflow before Load Image takes its place.",
            inputs=[io.Combo.Input("photo", options=example_names(), tooltip="Which photograph.")],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="Damaged, a quarter as wide and as high."),
                io.Image.Output("reference", display_name="reference", tooltip="The clean original, for comparing."),
            ])

    @classmethod
    def execute(cls, photo) -> io.NodeOutput:
        low_quality, clean = (to_comfy(picture) for picture in load_example(photo))
        return io.NodeOutput(low_quality, clean, ui=ui.PreviewImage(low_quality, cls=cls))


NODES = [ExamplePhoto]
