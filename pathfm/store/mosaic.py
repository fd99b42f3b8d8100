"""A mosaic for tiles that have no coordinates: what the thumbnail and the (synthetic) coordinates of such a slide are."""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

LONGEST_PX = 1024
"""Longer side of the mosaic picture [px]."""
MOST_CELL_PX = 128
"""Largest side of a tile in the picture [px]."""


def mosaic_corners(count: int, side_px: int) -> npt.NDArray[np.int64]:
    """Upper left corners [count, 2] of a nearly square row-major mosaic of tiles, in tile pixels."""
    columns = max(1, math.ceil(math.sqrt(count)))
    index = np.arange(count, dtype=np.int64)
    return np.stack([index % columns, index // columns], axis=1) * side_px


def mosaic(images: npt.NDArray[np.uint8]) -> tuple[Pixels, npt.NDArray[np.int64], float]:
    """Picture, corners and downsample of a mosaic of tiles [N, H, H, 3]."""
    count, side = len(images), images.shape[1]
    canvas = MosaicCanvas(count, side)
    for index in range(count):
        canvas.paste(index, images[index])
    return canvas.picture, mosaic_corners(count, side), canvas.downsample


class MosaicCanvas:
    """The mosaic picture, filled tile by tile, so that no more than one tile is in memory."""

    def __init__(self, count: int, side_px: int) -> None:
        columns = max(1, math.ceil(math.sqrt(count)))
        rows = max(1, math.ceil(count / columns))
        self._cell = min(side_px, MOST_CELL_PX, max(1, LONGEST_PX // columns))
        self._columns = columns
        self.downsample = side_px / self._cell
        self.picture: Pixels = np.full((rows * self._cell, columns * self._cell, 3), 255, dtype=np.uint8)

    def paste(self, index: int, tile: Pixels) -> None:
        """Puts tile ``index`` [H, W, 3] into its cell."""
        row, column = divmod(index, self._columns)
        top, left = row * self._cell, column * self._cell
        cell = cv2.resize(tile, (self._cell, self._cell), interpolation=cv2.INTER_AREA)
        self.picture[top : top + self._cell, left : left + self._cell] = cell
