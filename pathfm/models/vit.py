"""Vision transformer with a mask token, fed with crops of several sizes at once. The network itself is timm's.

Shapes: N images, P patches of an image (row-major), D features.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.layers.drop import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pathfm.errors import UsageError


class Tokens(NamedTuple):
    """What a transformer says about a batch, after its last norm."""

    cls_ND: Tensor
    patches_NPD: Tensor


def build_backbone(
    name: str,
    img_px: int,
    patch_px: int | None = None,
    *,
    registers: int = 0,
    drop_path: float = 0.0,
    layer_scale: float = 0.0,
) -> VisionTransformer:
    """A timm vision transformer with fresh weights, without a classifier, that takes any image size its patches divide.

    Args:
        name: timm name, as ``vit_small_patch16_224``.
        img_px: image side of the position embedding's own grid [px].
        patch_px: patch side that replaces the one in the name [px].
        registers: register tokens (Darcet et al. 2023); they carry no position.
        drop_path: stochastic depth, the same in every block as in DINOv2.
        layer_scale: initial LayerScale; 0 for none.

    Raises:
        UsageError: the name is not a vision transformer of timm, or the patches do not divide the image.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models("vit_*"), n=3)
        raise UsageError(
            f"timm has no model {name!r}", where="pretrain.backbone", fix=f"perhaps {', '.join(near)}" if near else ""
        )
    arguments: dict[str, Any] = {
        "img_size": img_px,
        "num_classes": 0,
        "dynamic_img_size": True,
        "init_values": layer_scale or None,
    }
    if patch_px:
        arguments["patch_size"] = patch_px
    if registers:
        arguments |= {"reg_tokens": registers, "no_embed_class": True}
    stranger = UsageError(f"{name!r} is not a vision transformer with a class token", where="pretrain.backbone")
    try:
        vit = timm.create_model(name, pretrained=False, **arguments)
    except TypeError as error:
        raise stranger from error
    if not isinstance(vit, VisionTransformer) or not vit.has_class_token:
        raise stranger
    side_px = vit.patch_embed.patch_size[0]
    if img_px % side_px:
        raise UsageError(f"patches of {side_px} px do not divide an image of {img_px} px", where="pretrain.backbone")
    if drop_path:
        for block in vit.blocks:
            block.drop_path1, block.drop_path2 = DropPath(drop_path), DropPath(drop_path)
    return vit


class MaskedViT(nn.Module):
    """A timm vision transformer whose patch embeddings can be replaced by a learned mask token (DINOv2, Oquab et al. 2023).

    The mask token is kept outside the timm network, so that its state loads into plain timm as it is.
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit
        self.mask_token = nn.Parameter(torch.zeros(vit.embed_dim))

    @property
    def embed_dim(self) -> int:
        """Features per token."""
        return int(self.vit.embed_dim)

    @property
    def patch_px(self) -> int:
        """Side of a patch [px]."""
        return int(self.vit.patch_embed.patch_size[0])

    def grid_side(self, img_px: int) -> int:
        """Patches along a side of an image."""
        return img_px // self.patch_px

    def tokens(self, images: Tensor, mask_NP: Tensor | None = None) -> Tokens:
        """Features of images of one size.

        Args:
            images: [N, 3, H, W], normalised.
            mask_NP: True where a patch is hidden behind the mask token.
        """
        vit = self.vit
        embedded = vit.patch_embed(images)
        if mask_NP is not None:
            hidden = mask_NP.view(*embedded.shape[:3], 1)
            embedded = torch.where(hidden, self.mask_token.to(embedded.dtype), embedded)
        out: Tensor = vit.norm(vit.blocks(vit.norm_pre(vit._pos_embed(embedded))))
        return Tokens(out[:, 0], out[:, vit.num_prefix_tokens :])

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tokens]:
        """Features of several batches, each of its own image size."""
        return [self.tokens(images, mask) for images, mask in zip(crops, masks, strict=True)]
