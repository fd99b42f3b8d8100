"""How the tokens or the feature map of a tile become one vector, and how they lie on the tile.

Shapes: B tiles, T tokens (class and register tokens first), P patches (row by row), h x w their grid, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pathfm.errors import UsageError

Pool = Callable[[Tensor], Tensor]
GEM_POWER = 3.0
_WHERE = "extract.pooling"


def prefix_tokens(model: nn.Module) -> int:
    """How many of a network's tokens come before those of the patches: as it says, else its class tokens (CoaT, PiT, VOLO)."""
    stated = getattr(model, "num_prefix_tokens", None)
    if stated is not None:
        return int(stated)
    tokens = [token for name, token in model.named_parameters(recurse=False) if name.startswith("cls_token")]
    return max((token.shape[1] if token.ndim == 3 else 1 for token in tokens), default=0)


def has_class_token(model: nn.Module) -> bool:
    """Whether the first of a network's tokens stands for the whole picture. Registers alone are prefix tokens too."""
    prefix = prefix_tokens(model)
    return prefix > 0 and getattr(model, "cls_token", prefix) is not None


def pooling(model: nn.Module, rule: str) -> Pool:
    """The function from what ``model.forward_features`` gives to features [B, D].

    Args:
        model: gives tokens [B, T, D], or a map [B, D, h, w] ([B, h, w, D] where its ``output_fmt`` is NHWC).
        rule: cls, mean, cls+mean (class token, then the mean of the patches), gem (Radenovic et al. 2018), map-attention (the
            attention pool a network was trained with), or average: whatever the network's own head does before its classifier.

    Raises:
        UsageError: the network has no class token, or no attention pool; also by the function, where what the network gives is
            nothing that the rule could take.
    """
    if rule in {"cls", "cls+mean"} and not has_class_token(model):
        what = f"pooling {rule} needs a class token, and {type(model).__name__} has none"
        raise UsageError(what, where=_WHERE, fix="use mean, gem or average")
    if rule == "map-attention" and getattr(model, "attn_pool", None) is None:
        what = f"{type(model).__name__} was made without an attention pool"
        raise UsageError(what, where=_WHERE, fix="use mean, gem or average")
    head: Pool = lambda output: _head(model, output)  # noqa: E731
    rules: dict[str, Pool] = {
        "cls": lambda output: _class_token(model, output),
        "mean": lambda output: _mean(patches(model, output)),
        "cls+mean": lambda output: torch.cat([_class_token(model, output).float(), _mean(patches(model, output))], dim=1),
        "gem": lambda output: gem(patches(model, output)),
        "map-attention": head,
        "average": head,
    }
    return rules[rule]


def gem(patches_BPD: Tensor, power: float = GEM_POWER) -> Tensor:
    """Generalised mean [B, D] of what is positive: the mean at power 1, the largest value as the power grows."""
    values = patches_BPD.float().clamp(min=1e-6)
    largest = values.amax(dim=1, keepdim=True)  # taken out first: high powers would overflow
    return ((values / largest).pow(power).mean(dim=1).pow(1 / power)) * largest[:, 0]


def patches(model: nn.Module, output: Tensor) -> Tensor:
    """The patch tokens, or the cells of a feature map, row by row [B, P, D].

    Raises:
        UsageError: the network gives neither.
    """
    prefix = prefix_tokens(model)
    tokens = output.shape[1] if isinstance(output, Tensor) and output.ndim == 3 else 0
    if tokens > prefix:
        return output[:, prefix:]
    if not isinstance(output, Tensor) or output.ndim != 4:
        what = f"{type(model).__name__} gives {_said(output)} per tile and no patches"
        raise UsageError(what, where=_WHERE, fix="use average, and no dense features")
    is_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return output.flatten(1, 2) if is_last else output.flatten(2).mT


def patch_map(model: nn.Module, output: Tensor) -> Tensor:
    """Patch features as they lie on the tile [B, h, w, D], float32.

    Raises:
        UsageError: the network has no square grid of patches.
    """
    patches_BPD = patches(model, output)
    side = math.isqrt(patches_BPD.shape[1])
    if side * side != patches_BPD.shape[1]:
        what = f"the {patches_BPD.shape[1]} tokens of {type(model).__name__} are no square grid"
        raise UsageError(what, where="extract.dense", fix="use an encoder with one token per patch")
    return patches_BPD.reshape(len(output), side, side, -1).float()


def _said(output: object) -> str:
    """What a network gives for a tile, in words."""
    if not isinstance(output, Tensor):
        return f"a {type(output).__name__} of features"
    return "class tokens" if output.ndim == 3 else "one vector"


def _class_token(model: nn.Module, output: Tensor) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 3:
        what = f"{type(model).__name__} gives {_said(output)} per tile and no row of tokens"
        raise UsageError(what, where=_WHERE, fix="use average, and no dense features")
    return output[:, 0]


def _head(model: nn.Module, output: Tensor) -> Tensor:
    vectors: Tensor = model.forward_head(output, pre_logits=True)  # type: ignore[operator]
    if not isinstance(vectors, Tensor) or vectors.ndim != 2:
        what = f"the head of {type(model).__name__} does not give one vector per tile"
        raise UsageError(what, where=_WHERE, fix="use mean or gem")
    return vectors


def _mean(patches_BPD: Tensor) -> Tensor:
    return patches_BPD.mean(dim=1, dtype=torch.float32)
