"""Tiles that look stained and are the same to the byte on every machine: what approximations of an encoder are judged on.

All arithmetic is on integers, and the random bits are those of a bit generator whose stream numpy keeps for ever.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

EOSIN, HAEMATOXYLIN = np.array([8, 90, 30]), np.array([62, 68, 28])
"""How much the stains at full strength dim red, green and blue [1/100 optical density]."""
DIRECTIONS = ((5, 0), (4, 3), (3, 4), (0, 5), (-3, 4), (-4, 3))
"""Vectors of length 5: the ways a nucleus can point."""
AREA_PER_CELL_PX = 1200
_TRANSMITTED = np.rint(245 * np.power(10.0, -np.arange(1024) / 100)).astype(np.uint8)


def calibration_tiles(count: int, side_px: int) -> npt.NDArray[np.uint8]:
    """Synthetic tiles of tissue [count, side, side, 3] RGB; tile i does not depend on ``count``.

    They differ in the strength of their stains, in how crowded and how large nuclei are, and in how much glass shows.
    """
    return np.stack([_tile(np.random.PCG64(number), side_px) for number in range(count)])


def _tile(source: np.random.PCG64, side_px: int) -> npt.NDArray[np.uint8]:
    eosin_strength, nuclear_strength, crowding = (int(value) for value in _numbers(source, 3, 60, 140))
    stroma = _smooth(source, side_px, 28) * eosin_strength // 100
    grain = _numbers(source, side_px * side_px, -6, 7).reshape(side_px, side_px)
    eosin = np.clip(stroma // 5 + 8 + grain // 2, 0, 255)
    eosin[_smooth(source, side_px, 56) > 190] //= 12  # glass: lumens and fat
    nuclei = _nuclei(source, side_px, side_px * side_px * crowding // (100 * AREA_PER_CELL_PX))
    chromatin = np.clip(60 + _smooth(source, side_px, 6) // 4 + grain, 0, 255) * nuclear_strength // 100
    haematoxylin = np.where(nuclei, chromatin, 0)
    density = (eosin[..., None] * EOSIN + haematoxylin[..., None] * HAEMATOXYLIN) // 100
    tile: npt.NDArray[np.uint8] = _TRANSMITTED[np.clip(density, 0, len(_TRANSMITTED) - 1)]
    return tile


def _nuclei(source: np.random.PCG64, side_px: int, count: int) -> npt.NDArray[np.bool_]:
    inside = np.zeros((side_px, side_px), bool)
    for x, y, size, width, way in _numbers(source, 5 * count, 0, 1 << 20).reshape(-1, 5):
        long_px, (along_x, along_y) = 4 + size % 7, DIRECTIONS[way % len(DIRECTIONS)]
        short_px = max(3, long_px * (50 + width % 50) // 100)
        rows, columns = (slice(max(0, at - long_px), at + long_px + 1) for at in (y % side_px, x % side_px))
        dy, dx = np.ogrid[rows.start : min(side_px, rows.stop), columns.start : min(side_px, columns.stop)]
        dy, dx = dy - y % side_px, dx - x % side_px
        along, across = along_x * dx + along_y * dy, along_x * dy - along_y * dx
        inside[rows, columns] |= (along * short_px) ** 2 + (across * long_px) ** 2 <= (5 * long_px * short_px) ** 2
    return inside


def _smooth(source: np.random.PCG64, side_px: int, period_px: int) -> npt.NDArray[np.int64]:
    """A random field 0..255 that changes over ``period_px``."""
    cells = side_px // period_px + 2
    coarse = _numbers(source, cells * cells, 0, 256).reshape(cells, cells).astype(np.uint8)
    return np.asarray(cv2.resize(coarse, (side_px, side_px), interpolation=cv2.INTER_LINEAR_EXACT), np.int64)


def _numbers(source: np.random.PCG64, count: int, low: int, high: int) -> npt.NDArray[np.int64]:
    """Random integers in [low, high)."""
    return low + (source.random_raw(count) >> np.uint64(32)).astype(np.int64) % (high - low)
