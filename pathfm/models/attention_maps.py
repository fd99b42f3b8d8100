"""What a vision transformer's class token attends to: each head of each block, their mean, and attention rollout.

The network runs as it always does; its attention is watched from outside (a ``TorchFunctionMode`` sees every
scaled_dot_product_attention and softmax), so features do not change by a bit, whichever blocks it is made of: timm's
VisionTransformer, its Eva with rotary positions, BEiT with position biases, our own exports, networks of transformers.

Rollout: Abnar & Zuidema, "Quantifying Attention Flow in Transformers" (2020), arXiv 2005.00928.

Shapes: B tiles, L blocks, H heads, T tokens (class token, other prefix tokens, patches row by row), h x w patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pathfm.errors import UsageError
from pathfm.models.pooling import has_class_token, prefix_tokens

SOFTMAXES = {torch.softmax, Tensor.softmax, functional.softmax}
FIX = "choose a vision transformer with a class token"


class AttentionMaps(NamedTuple):
    """What the class token attends to.

    Attributes:
        class_LBHT: its attention to every token, of each block and head; sums to 1 over T.
        rollout_BT: how much each token's input reaches it through all blocks; sums to 1 over T.
        prefix: class token, registers and the like, before the patches.
        grid: rows and columns of patches.
    """

    class_LBHT: Tensor
    rollout_BT: Tensor
    prefix: int
    grid: tuple[int, int]

    def heads(self, block: int = -1) -> Tensor:
        """Attention to the patches [B, H, h, w] of each head of a block (-1: the last); the rest of 1 goes to the prefix."""
        patches_BHP = self.class_LBHT[block, :, :, self.prefix :]
        return patches_BHP.reshape(*patches_BHP.shape[:2], *self.grid)

    def rollout(self) -> Tensor:
        """Rollout to the patches [B, h, w]."""
        return self.rollout_BT[:, self.prefix :].reshape(-1, *self.grid)


@torch.inference_mode()
def attention_maps(model: nn.Module, images_BCHW: Tensor) -> AttentionMaps:
    """Attention of the class token in every block of a network.

    Args:
        model: ``forward_features`` gives tokens [B, T, D], first the class token, ``num_prefix_tokens`` of them no patches.
        images_BCHW: prepared as for features, on the network's device.

    Raises:
        UsageError: the network has no class token, or its blocks do not attend from every token to every token.
    """
    if not has_class_token(model):
        raise UsageError(f"{type(model).__name__} has no class token whose attention could be shown", fix=FIX)
    prefix = prefix_tokens(model)
    with _Watch(len(images_BCHW)) as seen:
        tokens_BTD = model.forward_features(images_BCHW)  # type: ignore[operator]
    length = tokens_BTD.shape[1] if isinstance(tokens_BTD, Tensor) and tokens_BTD.ndim == 3 else 0
    side = math.isqrt(max(0, length - prefix))
    if seen.rollout_BTT is None or seen.lengths != {length} or side * side != length - prefix:
        what = f"the blocks of {type(model).__name__} do not attend from every token to every token"
        raise UsageError(what, fix=FIX)
    return AttentionMaps(torch.stack(seen.class_BHT), seen.rollout_BTT[:, 0], prefix, (side, side))


class _Watch(TorchFunctionMode):
    """Notes the attention of the class token of each block, and multiplies the rollout up, one block's matrix at a time."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self._batch = batch
        self.class_BHT: list[Tensor] = []
        self.rollout_BTT: Tensor | None = None
        self.lengths: set[int] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function gives
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            self._note(_weights(*args, **kwargs))
        elif func in SOFTMAXES:
            self._note(result)
        return result

    def _note(self, weights: Tensor) -> None:
        if weights.ndim != 4 or weights.shape[0] != self._batch or weights.shape[2] != weights.shape[3]:
            self.lengths.add(0)  # windows, or the attention of a few queries: no map of this kind
            return
        attention_BHTT = weights.float()
        self.lengths.add(attention_BHTT.shape[-1])
        self.class_BHT.append(attention_BHTT[:, :, 0].clone())
        if len(self.lengths) > 1:
            return
        eye = torch.eye(attention_BHTT.shape[-1], device=weights.device)
        step_BTT = (attention_BHTT.mean(1) + eye) / 2  # half of a token goes around the block, by its residual connection
        self.rollout_BTT = step_BTT if self.rollout_BTT is None else step_BTT @ self.rollout_BTT


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,  # noqa: ANN401 - scale and enable_gqa, as torch has them
) -> Tensor:
    """The attention matrix that ``scaled_dot_product_attention`` applies to ``value`` without ever showing it."""
    scale: float = more.get("scale") or query.shape[-1] ** -0.5
    if more.get("enable_gqa"):
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    logits: Tensor = (query.float() * scale) @ key.float().mT
    if attn_mask is not None:
        hidden = torch.zeros_like(logits).masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else attn_mask
        logits = logits + hidden
    if is_causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
    return torch.softmax(logits, -1)
