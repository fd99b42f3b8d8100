"""DTFD-MIL (Zhang et al. 2022, arXiv 2203.12081) with attended means of pseudo-bags (its "AFS").

Legend: N tiles of all bags together, B bags, K pseudo-bags of all bags together, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pathfm.errors import UsageError
from pathfm.mil.aggregators.contract import Aggregator, Packed, Pooled, Side
from pathfm.mil.aggregators.positions import lot
from pathfm.mil.aggregators.segments import Scores, attend, attention_logit, bag_numbers
from pathfm.mil.products import TileLinear


class Dtfd(Aggregator):
    """Attention within pseudo-bags (tier 1), then attention over their means (tier 2); one loss trains both.

    In training each tile draws its pseudo-bag anew. Otherwise it is a function of the tile's place alone, so that an answer
    repeats and the order of the tiles has no part in it; tiles of one place stay together. A bag without positions is therefore
    one pseudo-bag. The attention of a tile is that within its pseudo-bag times that of the pseudo-bag.
    """

    uses_positions = True
    half_precision = True

    def __init__(self, width: int, outputs: int, attention: int = 64, pseudo_bags: int = 4) -> None:
        super().__init__()
        if pseudo_bags < 1:
            raise UsageError("pseudo_bags must be 1 or more", where="mil.options")
        self.pseudo_bags = pseudo_bags
        self.scores_1 = Scores(width, attention, 1)
        self.head_1 = TileLinear(width, outputs)
        self.scores_2 = Scores(width, attention, 1)
        self.head_2 = nn.Linear(width, outputs)

    def forward(self, packed: Packed) -> Pooled:
        """See ``Aggregator``."""
        bag_N = bag_numbers(packed.lengths, packed.tile_NH.device)
        number_N = bag_N * self.pseudo_bags + self._drawn(packed)
        number_K, part_N, count_K = torch.unique(number_N, return_inverse=True, return_counts=True)
        bag_K = number_K // self.pseudo_bags
        order_N = part_N.argsort(stable=True)
        sorted_NH = packed.tile_NH[order_N]
        vector_K1H, sorted_N1 = attend(self.scores_1(sorted_NH), sorted_NH, count_K.tolist())
        vector_KH = vector_K1H.squeeze(1)
        parts = bag_K.bincount(minlength=len(packed.lengths)).tolist()
        vector_B1H, attention_K1 = attend(self.scores_2(vector_KH), vector_KH, parts)
        slide_BH = vector_B1H.squeeze(1)
        attention_N1 = sorted_N1[order_N.argsort()] * attention_K1[part_N]
        side = Side(self.head_1(vector_KH), bag_K, 1.0)
        return Pooled(self.head_2(slide_BH), slide_BH, attention_N1, attention_logit(attention_N1), (side,))

    def _drawn(self, packed: Packed) -> Tensor:
        """The pseudo-bag of each tile, 0 and up in each bag."""
        if self.training and packed.noise is not None:
            size = (len(packed.tile_NH),)
            return torch.randint(self.pseudo_bags, size, generator=packed.noise, device=packed.tile_NH.device)
        return lot(packed.xy_N2) % self.pseudo_bags
