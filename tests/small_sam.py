"""A small random Segment Anything Model, built from segment-anything's own classes."""

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer


def build(checkpoint=None, width: int = 32) -> Sam:
    """A SAM that sees 64 px; like those of the registry it takes no checkpoint here."""
    assert checkpoint is None
    torch.manual_seed(0)
    sam = Sam(
        image_encoder=ImageEncoderViT(img_size=64, patch_size=16, embed_dim=width, depth=1, num_heads=2, mlp_ratio=1,
                                      out_chans=16, use_rel_pos=True, window_size=0, global_attn_indexes=(0,)),
        prompt_encoder=PromptEncoder(embed_dim=16, image_embedding_size=(4, 4), input_image_size=(64, 64),
                                     mask_in_chans=4),
        mask_decoder=MaskDecoder(
            transformer_dim=16,
            transformer=TwoWayTransformer(depth=1, embedding_dim=16, num_heads=2, mlp_dim=16),
            iou_head_depth=2, iou_head_hidden_dim=16),
        pixel_mean=[123.675, 116.28, 103.53], pixel_std=[58.395, 57.12, 57.375])
    if not next(sam.parameters()).is_meta:
        for parameter in sam.parameters():  # loud enough for masks that differ from prompt to prompt
            torch.nn.init.normal_(parameter, std=0.5)
    return sam.eval()
