"""Bags as they arrive, collected into batches; some of them several times, where rare classes are to be drawn more often.

Legend: F bags of the training part.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pathfm.mil.augment import Batch, make_batch
from pathfm.mil.projection import Stretch

WINDOW = 32
"""Bags among which the copies of a bag are strewn: so many are held at most, beside the batch."""


class _Waiting(NamedTuple):
    due: int
    bag: int
    stretch: Stretch


class Collector:
    """Batches of one epoch.

    Args:
        batch_bags: bags that make a batch.
        copies_F: how often each bag is learned from; None: once.
        chance: when the copies come.
    """

    def __init__(self, batch_bags: int, copies_F: list[int] | None = None, chance: torch.Generator | None = None) -> None:
        self._batch_bags, self._copies_F, self._chance = batch_bags, copies_F, chance
        self._waiting: list[_Waiting] = []
        self._ready: list[_Waiting] = []
        self._arrived = 0

    def add(self, index: int, stretch: Stretch) -> list[Batch]:
        """Takes in a bag, known by its index in the training part; gives the batches that are now full."""
        copies = 1 if self._copies_F is None else self._copies_F[index]
        for _ in range(copies):
            later = 0 if copies == 1 else int(torch.randint(WINDOW, (), generator=self._chance))
            self._waiting.append(_Waiting(self._arrived + later, index, stretch))
        self._ready += [item for item in self._waiting if item.due <= self._arrived]
        self._waiting = [item for item in self._waiting if item.due > self._arrived]
        self._arrived += 1
        return self._full(self._batch_bags)

    def rest(self) -> list[Batch]:
        """What is left at the end; the last batch may be smaller."""
        self._ready += sorted(self._waiting, key=lambda item: item.due)
        self._waiting = []
        return self._full(1)

    def _full(self, least: int) -> list[Batch]:
        batches = []
        while len(self._ready) >= least:
            items, self._ready = self._ready[: self._batch_bags], self._ready[self._batch_bags :]
            batches.append(make_batch([item.stretch for item in items], [item.bag for item in items]))
        return batches


def draw_copies(weight_F: NDArray[np.float64], chance: torch.Generator) -> list[int]:
    """How often each bag is learned from in an epoch: on average its weight, all together as many times as there are bags.

    Systematic resampling, in a drawn order.
    """
    order = torch.randperm(len(weight_F), generator=chance).numpy()
    start = float(torch.rand((), generator=chance, dtype=torch.float64))
    ends = np.floor(np.cumsum(weight_F[order]) / weight_F.mean() + start).astype(int)
    ends[-1] = len(weight_F) + math.floor(start)
    copies_F = np.empty(len(weight_F), dtype=int)
    copies_F[order] = np.diff(ends, prepend=0)
    return [int(copies) for copies in copies_F]
