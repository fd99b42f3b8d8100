"""The yardstick of slide classifiers: gated attention trained as CLAM trains it.

One bag per step, fp32, the two branches of the attention as layers of their own, dropout of the tensor library, features read
from HDF5 when they are needed. Only what any loop would do; written for these benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import h5py
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pathfm.mil.network import Network


class PlainAttention(nn.Module):
    """Projection with ReLU and dropout, gated attention, one linear head; CLAM does not standardise features, this may."""

    def __init__(self, dim: int, hidden: int, attention: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.standardise: tuple[Tensor, Tensor] | None = None
        self.project = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.value = nn.Sequential(nn.Linear(hidden, attention), nn.Tanh())
        self.gate = nn.Sequential(nn.Linear(hidden, attention), nn.Sigmoid())
        self.score = nn.Linear(attention, 1)
        self.head = nn.Linear(hidden, classes)

    def forward(self, feature_ND: Tensor) -> Tensor:
        """Class logits [1, C]."""
        if self.standardise is not None:
            mean_D, scale_D = self.standardise
            feature_ND = (feature_ND - mean_D) / scale_D
        tile_NH = self.project(feature_ND)
        attention_1N = self.score(self.value(tile_NH) * self.gate(tile_NH)).T.softmax(dim=1)
        return self.head(attention_1N @ tile_NH)

    def start_from(self, network: Network, standardised: bool = False) -> None:
        """The weights of one of ours (an ``abmil``), so that both start the same: its standardisation folded in, or made."""
        scores = network.aggregator.scores
        half = len(scores.project.weight) // 2
        weight_HD, bias_H = network.folded()
        if standardised:
            self.standardise = network.mean_D, network.scale_D
            weight_HD, bias_H = network.project.weight, network.project.bias
        pairs = (
            (self.project[0], weight_HD, bias_H),
            (self.value[0], scores.project.weight[:half], scores.project.bias[:half]),
            (self.gate[0], scores.project.weight[half:], scores.project.bias[half:]),
            (self.score, scores.score.weight, scores.score.bias),
            (self.head, network.aggregator.head.weight, network.aggregator.head.bias),
        )
        with torch.no_grad():
            for layer, weight, bias in pairs:
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)


class PlainTraining:
    """A training run that is asked for one epoch after the other."""

    def __init__(self, model: PlainAttention, paths: Sequence[Path], lr: float, weight_decay: float, epochs: int) -> None:
        self.model, self.paths = model, list(paths)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: (1 + math.cos(math.pi * step / (epochs * len(paths)))) / 2
        )

    def epoch(self, order: Sequence[int]) -> float:
        """Mean loss over the bags in this order; odd ones are positive."""
        self.model.train()
        total = 0.0
        for number in order:
            with h5py.File(self.paths[number], "r") as file:
                feature_ND = torch.from_numpy(file["features"][()]).float()
            loss = cross_entropy(self.model(feature_ND), torch.tensor([number % 2]))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.item()
        return total / len(order)
