"""The nodes that load InstantIR's networks: widgets only; what the files are is told by their headers."""

import math
from pathlib import Path

import torch
from comfy_api.latest import io

from ..common import tiny
from ..common.checkpoints import detect_family, read_header, require_family
from ..common.errors import WrongFileError
from ..common.host.files import find_model, fingerprint, list_models
from ..common.host.models import DTYPES, TINY_LOADERS, HostedModel, host, pick_dtype
from ..common.sdxl_unet import PAGE as SDXL_PAGE
from ..common.vision import PAGE as DINO_PAGE
from ..common.vision import VisionEncoder
from .comfy_sockets import CATEGORY, DINOModel, InstantIRModel
from .model import InstantIR
from .weights import PAGE

NONE = "none"
# widget -> (what it is, where it is looked for, its page, families that will do)
FILES = {
    "base": ("the base model", ("checkpoints", "diffusion_models", "fourfold"), SDXL_PAGE, ("sdxl", "instantir")),
    "adapter": ("InstantIR's adapter", ("fourfold", "controlnet", "diffusion_models"), PAGE, ("instantir_adapter",)),
    "aggregator": ("InstantIR's Aggregator", ("fourfold", "controlnet", "diffusion_models"), PAGE,
                   ("instantir_aggregator",)),
    "previewer": ("the Previewer's LoRA", ("fourfold", "loras"), PAGE, ("instantir_previewer",)),
}
DINO_FOLDERS = ("clip_vision", "fourfold", "diffusion_models")
PRECISIONS = (torch.float16, torch.bfloat16, torch.float32)  # that the networks compute well in, best first
_NOT_OURS = {file for part, file in tiny.FILES.items() if part != "instantir"}  # the rest of the tiny family
_NOT_DINO = {file for part, file in tiny.FILES.items() if part != "vision"}


def find_part(widget: str, name: str) -> Path:
    """The file chosen in a widget of InstantIR Loader, found from its header to be what belongs there.

    Raises: FileNotFoundError, CorruptCheckpointError, WrongFileError.
    """
    what, folders, page, families = FILES[widget]
    path = find_model(name, folders, what, page)
    require_family(path, families, f"{widget}: {name}", f"Choose {what} ({page}).")
    return path


def find_parts(base: str | None, adapter: str | None, aggregator: str | None, previewer: str | None) -> dict[str, Path]:
    """The chosen files by widget; None = not known yet, "none" = without.

    Raises: as `find_part`; WrongFileError for a choice of files that do not go together.
    """
    names = {"base": base, "adapter": adapter, "aggregator": aggregator, "previewer": previewer}
    paths = {widget: find_part(widget, name) for widget, name in names.items() if name not in (None, NONE)}
    whole = "base" in paths and detect_family(paths["base"]) == "instantir"
    if whole and len(paths) > 1:
        raise WrongFileError(f"{base} holds all parts of InstantIR; set {', '.join(list(paths)[1:])} to {NONE}.")
    if "base" in paths and not whole and adapter == NONE:
        raise WrongFileError(f"adapter is {NONE}, but {base} is a plain SDXL. Choose adapter.pt of {PAGE}.")
    return paths


def load_model(path: Path, dtype: str = "default") -> HostedModel:
    """An InstantIR in one file under ComfyUI's memory management (also what Tiny Models calls)."""
    network = InstantIR.from_pretrained(path, pick_dtype(dtype, _values(path), PRECISIONS))
    return host(network, "instantir", _preview(network))


def _values(path: Path) -> int:
    """How many weights a checkpoint holds, without an SDXL file's VAE and text encoders."""
    tensors = read_header(path).tensors
    inside = [name for name in tensors if name.startswith("model.diffusion_model.")] or tensors
    return sum(math.prod(tensors[name][1]) for name in inside)


def _preview(network: InstantIR):
    from ..common.host import autoencoder

    config = network.config
    if config.unet["in_channels"] == 4:
        return autoencoder.sdxl_latents()
    return autoencoder.TinyLatents(tiny.load_codec(), config.latent_shift, config.latent_scale)


class InstantIRLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def listed(widget: str) -> list[str]:
            return [name for name in list_models(FILES[widget][1]) if name not in _NOT_OURS]

        return io.Schema(
            node_id="FourfoldInstantIRLoader",
            display_name="InstantIR Loader",
            category=CATEGORY,
            description="Loads SDXL's UNet with InstantIR's adapter, Aggregator and Previewer. CLIP and VAE are SDXL's "
            "own: Load Checkpoint.",
            inputs=[
                io.Combo.Input("base", options=listed("base"),
                               tooltip="SDXL base: a single checkpoint from models/checkpoints, or a UNet (folder or "
                               "file) from models/diffusion_models. Or one file with all parts that Fourfold trained."),
                io.Combo.Input("adapter", options=[*listed("adapter"), NONE],
                               tooltip="adapter.pt, from models/fourfold, controlnet or diffusion_models. none: only "
                               "with a base that holds all parts."),
                io.Combo.Input("aggregator", options=[NONE, *listed("aggregator")], default=NONE,
                               tooltip="aggregator.pt, from the same folders. none: restores by DCP tokens alone."),
                io.Combo.Input("previewer", options=[NONE, *listed("previewer")], default=NONE,
                               tooltip="previewer_lora_weights.bin, from models/fourfold or loras. none: the "
                               "Aggregator then has the input itself as reference."),
                io.Combo.Input("dtype", options=["default", *DTYPES], default="default",
                               tooltip="Precision of the weights. default: fp16 on a GPU, fp32 on a CPU."),
            ],
            outputs=[InstantIRModel.Output("model", display_name="model", tooltip="For the other InstantIR nodes.")])

    @classmethod
    def validate_inputs(cls, base=None, adapter=None, aggregator=None, previewer=None) -> bool | str:
        try:
            find_parts(base, adapter, aggregator, previewer)
        except (OSError, ValueError) as error:
            return f"InstantIR Loader, {error}"
        return True

    @classmethod
    def fingerprint_inputs(cls, base=None, adapter=None, aggregator=None, previewer=None, **rest) -> str:
        return "; ".join(map(fingerprint, find_parts(base, adapter, aggregator, previewer).values()))

    @classmethod
    def execute(cls, base, adapter, aggregator, previewer, dtype) -> io.NodeOutput:
        paths = find_parts(base, adapter, aggregator, previewer)
        if len(paths) == 1:
            return io.NodeOutput(load_model(paths["base"], dtype))
        network = InstantIR.load(
            paths["base"], paths["adapter"], paths.get("aggregator"), paths.get("previewer"),
            dtype=pick_dtype(dtype, sum(map(_values, paths.values())), PRECISIONS))
        return io.NodeOutput(host(network, "instantir", _preview(network)))


class DINOLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FourfoldDINOLoader",
            display_name="DINO Loader",
            category=CATEGORY,
            description="Loads DINOv2, which sees the picture for InstantIR: DINOv2 large at full size, "
            "vision.safetensors for the tiny network.",
            inputs=[
                io.Combo.Input("vision", options=[n for n in list_models(DINO_FOLDERS) if n not in _NOT_DINO],
                               tooltip="A transformers folder (config.json and its weights), or its weights alone as "
                               "one file, from models/clip_vision, fourfold or diffusion_models."),
                io.Combo.Input("dtype", options=["default", *DTYPES], default="default",
                               tooltip="Precision of the weights. default: fp16 on a GPU, fp32 on a CPU."),
            ],
            outputs=[DINOModel.Output("dino", display_name="dino", tooltip="For DINO Encoder.")])

    @classmethod
    def validate_inputs(cls, vision=None) -> bool | str:
        try:
            if vision is not None:  # None: the name comes over a link
                find_vision(vision)
        except (OSError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, vision=None, **rest) -> str:
        return fingerprint(find_vision(vision)) if vision else ""

    @classmethod
    def execute(cls, vision, dtype) -> io.NodeOutput:
        path = find_vision(vision)
        network = VisionEncoder.from_pretrained(path, pick_dtype(dtype, _values(path), PRECISIONS))
        return io.NodeOutput(host(network, "dino"))


def find_vision(name: str) -> Path:
    """The chosen vision encoder, found to be one from its header. Raises: as `find_part`."""
    path = find_model(name, DINO_FOLDERS, "the vision encoder", DINO_PAGE)
    hint = f"Choose DINOv2 large ({DINO_PAGE}), or vision.safetensors for the tiny network."
    require_family(path, ("dinov2", "vision"), name, hint)
    return path


NODES = [InstantIRLoader, DINOLoader]
TINY_LOADERS["instantir"] = load_model
