"""Vision transformer with a mask token, fed with crops of several sizes at once. The networks themselves are timm's.

Shapes: N images of one size, T tokens of an image (class token, registers, patches), P patches (row-major), D features,
X tokens of all images of all sizes, one after another.

Linear layers and norms see the tokens of all sizes at once, attention sees one size after the other (the plain-PyTorch form
of packing that DINOv3 uses): half the kernel launches and half the gathers of sharded weights, with the same numbers.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pathfm.errors import UsageError
from pathfm.models.attention import attention
from pathfm.pretrain_settings import PretrainSettings

SHORT_NAMES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
    "vit_giant": "vit_giant_patch14_dinov2",
}
# timm names that carry what cannot be written down in an export: classes of layers, kinds of positions. (rope, swiglu) -> name.
_BASES = {
    (False, True): "vit_giant_patch14_dinov2",
    (True, False): "vit_small_patch16_dinov3",
    (True, True): "vit_small_plus_patch16_dinov3",
}


class Tokens(NamedTuple):
    """What a transformer says about a batch, after its last norm."""

    cls_ND: Tensor
    patches_NPD: Tensor


def build_backbone(settings: PretrainSettings, img_px: int) -> nn.Module:
    """A vision transformer with fresh weights, without a classifier, that takes any image size its patches divide.

    Args:
        settings: backbone, patch_px, registers, layer_scale, mlp, positions and drop_path are read.
        img_px: image side of the position embedding's own grid [px].

    Returns:
        timm's VisionTransformer, or its Eva for rotary positions, whose weights plain timm loads.

    Raises:
        UsageError: the name is not a vision transformer of timm with a class token, or the patches do not divide the image.
    """
    name, arguments = timm_recipe(settings, img_px)
    vit: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    if settings.drop_path:
        for block in vit.blocks:  # type: ignore[union-attr]
            block.drop_path1, block.drop_path2 = DropPath(settings.drop_path), DropPath(settings.drop_path)
    return vit


def timm_recipe(settings: PretrainSettings, img_px: int) -> tuple[str, dict[str, Any]]:
    """The timm name and the arguments (plain JSON) that ``timm.create_model`` builds the backbone from; raises as it does."""
    name = SHORT_NAMES.get(settings.backbone, settings.backbone)
    plan = _plan(name)
    rope, swiglu = settings.positions == "rope", plan.swiglu or settings.mlp == "swiglu"
    if plan.rope and not rope:
        raise UsageError(f"{name!r} has rotary positions", where="pretrain.backbone", fix="set pretrain.positions to rope")
    patch_px = settings.patch_px or plan.patch_px
    if img_px % patch_px:
        raise UsageError(f"patches of {patch_px} px do not divide an image of {img_px} px", where="pretrain.backbone")
    arguments: dict[str, Any] = {
        "img_size": img_px,
        "patch_size": patch_px,
        "num_classes": 0,
        "global_pool": "token",
        "dynamic_img_size": True,
        # timm takes None for "as the name says". Its blocks with rotary positions cannot be without: 1 does nothing at first.
        "init_values": settings.layer_scale or (1.0 if rope else 0.0),
        "num_reg_tokens" if rope else "reg_tokens": settings.registers,
    }
    if settings.registers and not rope:
        arguments["no_embed_class"] = True
    if (rope, swiglu) == (plan.rope, plan.swiglu):
        return name, arguments
    hidden = plan.hidden
    if swiglu and not plan.swiglu:  # as many weights as before: two thirds as wide, in eights (DINOv2)
        hidden = -(-(hidden * 2 // 3) // 8) * 8
    counted = hidden * 2 if swiglu and not rope else hidden  # of this layer, timm counts both halves
    arguments |= {"embed_dim": plan.embed_dim, "depth": plan.depth, "num_heads": plan.heads}
    # timm cuts width x ratio to a whole number; the half keeps that cut away from the number that is meant.
    return _BASES[rope, swiglu], arguments | {"mlp_ratio": (counted + 0.5) / plan.embed_dim}


class _Plan(NamedTuple):
    """What a timm name stands for."""

    rope: bool
    swiglu: bool
    patch_px: int
    embed_dim: int
    depth: int
    heads: int
    hidden: int


@functools.cache
def _plan(name: str) -> _Plan:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*SHORT_NAMES, *timm.list_models("vit_*")], n=3)
        raise UsageError(
            f"timm has no model {name!r}", where="pretrain.backbone", fix=f"perhaps {', '.join(near)}" if near else ""
        )
    with torch.device("meta"):  # sizes without weights
        vit: Any = timm.create_model(name, pretrained=False)
    plain = isinstance(vit, VisionTransformer | Eva) and type(vit.blocks[0]) in _PACKED and vit.cls_token is not None
    if not plain or vit.blocks[0].attn.qkv is None or getattr(vit, "rope_mixed", False):
        raise UsageError(f"{name!r} is not a plain vision transformer with a class token", where="pretrain.backbone")
    mlp, heads = vit.blocks[0].mlp, vit.blocks[0].attn.num_heads
    patch_px = vit.patch_embed.patch_size[0]
    return _Plan(
        isinstance(vit, Eva), type(mlp) is not Mlp, patch_px, vit.embed_dim, len(vit.blocks), heads, mlp.fc2.in_features
    )


class Packing(NamedTuple):
    """Which tokens lie behind one another. Packed tokens are [X, D]; those of a single size stay [N, T, D].

    ``images`` and ``tokens`` are N and T of each size, ``kept`` how many of its images a residual branch is computed for,
    ``ropes`` its rotary positions.
    """

    images: tuple[int, ...]
    tokens: tuple[int, ...]
    kept: tuple[int, ...]
    ropes: tuple[Tensor | None, ...]


class _PackedBlock(nn.Module):
    """A block of timm that also takes packed tokens.

    The blocks of a timm network become these by their ``__class__``: their weights keep timm's names, and since packed tokens
    go through ``__call__``, what is hung on a block (FSDP2's hooks, ``compile``) works.
    """

    recomputes = False
    """Whether activations are computed again in the backward pass, within the hooks, instead of being kept."""
    attn: Any
    norm1: nn.Module
    norm2: nn.Module
    mlp: Any

    def forward(self, x: Tensor, packing: Packing | None = None, rows_2R: Tensor | None = None, **plain: object) -> Tensor:
        """Packed tokens after this block; without a packing, what timm does.

        Args:
            x: packed tokens.
            packing: how they are packed.
            rows_2R: rows of x that the two residual branches are computed for; None: all.
        """
        if packing is None:
            return super().forward(x, **plain)  # type: ignore[no-any-return]
        if self.recomputes and torch.is_grad_enabled():
            # Nothing in here draws random numbers, so none need to be kept.
            return checkpoint(self._both, x, packing, rows_2R, use_reentrant=False, preserve_rng_state=False)
        return self._both(x, packing, rows_2R)

    def _both(self, x: Tensor, packing: Packing, rows_2R: Tensor | None) -> Tensor:
        first, second = (None, None) if rows_2R is None else rows_2R.unbind()
        x = _add_branch(x, self._attend, packing, first)
        return _add_branch(x, self._feed, packing, second)

    def _scale(self, x: Tensor, branch: int) -> Tensor:
        raise NotImplementedError

    def _attend(self, x: Tensor, packing: Packing) -> Tensor:
        attn = self.attn
        qkv = attn.qkv(self.norm1(x))
        if getattr(attn, "q_bias", None) is not None:
            qkv = qkv + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]).to(qkv.dtype)
        sizes = [kept * tokens for kept, tokens in zip(packing.kept, packing.tokens, strict=True)]
        seen = []
        for part, tokens, rope in zip(qkv.flatten(0, -2).split(sizes), packing.tokens, packing.ropes, strict=True):
            q, k, v = part.view(-1, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind()
            q, k = attn.q_norm(q), attn.k_norm(k)
            if rope is not None:
                q, k = self._rotated(q, rope), self._rotated(k, rope)
            seen.append(attention(q, k, v).transpose(1, 2).flatten(2))
        whole = seen[0] if len(seen) == 1 else torch.cat([part.flatten(0, 1) for part in seen])
        return self._scale(attn.proj_drop(attn.proj(attn.norm(whole))), 1)

    def _rotated(self, heads_NHTC: Tensor, rope: Tensor) -> Tensor:
        """Queries or keys turned by the positions of their patches; class token and registers have none."""
        prefix = self.attn.num_prefix_tokens
        turned = apply_rot_embed_cat(heads_NHTC[:, :, prefix:], rope, half=self.attn.rotate_half)
        return torch.cat([heads_NHTC[:, :, :prefix], turned], dim=2).type_as(heads_NHTC)

    def _feed(self, x: Tensor, packing: Packing) -> Tensor:
        return self._scale(self.mlp(self.norm2(x)), 2)


class PackedVitBlock(_PackedBlock, Block):  # type: ignore[misc]
    """timm's block with LayerScale modules."""

    def _scale(self, x: Tensor, branch: int) -> Tensor:
        return self.ls1(x) if branch == 1 else self.ls2(x)  # type: ignore[no-any-return]


class PackedEvaBlock(_PackedBlock, EvaBlock):  # type: ignore[misc]
    """timm's block with rotary positions and LayerScale parameters."""

    def _scale(self, x: Tensor, branch: int) -> Tensor:
        gamma = self.gamma_1 if branch == 1 else self.gamma_2
        return x if gamma is None else gamma * x


_PACKED: dict[type, type] = {
    Block: PackedVitBlock,
    EvaBlock: PackedEvaBlock,
    PackedVitBlock: PackedVitBlock,
    PackedEvaBlock: PackedEvaBlock,
}


def _add_branch(x: Tensor, branch: Callable[[Tensor, Packing], Tensor], packing: Packing, rows_R: Tensor | None) -> Tensor:
    """x plus a residual branch of the given rows, scaled so that its expectation is that of the branch of all rows.

    This is DINOv2's stochastic depth: the rows left out are not computed, where ordinary stochastic depth multiplies by 0.
    """
    if rows_R is None:
        return x + branch(x, packing)
    added = branch(x.index_select(0, rows_R), packing).to(x.dtype)
    single = len(packing.images) == 1
    x, start = x.clone(), 0
    for images, tokens, kept in zip(packing.images, packing.tokens, packing.kept, strict=True):
        part = slice(start, start + kept * (1 if single else tokens))
        x.index_add_(0, rows_R[part], added[part], alpha=images / kept)
        start = part.stop
    return x


class MaskedViT(nn.Module):
    """A timm vision transformer whose patch embeddings can be replaced by a learned mask token (DINOv2, Oquab et al. 2023).

    The mask token is kept outside the timm network, so that its state loads into plain timm as it is.

    Attributes:
        vit: the network, as ``build_backbone`` makes it; its blocks learn to take packed tokens.
        position_offset: how positions are resized to other grids (``resized_positions``); 0.0 as timm does it.
        packs: whether sizes share a pass through the blocks; None: on GPUs, as it costs a processor 1-4 % more time.
    """

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit: Any = vit
        self.mask_token = nn.Parameter(torch.zeros(self.embed_dim))
        self.position_offset = 0.0
        self.packs: bool | None = None
        for block in self.blocks:
            block.__class__ = _PACKED[type(block)]

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, first to last."""
        return list(self.vit.blocks)

    @property
    def embed_dim(self) -> int:
        """Features per token."""
        return int(self.vit.embed_dim)

    @property
    def patch_px(self) -> int:
        """Side of a patch [px]."""
        return int(self.vit.patch_embed.patch_size[0])

    @property
    def drop_path(self) -> float:
        """Share of the images that a residual branch leaves out in training."""
        return float(getattr(self.blocks[0].drop_path1, "drop_prob", 0.0))

    def grid_side(self, img_px: int) -> int:
        """Patches along a side of an image."""
        return img_px // self.patch_px

    def tokens(self, images: Tensor, mask_NP: Tensor | None = None) -> Tokens:
        """Features of images of one size.

        Args:
            images: [N, 3, H, W], normalised.
            mask_NP: True where a patch is hidden behind the mask token.
        """
        only: Tokens = self([images], [mask_NP])[0]  # through __call__, for the hooks of sharded weights
        return only

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tokens]:
        """Features of several batches, each of its own image size.

        In training, stochastic depth draws from the global random generator of the crops' device.
        """
        embedded = [self._embedded(images, mask) for images, mask in zip(crops, masks, strict=True)]
        ropes = [self._rope(images) for images in crops]
        if not (crops[0].is_cuda if self.packs is None else self.packs):
            return [self._run([x_NTD], [rope])[0] for x_NTD, rope in zip(embedded, ropes, strict=True)]
        return self._run(embedded, ropes)

    def _run(self, embedded: list[Tensor], ropes: list[Tensor | None]) -> list[Tokens]:
        images, tokens = zip(*[x_NTD.shape[:2] for x_NTD in embedded], strict=True)
        drop_path = self.drop_path if self.training else 0.0
        kept = tuple(max(1, int(count * (1 - drop_path))) for count in images)
        packing = Packing(images, tokens, kept, tuple(ropes))
        single = len(embedded) == 1
        x = embedded[0] if single else torch.cat([part.flatten(0, 1) for part in embedded])
        draws = [None] * len(self.blocks) if kept == images else _drawn_rows(packing, len(self.blocks), x.device)
        for block, rows_2R in zip(self.blocks, draws, strict=True):
            x = block(x, packing, rows_2R)
        norm, prefix = self.vit.norm, self.vit.num_prefix_tokens
        sizes = [count * length for count, length in zip(images, tokens, strict=True)]
        parts = [part.view(y.shape) for part, y in zip(torch.split(x.flatten(0, -2), sizes), embedded, strict=True)]
        # Each on its own: registers need no norm, and results are no views, of which FSDP2's hooks are shy.
        return [Tokens(norm(part[:, 0]), norm(part[:, prefix:])) for part in parts]

    def _embedded(self, images: Tensor, mask_NP: Tensor | None) -> Tensor:
        """Tokens before the first block [N, T, D]: patches, some hidden, then positions, class token and registers."""
        vit = self.vit
        patches: Tensor = vit.patch_embed(images)
        grid = (patches.shape[1], patches.shape[2])
        x = patches.flatten(1, 2)
        if mask_NP is not None:
            x = torch.where(mask_NP.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        positions = vit.pos_embed
        if positions is not None:
            of_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
            positions = resized_positions(positions, grid, of_prefix, self.position_offset)
            x = x + positions[:, of_prefix:]
        prefix = torch.cat([token for token in (vit.cls_token, vit.reg_token) if token is not None], dim=1)
        if positions is not None and not vit.no_embed_class:
            prefix = prefix + positions[:, :of_prefix]
        return vit.norm_pre(torch.cat([prefix.expand(len(x), -1, -1).to(x.dtype), x], dim=1))  # type: ignore[no-any-return]

    def _rope(self, images: Tensor) -> Tensor | None:
        rope = getattr(self.vit, "rope", None)
        shape = [self.grid_side(side) for side in images.shape[-2:]]
        return None if rope is None else rope.get_embed(shape=shape)


def _drawn_rows(packing: Packing, blocks: int, device: torch.device) -> list[Tensor]:
    """For each block, the rows of packed tokens [2, R] whose images its two residual branches are computed for."""
    single, first, parts = len(packing.images) == 1, 0, []
    for images, tokens, kept in zip(packing.images, packing.tokens, packing.kept, strict=True):
        chosen = torch.rand(blocks, 2, images, device=device).argsort(-1)[..., :kept]
        if not single:
            chosen = (first + chosen.unsqueeze(-1) * tokens + torch.arange(tokens, device=device)).flatten(2)
        parts.append(chosen)
        first += images * tokens
    return list(torch.cat(parts, dim=2).unbind())


def resized_positions(positions_1LD: Tensor, grid: tuple[int, int], prefix: int, offset: float) -> Tensor:
    """Position embeddings for another grid of patches (rows, columns); those of the prefix tokens stay as they are.

    Args:
        positions_1LD: prefix tokens, then a square grid of patches.
        grid: wanted rows and columns.
        prefix: how many prefix tokens have positions.
        offset: 0.0 resizes as timm and the official DINOv2 networks with registers do, bicubic with antialiasing; 0.1 as the
            official ones without registers do, bicubic by (side + 0.1) / old side without it. Weights do not tell which.
    """
    side = math.isqrt(positions_1LD.shape[1] - prefix)
    if (side, side) == grid:
        return positions_1LD
    fixed, patches = positions_1LD[:, :prefix], positions_1LD[:, prefix:]
    image = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = image if image.dtype == torch.float64 else image.float()
    if offset:
        factors = [(count + offset) / side for count in grid]
        image = functional.interpolate(image, scale_factor=factors, mode="bicubic")
    else:
        image = functional.interpolate(image, size=grid, mode="bicubic", antialias=True)
    return torch.cat([fixed, image.permute(0, 2, 3, 1).flatten(1, 2).to(patches.dtype)], dim=1)
