"""Gross damage of stored JPEG tiles that decodes without a word, seen in the pixels. Tiles in, numbers out.

A flipped bit in the entropy-coded data mostly leaves a stream that decodes cleanly. The decoder loses its place, finds it again
some blocks later, and from there on every block is right but for its mean: means are coded as differences from the block before
(ITU-T T.81, F.1.2.1), so one wrong difference shifts the colour of all that follows, row of blocks after row of blocks. Between
the last sound row and the first wrong one the picture has a step: sharp, straight, and as wide as the stored tile. Tissue has
edges as strong, but none so straight. This holds at any scale and any place of the block grid, and for bits that did no more
than shift colours; it says nothing of damage within a few blocks.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

BANDS = 4
"""A stored tile may fill part of the tile's width: steps are sought in this many columns, and averaged."""
WINDOW = 9
"""Rows around a step that tell how much rows differ there without one."""
USUAL = 3
"""How many times the usual difference of rows a step must exceed; the excess counts. Edges of tissue spread over rows."""
BLANK = (8, 252)
"""Rows whose means are below or above these are blank (padding, unscanned area, some of it JPEG-coded): no border of damage."""


def straight_step(tile: npt.NDArray[np.uint8]) -> float:
    """Height of the largest horizontal step that runs straight through a tile.

    Args:
        tile: pixels [H, W, 3].

    Returns:
        The excess of the step over its surroundings, in the channel that has most of it, averaged over the tile's width, as a
        share of the whole range of grey levels: 0 to 1.
    """
    height, width = tile.shape[0], tile.shape[1] // BANDS
    # A column for each band of red, then of green, then of blue.
    rows = np.empty((height, 3 * BANDS), dtype=np.float32)
    for channel, plane in enumerate(cv2.split(tile[:, : BANDS * width])):
        sums = cv2.reduce(plane.reshape(height * BANDS, width), 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S)
        np.multiply(sums.reshape(height, BANDS), 1 / width, out=rows[:, channel * BANDS :][:, :BANDS])
    steps = np.abs(rows[1:] - rows[:-1])
    red, green, blue = (rows[:, start : start + BANDS] for start in range(0, 3 * BANDS, BANDS))
    lit = (np.maximum(np.maximum(red, green), blue) >= BLANK[0]) & (np.minimum(np.minimum(red, green), blue) <= BLANK[1])
    # The row next to a blank one may be a mixture of both.
    lit[1:-1] &= lit[:-2] & lit[2:]
    steps.reshape(-1, 3, BANDS)[...] *= (lit[1:] & lit[:-1])[:, None]
    excess = np.maximum(steps - USUAL * cv2.blur(steps, (1, WINDOW)), 0)
    red, green, blue = (excess[:, start : start + BANDS] for start in range(0, 3 * BANDS, BANDS))
    return float(np.maximum(np.maximum(red, green), blue).sum(axis=1).max() / (255 * BANDS))
