"""What a checkpoint is, found from the names and shapes in its header alone.

Users have the same network in several layouts: the single file of its maker (``model.diffusion_model.`` in front, with
or without VAE and text encoders), a diffusers folder, or the bare network. Each family is one rule that knows them all;
the first rule that matches wins, so that a file with everything in it counts as its backbone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .errors import WrongFileError
from .weight_files import Header, read_header

FAMILIES = {  # name -> "this is ..."
    "dit4sr": "a DiT4SR transformer (SD3.5 medium with the LR stream)",
    "sdxl": "an SDXL checkpoint",
    "sdxl_refiner": "an SDXL refiner, not the base model",
    "sd15": "a Stable Diffusion 1.x checkpoint",
    "sd2": "a Stable Diffusion 2.x checkpoint",
    "sd3": "a Stable Diffusion 3 medium checkpoint",
    "sd35_medium": "a Stable Diffusion 3.5 medium checkpoint",
    "sd35_large": "a Stable Diffusion 3.5 large checkpoint",
    "flux": "a FLUX.1-dev transformer (with guidance embedding)",
    "flux_tools": "a FLUX.1 transformer with further inputs (Fill, Depth or Canny)",
    "flux2": "a FLUX.2 transformer",
    "flux_schnell": "a FLUX transformer without guidance embedding (FLUX.1-schnell)",
    "dit": "a class-conditional DiT (the base of InstanceRSR)",
    "instantir_adapter": "InstantIR's adapter (DCP resampler and time-aware cross-attention)",
    "instantir_aggregator": "InstantIR's Aggregator",
    "instantir_previewer": "InstantIR's Previewer LoRA",
    "instantir": "an InstantIR checkpoint of this project",
    "instancersr": "an InstanceRSR checkpoint",
    "dreamsr": "a DreamSR checkpoint",
    "ip_adapter": "an IP-Adapter without InstantIR's time-aware layers",
    "lora": "a LoRA",
    "controlnet": "a ControlNet",
    "sam": "a Segment Anything checkpoint",
    "vae4": "an autoencoder with 4 latent channels (SD 1.5 or SDXL)",
    "vae16": "an autoencoder with 16 latent channels (SD3 or FLUX)",
    "llava": "a LLaVA captioner",
    "clip_l": "a CLIP-L text encoder",
    "clip_g": "a CLIP-G text encoder",
    "clip": "a CLIP text encoder of unusual width",
    "clip_vision": "a CLIP vision encoder",
    "t5": "a T5 text encoder",
    "dinov2": "a DINOv2 vision encoder",
    "codec": "the tiny family's image codec",
    "text": "the tiny family's text encoder",
    "vision": "the tiny family's vision encoder",
    "unknown": "a checkpoint of no known kind",
}

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "module.", "model.")


class _Keys:
    """The names in a header with any wrapper prefix removed, and questions about them."""

    def __init__(self, header: Header):
        self.shapes = {}
        for name, (_, shape) in header.tensors.items():
            prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
            self.shapes[name.removeprefix(prefix)] = shape
        self.shapes.update({name: shape for name, (_, shape) in header.tensors.items()})

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def starts(self, *prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in self.shapes)

    def has(self, *fragments: str) -> bool:
        return any(fragment in name for name in self.shapes for fragment in fragments)

    def width(self, ending: str, axis: int = 1) -> int | None:
        """Extent along `axis` of the first tensor whose name ends with `ending`; None if there is none."""
        return next((shape[axis] for name, shape in self.shapes.items() if name.endswith(ending) and len(shape) > axis),
                    None)


def detect_family(source: Header | str | Path) -> str:
    """Family of a checkpoint, a key of `FAMILIES` or, for a file of this project, the method that it names itself.

    Args:
        source: a header, or a file or folder whose header is read. A diffusers *pipeline* folder counts as its
            ``transformer`` or ``unet``.
    Raises: what `weight_files.read_header` raises.
    """
    if not isinstance(source, Header):
        source = read_header(_network_folder(Path(source)))
    if source.method:
        return source.method
    keys = _Keys(source)
    return next((family for family, matches in _RULES if matches(keys)), "unknown")


def describe_family(family: str) -> str:
    """A family for a sentence: ``"an SDXL checkpoint"``."""
    return FAMILIES.get(family, f"a checkpoint of the method {family!r}")


def require_family(source: Header | str | Path, wanted: str | tuple[str, ...], path: str | Path, hint: str) -> str:
    """Family of `source` if it is (one of) `wanted`; otherwise say what the file is and what is needed.

    Args:
        source: header or path.
        wanted: family, or families, that will do.
        path: name of the file in the message.
        hint: what to choose instead, a sentence.
    Raises: WrongFileError, e.g. "x.safetensors is an SDXL checkpoint, but a DiT4SR transformer is needed. <hint>".
    """
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    family = detect_family(source)
    if family not in wanted:
        needed = " or ".join(describe_family(name) for name in wanted)
        raise WrongFileError(f"{path} is {describe_family(family)}, but {needed} is needed. {hint}")
    return family


def _network_folder(path: Path) -> Path:
    if (path / "model_index.json").is_file():
        return next((path / name for name in ("transformer", "unet") if (path / name).is_dir()), path)
    return path


def _is_lora(keys: _Keys) -> bool:
    return keys.has(".lora_A.", ".lora_B.", ".lora.down.", ".lora_down.", ".lora_up.")


def _is_previewer(keys: _Keys) -> bool:
    return _is_lora(keys) and keys.has("encoder_hid_proj.image_projection_layers", "ln_k_ip", "to_k_ip")


def _ldm_unet(adm: int | None = None, context: int | None = None) -> Callable[[_Keys], bool]:
    """UNet in its maker's layout, by the widths of the vector condition and of the text."""

    def matches(keys: _Keys) -> bool:
        return ("input_blocks.0.0.weight" in keys and keys.width("label_emb.0.0.weight") == adm
                and (context is None or keys.width("attn2.to_k.weight") == context))

    return matches


