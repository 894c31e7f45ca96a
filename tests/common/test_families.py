"""Every family told from the others by names and shapes; headers as their makers' files have them, shortened."""

import json

import pytest
import torch
from fourfold.nodes.common.errors import WrongFileError
from fourfold.nodes.common.families import FAMILIES, describe_family, detect_family, require_family
from fourfold.nodes.common.weight_files import Header
from safetensors.torch import save_file

LDM = "model.diffusion_model."


def ldm_unet(context, adm=None):
    names = {f"{LDM}input_blocks.0.0.weight": (320, 4, 3, 3), f"{LDM}out.2.weight": (4, 320, 3, 3),
             f"{LDM}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, context),
             "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
             "first_stage_model.decoder.conv_out.weight": (3, 128, 3, 3),
             "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)}
    return names | ({f"{LDM}label_emb.0.0.weight": (1280, adm)} if adm else {})


def diffusers_unet(context, adm=None):
    names = {"conv_in.weight": (320, 4, 3, 3), "down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3),
             "up_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3),
             "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, context)}
    return names | ({"add_embedding.linear_1.weight": (1280, adm)} if adm else {})


SDXL_EXTRAS = {"conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
               "conditioner.embedders.1.model.token_embedding.weight": (49408, 1280)}
SD3 = {"joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536), "x_embedder.proj.weight": (1536, 16, 2, 2)}
SD35M = SD3 | {"joint_blocks.0.x_block.attn2.qkv.weight": (4608, 1536),
               "joint_blocks.0.x_block.attn.ln_q.weight": (64,)}
SD35L = SD3 | {"joint_blocks.0.x_block.attn.ln_q.weight": (64,)}
SD3_FOLDER = {"transformer_blocks.0.attn.add_q_proj.weight": (1536, 1536), "pos_embed.proj.weight": (1536, 16, 2, 2)}
SD35M_FOLDER = SD3_FOLDER | {"transformer_blocks.0.attn2.to_q.weight": (1536, 1536),
                             "transformer_blocks.0.attn.norm_q.weight": (64,)}
DIT4SR = SD35M_FOLDER | {"transformer_blocks.0.attn.to_q_control.weight": (1536, 1536)}
FLUX = {"double_blocks.0.img_attn.qkv.weight": (9216, 3072), "single_blocks.0.linear1.weight": (21504, 3072),
        "img_in.weight": (3072, 64)}
FLUX_FOLDER = {"transformer_blocks.0.attn.add_q_proj.weight": (3072, 3072), "x_embedder.weight": (3072, 64),
               "single_transformer_blocks.0.attn.to_q.weight": (3072, 3072)}
VAE = {"encoder.conv_in.weight": (128, 3, 3, 3), "decoder.conv_out.weight": (3, 128, 3, 3)}
TEXT_ALONG = {"text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
              "first_stage_model.decoder.conv_in.weight": (512, 16, 3, 3),
              "first_stage_model.decoder.conv_out.weight": (3, 128, 3, 3),
              "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)}
LORA = "unet.down_blocks.1.attentions.0.transformer_blocks.0."


def prefixed(prefix, names):
    return {prefix + name: shape for name, shape in names.items()}


CASES = [
    ("sdxl", ldm_unet(2048, 2816) | SDXL_EXTRAS), ("sdxl", diffusers_unet(2048, 2816)),
    ("sdxl", diffusers_unet(32, 64)), ("sdxl_refiner", ldm_unet(1280, 2560)),
    ("sdxl_refiner", diffusers_unet(1280, 2560)), ("sd15", ldm_unet(768)), ("sd15", diffusers_unet(768)),
    ("sd2", ldm_unet(1024)), ("sd2", diffusers_unet(1024)),
    ("sd3", prefixed(LDM, SD3)), ("sd3", SD3_FOLDER), ("sd35_medium", prefixed(LDM, SD35M) | TEXT_ALONG),
    ("sd35_medium", SD35M), ("sd35_medium", SD35M_FOLDER), ("sd35_large", prefixed(LDM, SD35L)),
    ("sd35_large", SD3_FOLDER | {"transformer_blocks.0.attn.norm_q.weight": (64,)}), ("dit4sr", DIT4SR),
    ("dit4sr", prefixed("transformer.", DIT4SR)),
    ("flux", FLUX | {"guidance_in.in_layer.weight": (3072, 256)}), ("flux_schnell", FLUX),
    ("flux", prefixed(LDM, FLUX) | {f"{LDM}guidance_in.in_layer.weight": (3072, 256)} | TEXT_ALONG),
    ("flux", FLUX_FOLDER | {"time_text_embed.guidance_embedder.linear_1.weight": (3072, 256)}),
    ("flux_schnell", FLUX_FOLDER),
    ("flux_tools", FLUX | {"guidance_in.in_layer.weight": (3072, 256), "img_in.weight": (3072, 384),
                           "final_layer.linear.weight": (64, 3072)}),
    ("flux_tools", FLUX_FOLDER | {"x_embedder.weight": (3072, 128), "proj_out.weight": (64, 3072)}),
    ("flux", FLUX_FOLDER | {"time_text_embed.guidance_embedder.linear_1.weight": (3072, 256),
                            "proj_out.weight": (64, 3072)}),
    ("flux2", FLUX | {"double_stream_modulation_img.lin.weight": (18432, 3072)}),
    ("dreamsr", FLUX_FOLDER | {"control.image_injections.0.layers.0.weight": (3072, 3072)}),
    ("dreamsr", {"control.image_injections.0.layers.0.weight": (3072, 3072),
                 "ra_lora.transformer_blocks.0.attn.to_q.lora_A.weight": (256, 3072)}),
    ("instancersr", {"transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight": (1001, 1152),
                     "control.projections.0.weight": (1152, 1152)}),
    ("dit", {"transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight": (1001, 1152)}),
    ("dit", {"y_embedder.embedding_table.weight": (1001, 1152), "blocks.0.attn.qkv.weight": (3456, 1152)}),
    ("instantir_adapter", {"image_proj.latents": (1, 64, 1280), "ip_adapter.1.ln_k_ip.linear.weight": (2560, 1280)}),
    ("ip_adapter", {"image_proj.latents": (1, 16, 1280), "ip_adapter.1.to_k_ip.weight": (1280, 2048)}),
    ("instantir_aggregator", {"ref_conv_in.weight": (320, 4, 3, 3), "conv_in.weight": (320, 4, 3, 3),
                              "down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)}),
    ("instantir_previewer", {LORA + "attn1.to_q.lora_A.weight": (64, 640),
                             "unet.encoder_hid_proj.image_projection_layers.0.proj_in.lora_B.weight": (1280, 64)}),
    ("lora", {LORA + "attn1.to_q.lora.down.weight": (4, 640)}),
    ("controlnet", {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "conv_in.weight": (320, 4, 3, 3)}),
    ("sam", {"image_encoder.pos_embed": (1, 64, 64, 768), "mask_decoder.iou_token.weight": (1, 256)}),
    ("vae4", VAE | {"decoder.conv_in.weight": (512, 4, 3, 3)}),
    ("vae16", VAE | {"decoder.conv_in.weight": (512, 16, 3, 3)}),
    ("clip_l", {"text_model.embeddings.token_embedding.weight": (49408, 768)}),
    ("clip_g", {"text_model.embeddings.token_embedding.weight": (49408, 1280)}),
    ("clip", {"text_model.embeddings.token_embedding.weight": (99, 32)}),
    ("clip_vision", {"vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14)}),
    ("t5", {"shared.weight": (32128, 4096), "encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096)}),
    ("llava", {"language_model.model.embed_tokens.weight": (32064, 4096),
               "multi_modal_projector.linear_1.weight": (4096, 1024),
               "vision_tower.vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14)}),
    ("dinov2", {"embeddings.patch_embeddings.projection.weight": (1024, 3, 14, 14),
                "encoder.layer.0.layer_scale1.lambda1": (1024,)}),
    ("unknown", {"weight": (3, 3)}), ("unknown", {}),
]


@pytest.mark.parametrize(("family", "shapes"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_family_is_found_from_names_and_shapes(family, shapes):
    assert detect_family(Header({name: ("F16", shape) for name, shape in shapes.items()})) == family


def test_every_family_with_a_rule_is_tried_and_described():
    tried = {family for family, _ in CASES}
    own = {"instantir", "instancersr", "dreamsr", "codec", "text", "vision"}  # these name themselves
    assert tried | own == set(FAMILIES)
    assert all(text.startswith(("a ", "an ", "the ", "InstantIR's ")) for text in FAMILIES.values())


def test_the_method_a_file_names_goes_before_its_keys():
    header = Header({"conv_in.weight": ("F16", (1,))}, {"fourfold.method": "dreamsr"})
    assert detect_family(header) == "dreamsr"
    assert describe_family("something new") == "a checkpoint of the method 'something new'"


def test_a_pipeline_folder_counts_as_its_network(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({}))
    (tmp_path / "transformer").mkdir()
    state = {name: torch.zeros(shape[-1]) for name, shape in FLUX_FOLDER.items()}
    save_file(state, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert detect_family(tmp_path) == "flux_schnell"


def test_a_wrong_file_is_told_what_it_is_and_what_is_needed():
    header = Header({name: ("F16", shape) for name, shape in diffusers_unet(2048, 2816).items()})
    assert require_family(header, ("sd15", "sdxl"), "x.safetensors", "") == "sdxl"
    with pytest.raises(WrongFileError) as error:
        require_family(header, "dit4sr", "x.safetensors", "Choose dit4sr_q.")
    assert str(error.value) == ("x.safetensors is an SDXL checkpoint, but a DiT4SR transformer (SD3.5 medium with the "
                                "LR stream) is needed. Choose dit4sr_q.")
