"""Tiles to one prediction: attention pooling of Ilse, Tomczak and Welling (2018), over bags of any size packed end to end.

Legend: N tiles of all bags together, B bags, D feature length, H hidden width, A attention width, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pathfm.errors import SlideError


class Pooled(NamedTuple):
    """Bag vectors and what they were made of.

    Attributes:
        slide_BH: attention-weighted means of the tiles.
        attention_N: weight of each tile; sums to 1 over the tiles of a bag.
        attention_logit_N: the same before the softmax.
    """

    slide_BH: Tensor
    attention_N: Tensor
    attention_logit_N: Tensor


class Verdict(NamedTuple):
    """Class scores of each bag before the softmax, and the attention behind them (see ``Pooled``)."""

    logit_BC: Tensor
    attention_N: Tensor
    attention_logit_N: Tensor


class AttentionPool(nn.Module):
    """a_i = w . (tanh(V h_i) * sigmoid(U h_i)), or w . tanh(V h_i) without the gate; weights = softmax of a over the bag.

    V and U are one matrix: rows 0..A-1 are V, the others U.
    """

    def __init__(self, width: int, attention: int, gated: bool = True) -> None:
        super().__init__()
        self.gated = gated
        self.project = nn.Linear(width, 2 * attention if gated else attention)
        self.score = nn.Linear(attention, 1)

    def forward(self, tile_NH: Tensor, lengths: Sequence[int]) -> Pooled:
        """Pools consecutive runs of ``lengths`` tiles.

        Raises:
            SlideError: a bag has no tiles.
            ValueError: the lengths do not add up to N.
        """
        _check_lengths(lengths, len(tile_NH))
        hidden_NA = self.project(tile_NH)
        if self.gated:
            value_NA, gate_NA = hidden_NA.chunk(2, dim=1)
            hidden_NA = value_NA.tanh() * gate_NA.sigmoid()
        else:
            hidden_NA = hidden_NA.tanh()
        logit_N = self.score(hidden_NA).squeeze(1)
        bag_B = torch.arange(len(lengths), device=tile_NH.device)
        bag_N = bag_B.repeat_interleave(torch.tensor(lengths, device=tile_NH.device), output_size=len(tile_NH))
        # One row per bag with -inf at the tiles of others: a dense product is faster than scattered sums, and repeats exactly.
        attention_BN = logit_N.masked_fill(bag_N != bag_B[:, None], -math.inf).softmax(dim=1)
        return Pooled(attention_BN @ tile_NH, attention_BN.sum(dim=0), logit_N)


class AttentionMil(nn.Module):
    """Standardise, project, pool by gated attention, classify.

    The standardisation (mean and scale of the training tiles) is part of the state, so that it cannot be forgotten or refitted.
    Weights are drawn from ``generator``, dropout masks from the one given to ``forward``: no global state is touched or used.
    """

    mean_D: Tensor
    scale_D: Tensor

    def __init__(self, dim: int, hidden: int, attention: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.register_buffer("mean_D", torch.zeros(dim))
        self.register_buffer("scale_D", torch.ones(dim))
        self.project = nn.Linear(dim, hidden)
        self.pool = AttentionPool(hidden, attention)
        self.head = nn.Linear(hidden, classes)

    def draw_weights(self, generator: torch.Generator) -> None:
        """Fresh weights (Xavier uniform, biases 0); the generator lives on the CPU, so that every device starts the same."""
        for layer in (self.project, self.pool.project, self.pool.score, self.head):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, feature_ND: Tensor, lengths: Sequence[int], noise: torch.Generator | None = None) -> Verdict:
        """Classifies bags packed end to end.

        Args:
            feature_ND: features of all tiles, bag after bag.
            lengths: tiles of each bag.
            noise: source of dropout masks (training mode only).

        Raises:
            SlideError: a bag has no tiles.
        """
        hidden_NH = self.project((feature_ND - self.mean_D) / self.scale_D).relu()
        if self.training and self.dropout > 0:
            keep_NH = torch.empty_like(hidden_NH).bernoulli_(1 - self.dropout, generator=noise)
            hidden_NH = hidden_NH * keep_NH / (1 - self.dropout)
        pooled = self.pool(hidden_NH, lengths)
        return Verdict(self.head(pooled.slide_BH), pooled.attention_N, pooled.attention_logit_N)


def _check_lengths(lengths: Sequence[int], tiles: int) -> None:
    if sum(lengths) != tiles:
        raise ValueError(f"bag lengths add up to {sum(lengths)}, but there are {tiles} tiles")
    empty = [index for index, length in enumerate(lengths) if length < 1]
    if empty or not lengths:
        raise SlideError("a bag without tiles cannot be classified", where=f"bag {empty[0] if empty else 0} of {len(lengths)}")
