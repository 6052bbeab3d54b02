"""Image encoder: timm's Vision Transformer with the mask token of masked image modelling.

B batch, R resolution, N tokens = [CLS] + patches row by row, D width.
"""

from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simla.utils import UserError


def vit_sizes(config: dict) -> dict:
    """Return the keyword arguments of the image encoder from a task's config."""
    return {
        "img_size": config["image_res"],
        "embed_dim": config["vision_width"],
        "mask_token": config.get("vit_mask_token", True),  # pre-training always has it, and no such key
        **config["vit"],
    }


class VisionTransformer(TimmVisionTransformer):
    """ViT whose masked patches are replaced by a learned token before positions are added (BEiT).

    The blocks, and the state-dict names, are timm's; `mask_token=True` adds `mask_token`. With
    `checkpoint_activations` the backward pass computes a block again instead of keeping what it needs.
    """

    def __init__(
        self,
        img_size: int = 256,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        mask_token: bool = False,
    ):
        if img_size % patch_size:
            raise UserError(f"image_res {img_size} is not a multiple of the patch size {patch_size}")
        if embed_dim % num_heads:
            raise UserError(f"vision_width {embed_dim} is not a multiple of vit.num_heads {num_heads}")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            norm_layer=partial(nn.LayerNorm, eps=norm_eps),
            num_classes=0,
            global_pool="",
            weight_init="jax",  # Xavier: with timm's std of 0.02 narrow models start from scratch slowly
        )
        self.checkpoint_activations = False
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if mask_token else None
        if mask_token:
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def embed(self, image: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """Return the tokens before the first block; arguments and shape as in `forward`."""
        tokens = self.patch_embed(image)  # (B, N-1, D)
        if patch_mask is not None:
            tokens = torch.where(patch_mask.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.pos_drop(tokens + self.pos_embed)

    def forward(self, image: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """Return token states (B, N, D) after the last norm: image (B, 3, R, R); patch_mask (B, N-1) bool,
        True where the patch is hidden.
        """
        tokens = self.embed(image, patch_mask)
        for block in self.blocks:
            if self.checkpoint_activations:
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return self.norm(tokens)
