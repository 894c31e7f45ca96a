"""A small random SDXL: a diffusers folder, and the same weights as one file in its makers' layout."""

import json
import re
import shutil

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

L_WIDTH, G_WIDTH, POOLED, SIZE_WIDTH = 64, 128, 96, 8
TEXT_WIDTH = L_WIDTH + G_WIDTH
WEIGHTS = "diffusion_pytorch_model.safetensors"
_TOP = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
           "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding", "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}


def unet() -> UNet2DConditionModel:
    torch.manual_seed(7)
    return UNet2DConditionModel(
        in_channels=4, out_channels=4, sample_size=16, block_out_channels=(32, 64), norm_num_groups=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 1), layers_per_block=1, cross_attention_dim=TEXT_WIDTH, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=POOLED + 6 * SIZE_WIDTH)


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(8)
    return AutoencoderKL(
        latent_channels=4, block_out_channels=(32, 32, 32, 64), layers_per_block=1, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.13025)


def write_diffusers(root, write_clip_tokenizer) -> None:
    """unet, vae, text_encoder, text_encoder_2, tokenizer and tokenizer_2."""
    unet().save_pretrained(root / "unet")
    autoencoder().save_pretrained(root / "vae")
    torch.manual_seed(9)
    for suffix, width, kind, pad in (("", L_WIDTH, CLIPTextModel, "<|endoftext|>"),
                                     ("_2", G_WIDTH, CLIPTextModelWithProjection, "!")):
        size = write_clip_tokenizer(root / f"tokenizer{suffix}", pad)
        kind(CLIPTextConfig(
            vocab_size=size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=width // 64, projection_dim=POOLED, bos_token_id=0, eos_token_id=2,
            hidden_act="gelu" if suffix else "quick_gelu")).save_pretrained(root / f"text_encoder{suffix}")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))


def write_makers_file(path, diffusers, vae_patterns) -> None:
    """One file with `model.diffusion_model.`, `first_stage_model.` and `conditioner.`, tokenizer beside it.

    Args:
        vae_patterns: of the autoencoder's names, see small_flux.MAKERS_VAE.
    """
    state = {f"model.diffusion_model.{makers_name(name, 1, {0})}": value
             for name, value in load_file(diffusers / "unet" / WEIGHTS).items()}
    for name, value in load_file(diffusers / "vae" / WEIGHTS).items():
        for pattern, replacement in vae_patterns:
            name = re.sub(pattern, replacement, name)
        is_layer = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        state[f"first_stage_model.{name}"] = value[:, :, None, None].contiguous() if is_layer else value
    for name, value in load_file(diffusers / "text_encoder" / "model.safetensors").items():
        state[f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    state["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state |= open_clip(load_file(diffusers / "text_encoder_2" / "model.safetensors"))
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    shutil.copytree(diffusers / "tokenizer", path.parent / "tokenizer")


def open_clip(state) -> dict[str, torch.Tensor]:
    out = {}
    for name, value in state.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            out["text_projection"] = value.T
        elif "self_attn.q_proj" in name:
            kind = name.rsplit(".", 1)[1]
            parts = [state[f"text_model.{name}".replace("q_proj", f"{x}_proj")] for x in "qkv"]
            out[f"{renamed(name.split('.self_attn')[0])}.attn.in_proj_{kind}"] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            out[renamed(name)] = value
    out["logit_scale"] = torch.tensor(1.0)
    return {f"conditioner.embedders.1.model.{name}": value for name, value in out.items()}


def renamed(name):
    for ours, theirs in _OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    return name


def makers_name(name, layers, attended):
    """A diffusers name of an SDXL UNet in its makers' layout.

    Args:
        layers: resnets of a down block. attended: up blocks with attentions.
    """
    for own, theirs in _TOP.items():
        if name.startswith(f"{own}."):
            return name.replace(own, theirs, 1)
    side, rest = name.split(".", 1)
    if side == "mid_block":
        kind, i, rest = rest.split(".", 2)
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(i)}"
    else:
        block, kind, i, rest = rest.split(".", 3)
        block, i, down = int(block), int(i), side == "down_blocks"
        number = block * (layers + 1) + i + down
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"output_blocks.{block * (layers + 1) + layers}.{2 if block in attended else 1}.{rest}"
        place = f"{'input' if down else 'output'}_blocks.{number}.{int(kind == 'attentions')}"
    if kind == "resnets":
        inner, rest = rest.split(".", 1)
        return f"{place}.{_RESNET[inner]}.{rest}"
    return f"{place}.{rest}"
