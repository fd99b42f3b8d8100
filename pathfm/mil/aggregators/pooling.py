"""Mean and maximum of the tiles: what attention has to beat. B bags, H width, O outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pathfm.mil.aggregators.contract import Aggregator, Packed, Pooled
from pathfm.mil.aggregators.segments import by_bag


class Mean(Aggregator):
    """The mean of the tiles, then one linear layer. Every tile weighs the same, so gradient x input says where it looks."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, outputs)

    def forward(self, packed: Packed) -> Pooled:
        """See ``Aggregator``."""
        slide_BH = torch.stack([self.pool(tile_LH) for tile_LH in by_bag(packed.tile_NH, packed.lengths)])
        return Pooled(self.head(slide_BH), slide_BH)

    def pool(self, tile_LH: Tensor) -> Tensor:
        """The vector [H] of one bag."""
        return tile_LH.mean(dim=0)


class Max(Mean):
    """The largest value of each channel, then one linear layer."""

    def pool(self, tile_LH: Tensor) -> Tensor:
        """The vector [H] of one bag."""
        return tile_LH.amax(dim=0)
