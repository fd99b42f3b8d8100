"""DSMIL (Li, Li and Eliceiri 2021, arXiv 2011.08939): every tile attends by its likeness to the most decisive one.

Legend: N tiles of all bags together, B bags, L tiles of one bag, H width, A attention width, O outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pathfm.mil.aggregators.contract import Aggregator, Packed, Pooled, Side
from pathfm.mil.aggregators.segments import attend, by_bag
from pathfm.mil.products import TileLinear, linear


class Dsmil(Aggregator):
    """Two streams, judged with the same weight in training: the largest tile score of each output, and the attended bag.

    The tile with the largest score of an output is critical for it. What attends is the likeness of queries (tanh of two
    layers) to that of the critical tile. Predictions are those of the attended bag alone.
    """

    half_precision = True

    def __init__(self, width: int, outputs: int, attention: int = 64) -> None:
        super().__init__()
        self.instance = TileLinear(width, outputs)
        self.query = nn.Sequential(TileLinear(width, attention), nn.ReLU(), TileLinear(attention, attention), nn.Tanh())
        self.head = nn.Linear(outputs * width, outputs)

    def forward(self, packed: Packed) -> Pooled:
        """See ``Aggregator``."""
        lengths = list(packed.lengths)
        tops = [score_LO.max(dim=0) for score_LO in by_bag(self.instance(packed.tile_NH), lengths)]
        queries = by_bag(self.query(packed.tile_NH), lengths)
        logit_NO = torch.cat([_likeness(query_LA, top.indices) for query_LA, top in zip(queries, tops, strict=True)])
        vector_BOH, attention_NO = attend(logit_NO, packed.tile_NH, lengths)
        slide_BH = vector_BOH.flatten(1)
        bag_B = torch.arange(len(lengths), device=slide_BH.device)
        side = Side(torch.stack([top.values for top in tops]), bag_B, 0.5)
        return Pooled(self.head(slide_BH), slide_BH, attention_NO, logit_NO, (side,), 0.5)


def _likeness(query_LA: Tensor, critical_O: Tensor) -> Tensor:
    return linear(query_LA, query_LA[critical_O]) / math.sqrt(query_LA.shape[1])
