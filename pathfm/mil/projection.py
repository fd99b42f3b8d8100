"""One matrix product for the first layer of several networks, in half precision without its usual cost in exactness.

Legend: N tiles, S stretches (tiles with one centre, mostly a bag), D feature length, H width, K the widths of all networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pathfm.mil.network import Network
from pathfm.mil.products import rows_product, summed_product


class Stretch(NamedTuple):
    """Tiles as their mean and what each differs from it.

    Features may lie far from zero compared with how they vary, where bfloat16 has no digits left for that; differences from the
    mean are exact enough, and the mean itself is handled in float32.

    Attributes:
        rest_ND: features less the centre, in the precision of training.
        centre_D: float32.
        xy_N2: where the tiles lie.
    """

    rest_ND: Tensor
    centre_D: Tensor
    xy_N2: Tensor

    def features(self) -> Tensor:
        """The features [N, D], float32."""
        return self.rest_ND.float() + self.centre_D

    def rows(self, rows: Tensor) -> Stretch:
        """Some of the tiles."""
        return Stretch(self.rest_ND[rows], self.centre_D, self.xy_N2[rows])


def project_together(networks: Sequence[Network], stretches: Sequence[Stretch]) -> Tensor:
    """What ``Network.embed`` gives for each network, side by side [N, K], in the precision of the stretches."""
    weights, biases = zip(*(network.folded() for network in networks), strict=True)
    weight_KD, bias_K = torch.cat(weights), torch.cat(biases)
    offset_SK = torch.stack([stretch.centre_D for stretch in stretches]) @ weight_KD.T + bias_K
    embedded_NK: Tensor = _Products.apply(weight_KD, offset_SK, *(stretch.rest_ND for stretch in stretches))
    return embedded_NK


class _Products(torch.autograd.Function):
    """Rests times weights plus offsets, stretch after stretch; gradients of several stretches are added in float32."""

    @staticmethod
    def forward(ctx: Any, weight_KD: Tensor, offset_SK: Tensor, *rests: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(*rests)
        weight_DK, offset_SK = weight_KD.to(rests[0].dtype).T, offset_SK.to(rests[0].dtype)
        lengths = [len(rest_ND) for rest_ND in rests]
        embedded_NK = rests[0].new_empty(sum(lengths), len(weight_KD))
        for part_NK, rest_ND, offset_K in zip(torch.split(embedded_NK, lengths), rests, offset_SK, strict=True):
            rows_product(rest_ND, weight_DK, offset_K, part_NK)
        return embedded_NK

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        rests = ctx.saved_tensors
        parts = torch.split(gradients[0], [len(rest_ND) for rest_ND in rests])
        weight_KD = torch.stack([summed_product(part_NK, rest_ND) for part_NK, rest_ND in zip(parts, rests, strict=True)]).sum(
            0
        )
        offset_SK = torch.stack([part_NK.sum(0).float() for part_NK in parts])
        return weight_KD, offset_SK, *[None] * len(rests)