def _is_odd_sdxl(keys: _Keys) -> bool:
    """An SDXL of another size than the published one: a vector condition, and text as no Stable Diffusion has it."""
    return ("input_blocks.0.0.weight" in keys and keys.width("label_emb.0.0.weight") is not None
            and keys.width("attn2.to_k.weight") not in (768, 1024, None))


def _diffusers_unet(keys: _Keys) -> bool:
    return "conv_in.weight" in keys and keys.starts("down_blocks.") and keys.starts("up_blocks.")


def _joint_blocks(keys: _Keys) -> bool:
    return keys.has("joint_blocks.0.x_block.attn.qkv.weight")


def _sd3_diffusers(keys: _Keys) -> bool:
    return keys.has("transformer_blocks.0.attn.add_q_proj.weight") and "pos_embed.proj.weight" in keys


def _is_sd35_medium(keys: _Keys) -> bool:
    return ((_joint_blocks(keys) and keys.has("joint_blocks.0.x_block.attn2."))
            or (_sd3_diffusers(keys) and keys.has("transformer_blocks.0.attn2.to_q.weight")))


def _is_sd35_large(keys: _Keys) -> bool:
    return ((_joint_blocks(keys) and keys.has("joint_blocks.0.x_block.attn.ln_q."))
            or (_sd3_diffusers(keys) and keys.has("transformer_blocks.0.attn.norm_q.")))


def _flux_like(keys: _Keys) -> bool:
    return (keys.has("double_blocks.0.img_attn.qkv.") and keys.starts("single_blocks.")
            ) or (keys.starts("single_transformer_blocks.") and keys.starts("x_embedder."))


def _is_flux2(keys: _Keys) -> bool:
    return _flux_like(keys) and keys.starts("double_stream_modulation_img.")


