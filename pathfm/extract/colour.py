"""The colour-histogram control: what a classifier knows without seeing any structure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LEVELS = 4
"""Levels per channel; the histogram is joint, so it has their cube as length."""


def colour_histogram(tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Square roots of the joint RGB histograms [B, 64] of tiles [B, H, W, 3].

    The square root (Hellinger) keeps rare colours from being drowned by frequent ones.
    """
    rows = np.empty((len(tiles), LEVELS**3), dtype=np.float32)
    for row, tile in zip(rows, tiles, strict=True):
        levels = (tile // (256 // LEVELS)).astype(np.intp)
        joint = (levels[..., 0] * LEVELS + levels[..., 1]) * LEVELS + levels[..., 2]
        row[:] = np.sqrt(np.bincount(joint.reshape(-1), minlength=LEVELS**3) / joint.size)
    return rows
