"""Attention over the tiles of each bag, where all bags lie end to end: bag by bag, so that nothing is padded or masked.

A loop over bags repeats exactly, gives a bag the same numbers beside any neighbours, and is quicker on a CPU than products with
one row per bag and -inf at the tiles of others.

Legend: N tiles of all bags together, B bags, H width, A attention width, Q queries, L tiles of one bag.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pathfm.mil.products import TileLinear, weighted_sums


class Attended(NamedTuple):
    """Weighted means of the tiles of each bag.

    Attributes:
        vector_BQH: one mean per bag and query.
        attention_NQ: the weights; they sum to 1 over the tiles of a bag.
    """

    vector_BQH: Tensor
    attention_NQ: Tensor


def by_bag(value_N: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """The rows of each bag."""
    parts: tuple[Tensor, ...] = torch.split(value_N, list(lengths))
    return parts


def bag_numbers(lengths: Sequence[int], device: torch.device) -> Tensor:
    """The bag of each tile [N]."""
    bag_B = torch.arange(len(lengths), device=device)
    return bag_B.repeat_interleave(torch.tensor(lengths, device=device), output_size=sum(lengths))


def attend(logit_NQ: Tensor, tile_NH: Tensor, lengths: Sequence[int]) -> Attended:
    """Softmax over the tiles of each bag (in single precision), and the means with these weights."""
    attentions = [logit_LQ.softmax(dim=0) for logit_LQ in by_bag(logit_NQ.float(), lengths)]
    bags = zip(attentions, by_bag(tile_NH, lengths), strict=True)
    vectors = [weighted_sums(attention_LQ, tile_LH) for attention_LQ, tile_LH in bags]
    return Attended(torch.stack(vectors), torch.cat(attentions))


def attention_logit(attention_NQ: Tensor) -> Tensor:
    """Logits whose softmax is this attention."""
    return attention_NQ.clamp_min(torch.finfo(attention_NQ.dtype).tiny).log()


class Scores(nn.Module):
    """Attention logits of Ilse, Tomczak and Welling (2018): w . (tanh(V h) * sigmoid(U h)), or w . tanh(V h) without the gate.

    V and U are one matrix: rows 0..A-1 are V, the others U. Each query has its own w.
    """

    def __init__(self, width: int, attention: int, queries: int, gated: bool = True) -> None:
        super().__init__()
        self.gated = gated
        self.project = TileLinear(width, 2 * attention if gated else attention)
        self.score = TileLinear(attention, queries)

    def forward(self, tile_NH: Tensor) -> Tensor:
        """Logits [N, Q]."""
        hidden_NA: Tensor = self.project(tile_NH)
        if self.gated:
            value_NA, gate_NA = hidden_NA.chunk(2, dim=1)
            hidden_NA = value_NA.tanh() * gate_NA.sigmoid()
        else:
            hidden_NA = hidden_NA.tanh()
        logit_NQ: Tensor = self.score(hidden_NA)
        return logit_NQ
