"""Numbers that tell what a tile shows: stored with every tile, never hidden. Tiles in, numbers out."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

WHITE_LEVEL = 225
"""Pixels whose darkest channel is above this count as white."""
BLACK_LEVEL = 30
"""Pixels whose brightest channel is below this count as black."""


class Quality(NamedTuple):
    """One row of the store's ``quality`` array.

    Attributes:
        tissue: share of the tile that is tissue by the mask.
        white: share of near-white pixels.
        black: share of near-black pixels.
        blur: variance of the Laplacian of the grey image; low means out of focus.
        saturation: mean HSV saturation, 0 to 1.
    """

    tissue: float
    white: float
    black: float
    blur: float
    saturation: float


def measure(tile: Pixels, tissue: float) -> Quality:
    """Quality of one tile [H, W, 3] whose tissue share is known."""
    low, high = tile.min(axis=2), tile.max(axis=2)
    gray = cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY)
    saturation = (high - low).astype(np.float32) / np.maximum(high, 1)
    return Quality(
        tissue=tissue,
        white=float((low > WHITE_LEVEL).mean()),
        black=float((high < BLACK_LEVEL).mean()),
        blur=float(cv2.Laplacian(gray, cv2.CV_32F).var()),
        saturation=float(saturation.mean()),
    )


def perceptual_hash(picture: Pixels) -> str:
    """Difference hash of a picture [h, w, 3] as 16 hex digits: equal for renamed and re-saved copies of a slide."""
    small = cv2.resize(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    bits = (small[:, 1:] > small[:, :-1]).reshape(-1)
    return f"{int(''.join('1' if bit else '0' for bit in bits), 2):016x}"