def _is_flux_tools(keys: _Keys) -> bool:
    folder = "x_embedder.weight" in keys
    ends = ("x_embedder.weight", "proj_out.weight") if folder else ("img_in.weight", "final_layer.linear.weight")
    taken, given = (keys.shapes.get(name, ()) for name in ends)
    return _flux_like(keys) and len(taken) == len(given) == 2 and taken[1] != given[0]


def _is_flux_dev(keys: _Keys) -> bool:
    return _flux_like(keys) and keys.has("guidance_in.in_layer.", "time_text_embed.guidance_embedder.")


def _vae(channels: int) -> Callable[[_Keys], bool]:
    return lambda keys: (keys.width("decoder.conv_in.weight") == channels and keys.has("decoder.conv_out.weight")
                         and keys.has("encoder.conv_in.weight", "encoder.conv_out.weight"))


def _clip(width: int | None) -> Callable[[_Keys], bool]:
    embedding = "text_model.embeddings.token_embedding.weight"
    return lambda keys: keys.width(embedding) is not None and width in (None, keys.width(embedding))


_RULES: list[tuple[str, Callable[[_Keys], bool]]] = [  # the first that matches wins
    ("instantir_previewer", _is_previewer),
    ("dreamsr", lambda k: k.has("control.image_injections.0.")),
    ("lora", _is_lora),
    ("instantir_adapter", lambda k: k.has(".ln_k_ip.linear.weight") and k.starts("image_proj.")),
    ("ip_adapter", lambda k: k.starts("image_proj.") and k.starts("ip_adapter.")),
    ("instantir_aggregator", lambda k: "ref_conv_in.weight" in k),
    ("controlnet", lambda k: k.starts("controlnet_cond_embedding.", "controlnet_x_embedder.", "control_model.",
                                      "controlnet_blocks.", "controlnet_down_blocks.")),
    ("dit4sr", lambda k: k.has("transformer_blocks.0.attn.to_q_control.", "transformer_blocks.0.ff.control_conv.")),
    ("sd35_medium", _is_sd35_medium),
    ("sd35_large", _is_sd35_large),
    ("sd3", lambda k: _joint_blocks(k) or _sd3_diffusers(k)),
    ("flux2", _is_flux2),
    ("flux_tools", _is_flux_tools),
    ("flux", _is_flux_dev),
    ("flux_schnell", _flux_like),
    ("instancersr", lambda k: "control.projections.0.weight" in k),
    ("dit", lambda k: k.has("norm1.emb.class_embedder.embedding_table.weight", "y_embedder.embedding_table.weight")),
    ("sdxl", _ldm_unet(adm=2816)),
    ("sdxl_refiner", _ldm_unet(adm=2560)),
    ("sdxl", _is_odd_sdxl),
    ("sd2", _ldm_unet(context=1024)),
    ("sd15", _ldm_unet(context=768)),
    ("sdxl_refiner", lambda k: _diffusers_unet(k) and k.width("add_embedding.linear_1.weight") == 2560),
    ("sdxl", lambda k: _diffusers_unet(k) and k.width("add_embedding.linear_1.weight") is not None),
    ("sd2", lambda k: _diffusers_unet(k) and k.width("attn2.to_k.weight") == 1024),
    ("sd15", lambda k: _diffusers_unet(k) and k.width("attn2.to_k.weight") == 768),
    ("sam", lambda k: k.has("mask_decoder.iou_token.weight")),
    ("vae4", _vae(4)),
    ("vae16", _vae(16)),
    ("llava", lambda k: k.has("multi_modal_projector.linear_1.weight")),
    ("clip_l", _clip(768)),
    ("clip_g", _clip(1280)),
    ("clip", _clip(None)),
    ("clip_vision", lambda k: k.starts("vision_model.embeddings.patch_embedding.")),
    ("t5", lambda k: k.has("encoder.block.0.layer.0.SelfAttention.q.weight")),
    ("dinov2", lambda k: k.has("embeddings.patch_embeddings.projection.weight") and k.has(".layer_scale1.lambda1")),
]
