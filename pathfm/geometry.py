"""Where things are on a slide. The only file that scales and rounds.

Frames: ``level0`` = pixels of the full-resolution image; ``level`` = pixels of a pyramid level; ``um`` = micrometres. A length
in one frame is never passed as a length in another: the frame is in the name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MPP_SANE = (0.05, 20.0)
"""Micrometres per pixel outside this range are not a microscope's (a default 72 dpi tag reads as 352.8)."""


class Size(NamedTuple):
    """Width and height in pixels of a stated frame."""

    width: int
    height: int


class Box(NamedTuple):
    """A rectangle in pixels of a stated frame; ``right`` and ``bottom`` are exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> Size:
        """Width and height."""
        return Size(self.right - self.left, self.bottom - self.top)


def contains(outer: Box, inner: Box) -> bool:
    """Whether a rectangle lies in another."""
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


class Mpp(NamedTuple):
    """Micrometres per pixel along x and y."""

    x: float
    y: float

    @property
    def mean(self) -> float:
        """The geometric mean, which keeps areas right."""
        return math.sqrt(self.x * self.y)


def mpp_is_sane(value: float) -> bool:
    """Whether a value can be a microscope's micrometres per pixel."""
    return math.isfinite(value) and MPP_SANE[0] <= value <= MPP_SANE[1]


def best_level(downsamples: Sequence[float], wanted: float) -> int:
    """The coarsest pyramid level that is at least as fine as ``wanted`` (1 % slack for levels that are rounded in the file).

    Args:
        downsamples: downsample of each level against level 0, ascending.
        wanted: output downsample against level 0.
    """
    fitting = [index for index, value in enumerate(downsamples) if value <= wanted * 1.01]
    return fitting[-1] if fitting else 0


def level_downsample(full: Size, level: Size) -> float:
    """Level-0 pixels per pixel of a level.

    Scanners shrink by whole numbers and round the size, so a whole number that explains both sides is the true one; the mean
    ratio of the sides, which others take, is off by up to a pixel at the far edge.
    """
    mean = (full.width / level.width + full.height / level.height) / 2
    whole = math.floor(mean + 0.5)
    explains = all(abs(long / whole - short) < 1 for long, short in zip(full, level, strict=True))
    return float(whole) if explains else mean


def tile_corners(length_level0: int, side_level0: float, count: int) -> list[int]:
    """Corners 0..count of the tiles along one axis, each rounded once from the exact position."""
    return [min(math.floor(index * side_level0 + 0.5), length_level0) for index in range(count + 1)]


def tiles_along(length_level0: int, side_level0: float) -> int:
    """How many whole tiles fit along an axis (half a pixel of slack, which rounding a corner may use)."""
    return max(0, math.floor((length_level0 + 0.5) / side_level0))


def nearest(positions: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Exact positions rounded to the nearest pixel, halves up (which keeps equal steps equal)."""
    return np.floor(positions + 0.5).astype(np.int64)


def scale_point(x: float, y: float, factor: float) -> tuple[int, int]:
    """A point moved to another frame and rounded to the nearest pixel."""
    return math.floor(x * factor + 0.5), math.floor(y * factor + 0.5)


def scale_length(length: float, factor: float) -> int:
    """A length moved to another frame, at least one pixel."""
    return max(1, math.floor(length * factor + 0.5))


def scale_box(box: Box, factor_x: float, factor_y: float) -> Box:
    """A box moved to another frame: outer pixels included, never empty."""
    left, top = math.floor(box.left * factor_x), math.floor(box.top * factor_y)
    right = max(left + 1, math.ceil(box.right * factor_x))
    bottom = max(top + 1, math.ceil(box.bottom * factor_y))
    return Box(left, top, right, bottom)


def fit_within(size: Size, longest_px: int) -> tuple[Size, float]:
    """The size with the same aspect whose longer side is at most ``longest_px``, and its downsample (>= 1)."""
    downsample = max(1.0, max(size) / longest_px)
    return Size(scale_length(size.width, 1 / downsample), scale_length(size.height, 1 / downsample)), downsample


def effective_mpp(mpp: float | None, tile_px: int, resize_px: int) -> float | None:
    """Micrometres per pixel that an encoder really sees when whole tiles are resized to ``resize_px``; None when unknown."""
    return None if mpp is None or math.isnan(mpp) else mpp * tile_px / resize_px
