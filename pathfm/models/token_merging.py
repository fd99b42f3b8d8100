"""Token merging for vision transformers: similar patches become one token on their way through the blocks.

Bolya et al., "Token Merging: Your ViT But Faster" (2023), arXiv 2210.09461: bipartite soft matching on the keys, between the
attention and the MLP of a block; a token that stands for n patches counts n times in attention. At the end every patch gets the
token it went into, so that pooling and patch maps work as ever, and merging tokens that are alike changes nothing.

Shapes: B tiles, T tokens (class and register tokens first, which are never merged), N of them left, D features, H heads, C
features of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.models.vision_transformer import Attention, Block, VisionTransformer  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional

from pathfm.errors import UsageError
from pathfm.models.attention import attention


class _Merging(NamedTuple):
    """Tokens [B, N, D], how many patches each stands for [B, N], and where each of the first tokens is now [B, T]."""

    tokens_BND: Tensor
    sizes_BN: Tensor
    home_BT: Tensor


def check_mergeable(model: nn.Module) -> None:
    """Refuses what is not made of timm's plain blocks.

    Raises:
        UsageError: windows, rotary positions, a feature pyramid and the like: merging is not defined here for them.
    """
    blocks = model.blocks if isinstance(model, VisionTransformer) else ()
    plain = all(type(block) is Block and type(block.attn) is Attention and block.attn.gate is None for block in blocks)
    is_usual = getattr(type(model), "forward_features", None) is VisionTransformer.forward_features
    if not blocks or not plain or not is_usual:
        what = f"tokens of {type(model).__name__} cannot be merged: only those of plain vision transformers can"
        raise UsageError(what, where="extract.merge_tokens", fix="set extract.merge_tokens: 0")


def merged_features(vit: nn.Module, images_BCHW: Tensor, share: float) -> Tensor:
    """``vit.forward_features`` [B, T, D], with so many patches merged before the last block.

    Args:
        vit: passes ``check_mergeable``.
        images_BCHW: normalised.
        share: part of the patches that is merged, in equal steps from block to block; 0 to 0.5.
    """
    prefix, depth = int(vit.num_prefix_tokens), len(vit.blocks)  # type: ignore[arg-type]
    x = vit.patch_embed(images_BCHW)  # type: ignore[operator]
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))  # type: ignore[operator]
    sizes_BN = torch.ones(x.shape[:2], device=x.device)
    home_BT = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    state, total, steps = _Merging(x, sizes_BN, home_BT), round(share * (x.shape[1] - prefix)), depth - 1
    for number, block in enumerate(vit.blocks):  # type: ignore[arg-type]
        count = total * (number + 1) // steps - total * number // steps if number < steps else 0
        state = _through(block, state, prefix, min(count, (state.tokens_BND.shape[1] - prefix) // 2))
    return _taken(vit.norm(state.tokens_BND), state.home_BT)  # type: ignore[operator]


def _through(block: Block, state: _Merging, prefix: int, count: int) -> _Merging:
    whole = state.tokens_BND.shape[1] == state.home_BT.shape[1]
    layer: Attention = block.attn  # type: ignore[assignment]
    attended_BND, keys_BNC = _attended(layer, block.norm1(state.tokens_BND), None if whole else state.sizes_BN)
    state = state._replace(tokens_BND=state.tokens_BND + block.ls1(attended_BND))
    if count:
        state = _merged(state, keys_BNC.float(), prefix, count)
    return state._replace(tokens_BND=state.tokens_BND + block.ls2(block.mlp(block.norm2(state.tokens_BND))))


def _attended(layer: Attention, x_BND: Tensor, sizes_BN: Tensor | None) -> tuple[Tensor, Tensor]:
    """What attention adds, and the mean key of the heads [B, N, C]. Without sizes every token counts once."""
    parts = layer.qkv(x_BND).unflatten(2, (3, layer.num_heads, layer.head_dim)).permute(2, 0, 3, 1, 4)
    q_BHNC, k_BHNC, v_BHNC = layer.q_norm(parts[0]), layer.k_norm(parts[1]), parts[2]
    if sizes_BN is None:
        heads_BHNC = attention(q_BHNC, k_BHNC, v_BHNC)
    else:
        logits_BHNN = (q_BHNC * layer.scale) @ k_BHNC.mT + sizes_BN.log()[:, None, None].to(q_BHNC.dtype)
        heads_BHNC = logits_BHNN.softmax(dim=-1).to(v_BHNC.dtype) @ v_BHNC
    return layer.proj(layer.norm(heads_BHNC.transpose(1, 2).flatten(2))), k_BHNC.mean(dim=1)


def _merged(state: _Merging, keys_BNC: Tensor, prefix: int, count: int) -> _Merging:
    """Every second patch may go into the most similar one of the others; the ``count`` most similar pairs do."""
    directions = functional.normalize(keys_BNC[:, prefix:], dim=-1)
    goers, stayers = directions[:, ::2], directions[:, 1::2]
    best_BG, partner_BG = (goers @ stayers.mT).max(dim=-1)
    order_BG = best_BG.argsort(dim=-1, descending=True, stable=True)
    moved_BM, kept_BK = order_BG[:, :count], order_BG[:, count:].sort(dim=-1).values
    partner_BM = partner_BG.gather(1, moved_BM)
    return _joined(state, prefix, moved_BM, kept_BK, partner_BM)


def _joined(state: _Merging, prefix: int, moved_BM: Tensor, kept_BK: Tensor, partner_BM: Tensor) -> _Merging:
    """New order: prefix, goers that were kept, stayers (with those who joined them)."""
    x, sizes = state.tokens_BND, state.sizes_BN[..., None]
    gone_x, gone_sizes = (_taken(part[:, prefix::2], moved_BM) for part in (x, sizes))
    stayed_x, stayed_sizes = x[:, prefix + 1 :: 2], sizes[:, prefix + 1 :: 2]
    # Sums by a product and not by scattering, whose order a GPU does not keep.
    joins_BSM = (partner_BM[:, None] == torch.arange(stayed_x.shape[1], device=x.device)[:, None]).float()
    with torch.autocast(x.device.type, enabled=False):
        new_sizes = stayed_sizes + joins_BSM @ gone_sizes
        new_x = (stayed_x * stayed_sizes + joins_BSM @ (gone_x.float() * gone_sizes)) / new_sizes
    first = prefix + kept_BK.shape[1]
    place_BN = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
    place_BN[:, prefix + 1 :: 2] = torch.arange(first, first + stayed_x.shape[1], device=x.device)
    rank_BK = torch.arange(prefix, first, device=x.device).expand(len(x), -1)
    place_BN.scatter_(1, prefix + 2 * kept_BK, rank_BK)
    place_BN.scatter_(1, prefix + 2 * moved_BM, first + partner_BM)
    return _Merging(
        torch.cat([x[:, :prefix], _taken(x[:, prefix::2], kept_BK), new_x.to(x.dtype)], dim=1),
        torch.cat([sizes[:, :prefix], _taken(sizes[:, prefix::2], kept_BK), new_sizes], dim=1)[..., 0],
        place_BN.gather(1, state.home_BT),
    )


def _taken(x_BND: Tensor, index_BM: Tensor) -> Tensor:
    """Rows of each tile [B, M, D]."""
    return x_BND.gather(1, index_BM[..., None].expand(-1, -1, x_BND.shape[2]))
