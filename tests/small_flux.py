"""A small random FLUX.1: its parts as a diffusers folder, and as the single files of its makers."""

import json
import re
import shutil

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

SIZES = dict(in_channels=64, num_layers=3, num_single_layers=2, attention_head_dim=8, num_attention_heads=3,
             joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(2, 2, 4))
TEXT_WIDTH, POOLED_WIDTH = 16, 8
EMBEDDERS = {"time_in": "time_text_embed.timestep_embedder", "guidance_in": "time_text_embed.guidance_embedder",
             "vector_in": "time_text_embed.text_embedder"}
MAKERS_VAE = [  # diffusers' names -> the makers', as patterns
    (r"down_blocks\.(\d)\.resnets\.", r"down.\1.block."), (r"downsamplers\.0\.conv", "downsample.conv"),
    (r"down_blocks\.(\d)\.", r"down.\1."), (r"upsamplers\.0\.conv", "upsample.conv"), (r"up_blocks\.0\.", "up.3."),
    (r"up_blocks\.1\.", "up.2."), (r"up_blocks\.2\.", "up.1."), (r"up_blocks\.3\.", "up.0."),
    (r"(up\.\d)\.resnets\.", r"\1.block."), (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"), (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"attn_1\.group_norm", "attn_1.norm"), (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
]


def transformer(**sizes) -> FluxTransformer2DModel:
    """Random weights everywhere, as after a training."""
    torch.manual_seed(5)
    network = FluxTransformer2DModel(**SIZES | sizes)
    for name, parameter in network.named_parameters():
        if "norm_" not in name:
            torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
    return network.eval().requires_grad_(False)


def makers_layout(state) -> dict[str, torch.Tensor]:
    """The weights of a FLUX transformer under the names of flux1-dev.safetensors."""
    made = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    made |= {f"{ours}.{layer}_layer": f"{theirs}.linear_{i}" for ours, theirs in EMBEDDERS.items()
             for i, layer in ((1, "in"), (2, "out")) if f"{theirs}.linear_1.weight" in state}
    fused, swapped = {}, {"final_layer.adaLN_modulation.1": "norm_out.linear"}
    norms = {}
    for block in sorted({name.split(".")[1] for name in state if name.startswith("transformer_blocks.")}):
        here, there = f"double_blocks.{block}", f"transformer_blocks.{block}"
        for side, norm, projection, out, mlp, qk in (
            ("img", "norm1", "to_{}", "to_out.0", "ff", "norm_{}"),
            ("txt", "norm1_context", "add_{}_proj", "to_add_out", "ff_context", "norm_added_{}"),
        ):
            made[f"{here}.{side}_mod.lin"] = f"{there}.{norm}.linear"
            made[f"{here}.{side}_attn.proj"] = f"{there}.attn.{out}"
            made[f"{here}.{side}_mlp.0"] = f"{there}.{mlp}.net.0.proj"
            made[f"{here}.{side}_mlp.2"] = f"{there}.{mlp}.net.2"
            fused[f"{here}.{side}_attn.qkv"] = [f"{there}.attn.{projection.format(x)}" for x in "qkv"]
            norms |= {f"{here}.{side}_attn.norm.{kind}_norm.scale": f"{there}.attn.{qk.format(kind[0])}.weight"
                      for kind in ("query", "key")}
    for block in sorted({name.split(".")[1] for name in state if name.startswith("single_transformer_blocks.")}):
        here, there = f"single_blocks.{block}", f"single_transformer_blocks.{block}"
        made |= {f"{here}.modulation.lin": f"{there}.norm.linear", f"{here}.linear2": f"{there}.proj_out"}
        fused[f"{here}.linear1"] = [f"{there}.attn.to_{x}" for x in "qkv"] + [f"{there}.proj_mlp"]
        norms |= {f"{here}.norm.{kind}_norm.scale": f"{there}.attn.norm_{kind[0]}.weight" for kind in ("query", "key")}
    out = {ours: state[theirs].clone() for ours, theirs in norms.items()}
    for kind in ("weight", "bias"):
        out |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"].clone() for ours, theirs in made.items()}
        out |= {f"{ours}.{kind}": torch.cat([state[f"{name}.{kind}"] for name in names])
                for ours, names in fused.items()}
        out |= {f"{ours}.{kind}": torch.cat(state[f"{theirs}.{kind}"].chunk(2)[::-1])
                for ours, theirs in swapped.items()}
    return out


def write_diffusers(root, write_clip_tokenizer, write_t5_tokenizer) -> None:
    """transformer, vae, text_encoder, text_encoder_2, tokenizer and tokenizer_2."""
    network = transformer(joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=POOLED_WIDTH)
    network.save_pretrained(root / "transformer")
    torch.manual_seed(6)
    autoencoder().save_pretrained(root / "vae")
    size = write_clip_tokenizer(root / "tokenizer", "<|endoftext|>")
    CLIPTextModel(CLIPTextConfig(
        vocab_size=size, hidden_size=POOLED_WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1,
        bos_token_id=0, eos_token_id=2)).save_pretrained(root / "text_encoder")
    write_t5_tokenizer(root / "tokenizer_2")
    T5EncoderModel(T5Config(vocab_size=80, d_model=TEXT_WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                            feed_forward_proj="gated-gelu")).save_pretrained(root / "text_encoder_2")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))


def autoencoder() -> AutoencoderKL:
    """FLUX's at a sixteenth of its widths; latents an eighth of the picture, 16 channels."""
    return AutoencoderKL(
        latent_channels=16, block_out_channels=(32, 32, 32, 64), layers_per_block=1, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, shift_factor=0.1159,
        scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False)


def write_makers_files(root, diffusers) -> None:
    """flux1-dev, ae, clip_l and t5xxl with the weights of a diffusers folder, and the tokenizers beside them."""
    weights = "diffusion_pytorch_model.safetensors"
    save_file(makers_layout(load_file(diffusers / "transformer" / weights)), root / "flux1-dev.safetensors")
    vae = {}
    for name, value in load_file(diffusers / "vae" / weights).items():
        for pattern, replacement in MAKERS_VAE:
            name = re.sub(pattern, replacement, name)
        is_layer = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        vae[name] = value[:, :, None, None].contiguous() if is_layer else value
    save_file(vae, root / "ae.safetensors")
    clip = load_file(diffusers / "text_encoder" / "model.safetensors")
    clip = {name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in clip.items()}
    save_file(clip, root / "clip_l.safetensors")
    t5 = load_file(diffusers / "text_encoder_2" / "model.safetensors")
    save_file({name: value.half() for name, value in t5.items()}, root / "t5xxl_fp16.safetensors")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(diffusers / name, root / name)
