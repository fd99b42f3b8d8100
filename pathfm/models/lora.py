"""Training a part of a network: low-rank additions to its linear layers (LoRA, Hu et al. 2021), or its last blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pathfm.models.vit import MaskedViT

_DOWN, _UP = "lora_down", "lora_up"


class LoraLinear(nn.Linear):
    """A linear layer plus a product of thin matrices: y = (W + up down) x + b, W [out, in], up [out, rank], down [rank, in].

    Layers become this by their ``__class__``, so that weight and bias keep their names. The product is not scaled: AdamW does
    not care, and one number less has to be remembered for merging.
    """

    lora_down: nn.Parameter
    lora_up: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        added = functional.linear(functional.linear(input, self.lora_down), self.lora_up)
        return super().forward(input) + added


def add_lora(vit: nn.Module, rank: int) -> None:
    """Freezes a network and adds trainable low-rank matrices to every linear layer of its blocks. At first they change nothing.

    Args:
        vit: a timm vision transformer, as ``build_backbone`` makes it.
        rank: of the additions.
    """
    vit.requires_grad_(False)
    for block in vit.blocks:  # type: ignore[union-attr]
        for layer in [module for module in block.modules() if type(module) is nn.Linear]:
            _become_lora(layer, rank)


def _become_lora(layer: nn.Linear, rank: int) -> None:
    weight = layer.weight
    down = torch.empty(rank, layer.in_features, dtype=weight.dtype, device=weight.device)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    layer.lora_down = nn.Parameter(down)
    layer.lora_up = nn.Parameter(torch.zeros(layer.out_features, rank, dtype=weight.dtype, device=weight.device))
    layer.__class__ = LoraLinear


def merged_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with its low-rank additions folded into the weights, which is that of the network without them.

    Args:
        state: of a network that ``add_lora`` has changed, or of a module that holds one.
    """
    merged = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        if kind in (_DOWN, _UP):
            continue
        down, up = state.get(f"{layer}.{_DOWN}"), state.get(f"{layer}.{_UP}")
        if kind == "weight" and down is not None and up is not None:
            # In double precision: one rounding, that of the sum.
            tensor = (tensor.double() + up.double() @ down.double()).to(tensor.dtype)
        merged[name] = tensor
    return merged


def train_last(backbone: MaskedViT, blocks: int) -> None:
    """Freezes all but the last blocks, the final norm, and the mask token, which other weights rarely bring."""
    backbone.requires_grad_(False)
    last: list[Any] = [*backbone.blocks[-blocks:], backbone.vit.norm, backbone.mask_token]
    for module in last:
        module.requires_grad_(True)
