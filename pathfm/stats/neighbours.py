"""The tiles of a cohort whose features are nearest to one, and the tile at a point of a slide. Exact and in bounded memory.

Legend: N tiles, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathfm.stats.row_sample import BLOCK_ROWS

ROUNDING = 1e-5
"""How far a cosine in single precision may be from the true one, amply."""


class Hit(NamedTuple):
    """A tile and its cosine with the query."""

    slide_id: str
    tile: int
    cosine: float


class SlideRows(NamedTuple):
    """Features of one slide: float16 or float32 [N, D], and which rows may be found [N]."""

    slide_id: str
    feature_ND: NDArray[Any]
    usable_N: NDArray[np.bool_]


def nearest_tiles(query_D: ArrayLike, slides: Iterable[SlideRows], count: int) -> list[Hit]:
    """The ``count`` usable tiles of highest cosine with the query, highest first; equal ones by slide id and tile number.

    Tiles are sifted by a matrix product in single precision and ranked by cosines in double precision that depend on the two
    rows alone: neither the order of the slides nor the size of the blocks changes the result.

    Raises:
        ValueError: the query has no direction (it is zero or not finite), or another length than the features.
    """
    query = np.asarray(query_D, dtype=np.float64)
    length = float(np.linalg.norm(query))
    if not np.isfinite(length) or length == 0:
        raise ValueError("the query is zero or not finite")
    best: list[Hit] = []
    for slide in slides:
        for start in range(0, len(slide.feature_ND), BLOCK_ROWS):
            rows = np.s_[start : start + BLOCK_ROWS]
            usable = start + np.flatnonzero(slide.usable_N[rows])
            floor = best[-1].cosine if len(best) == count else -1.0
            best = sorted([*best, *_candidates(query / length, slide, usable, count, floor)], key=_order)[:count]
    return best


def _order(hit: Hit) -> tuple[float, str, int]:
    return -hit.cosine, hit.slide_id, hit.tile


def _candidates(
    query_D: NDArray[np.float64], slide: SlideRows, tile_N: NDArray[np.int64], count: int, floor: float
) -> Iterator[Hit]:
    """Tiles of a block that may belong to the best, with their cosines."""
    block_ND = slide.feature_ND[tile_N].astype(np.float32)
    norm_N = np.sqrt(np.einsum("nd,nd->n", block_ND, block_ND))
    rough_N = block_ND @ query_D.astype(np.float32) / np.maximum(norm_N, np.finfo(np.float32).tiny)
    if len(rough_N) > count:
        floor = max(floor, float(np.partition(rough_N, -count)[-count]))
    chosen = np.flatnonzero(rough_N >= floor - ROUNDING)
    for tile, row_D in zip(tile_N[chosen].tolist(), block_ND[chosen].astype(np.float64), strict=True):
        length = float(np.sqrt((row_D * row_D).sum()))
        yield Hit(slide.slide_id, tile, float((row_D * query_D).sum()) / length if length else 0.0)


def tile_at(
    xy_level0_N2: NDArray[np.int64], sides_level0: tuple[float, float], point_level0: tuple[float, float]
) -> tuple[int, bool]:
    """The tile whose square holds a point, or else the nearest one.

    Args:
        xy_level0_N2: upper left corners, at least one.
        sides_level0: width and height of the tiles [level-0 px].
        point_level0: x and y.

    Returns:
        Its number, and whether it holds the point. Of several that hold it, the one with the nearest centre; of equally near
        ones the first.
    """
    offset_N2 = np.asarray(point_level0, dtype=np.float64) - xy_level0_N2
    inside_N = ((offset_N2 >= 0) & (offset_N2 < np.asarray(sides_level0))).all(axis=1)
    distance_N = np.square(offset_N2 - np.asarray(sides_level0) / 2).sum(axis=1)
    if inside_N.any():
        distance_N = np.where(inside_N, distance_N, np.inf)
    return int(distance_N.argmin()), bool(inside_N.any())
