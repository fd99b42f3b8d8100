"""A sample of rows from more arrays than fit into memory: one pass, and the same rows whatever the order of the arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathfm.stats.seeds import derive_seed

BLOCK_ROWS = 8192
"""Rows of a large array that are computed on at a time."""


def row_blocks(values_ND: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The rows in pieces that are small enough to be converted to a wider number type; none of an empty array."""
    return (values_ND[start : start + BLOCK_ROWS] for start in range(0, len(values_ND), BLOCK_ROWS))


class SampledRows(NamedTuple):
    """Rows in the order of (name, row number).

    Attributes:
        names: what was added, sorted; also arrays without a row in the sample.
        name_N: index into ``names``.
        row_N: row number within the array.
        values_ND: the rows, as they were added.
        total: rows that were added.
    """

    names: tuple[str, ...]
    name_N: NDArray[np.int64]
    row_N: NDArray[np.int64]
    values_ND: NDArray[Any]
    total: int


class RowSample:
    """Keeps the ``limit`` rows of lowest priority, a hash of the array's name and the row's number; all rows when they fit.

    Large arrays give many rows and small ones few, in proportion.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._total = limit, 0
        self._names: list[str] = []
        self._kept: list[tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[Any]]] = []

    def add(self, name: str, values_ND: NDArray[Any], row_N: NDArray[np.int64] | None = None) -> None:
        """Offers all rows of an array; ``row_N``: their numbers, where they are not 0 .. N-1. A name is added once."""
        row_N = np.arange(len(values_ND)) if row_N is None else row_N.astype(np.int64)
        priority_N = _mixed(row_N.astype(np.uint64) + np.uint64(derive_seed("row sample", name)))
        place_N2 = np.stack([np.full(len(row_N), len(self._names)), row_N], axis=1)
        self._names.append(name)
        self._total += len(row_N)
        best = np.argsort(priority_N, kind="stable")[: self._limit]
        self._kept.append((priority_N[best], place_N2[best], values_ND[best]))
        if sum(len(priority) for priority, _, _ in self._kept) > 2 * self._limit:
            self._kept = [self._lowest()]

    def _lowest(self) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[Any]]:
        priority_N, place_N2, values_ND = (np.concatenate(parts) for parts in zip(*self._kept, strict=True))
        best = np.argsort(priority_N, kind="stable")[: self._limit]
        return priority_N[best], place_N2[best], values_ND[best]

    def finish(self) -> SampledRows:
        """The sample of everything that was added.

        Raises:
            ValueError: nothing was added.
        """
        if not self._kept:
            raise ValueError("nothing was added to the sample")
        _, place_N2, values_ND = self._lowest()
        names = sorted(self._names)
        rank = {name: index for index, name in enumerate(names)}
        name_N = np.array([rank[name] for name in self._names], dtype=np.int64)[place_N2[:, 0]]
        order = np.lexsort((place_N2[:, 1], name_N))
        return SampledRows(tuple(names), name_N[order], place_N2[order, 1], values_ND[order], self._total)


def _mixed(value_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea & Flood 2014): neighbouring numbers become unrelated ones."""
    mixed = value_N * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return result
