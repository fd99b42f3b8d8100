"""Crops of a tile, cut in uint8 by the processor: a random box, resized, mirrored and turned."""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

from pathfm.geometry import Box, scale_length
from pathfm.study import CropSettings

Pixels = npt.NDArray[np.uint8]

TRIES = 10
TURNS = 8
"""Elements of D4, the symmetries of a square."""


def draw_box(side_px: int, scale: tuple[float, float], aspect: tuple[float, float], random: np.random.Generator) -> Box:
    """A box with an area share from ``scale`` and an aspect from ``aspect`` (log-uniform), anywhere in a square.

    When ten draws do not fit, the whole square.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(TRIES):
        share, ratio = random.uniform(*scale), math.exp(random.uniform(low, high))
        width, height = scale_length(side_px, math.sqrt(share * ratio)), scale_length(side_px, math.sqrt(share / ratio))
        if width <= side_px and height <= side_px:
            left, top = int(random.integers(side_px - width + 1)), int(random.integers(side_px - height + 1))
            return Box(left, top, left + width, top + height)
    return Box(0, 0, side_px, side_px)


def cut(tile: Pixels, box: Box, out_px: int, turn: int) -> Pixels:
    """A box of a tile as a square of ``out_px`` (area-averaged when it shrinks, cubic when it grows), turned."""
    part = tile[box.top : box.bottom, box.left : box.right]
    shrinks = box.size.width > out_px and box.size.height > out_px
    square = cv2.resize(part, (out_px, out_px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return turned(np.asarray(square, dtype=np.uint8), turn)


def turned(square: Pixels, turn: int) -> Pixels:
    """One of the eight symmetries of a square: ``turn % 4`` quarter turns, mirrored from 4 on. A view, not a copy."""
    quarter: Pixels = np.rot90(square, turn % 4)
    return quarter[:, ::-1] if turn >= TURNS // 2 else quarter


def cut_views(tile: Pixels, crops: CropSettings, random: np.random.Generator) -> tuple[list[Pixels], list[Pixels]]:
    """The two global crops and the local crops of one tile [side, side, 3]."""

    def view(scale: tuple[float, float], out_px: int) -> Pixels:
        box = draw_box(len(tile), scale, crops.aspect, random)
        return cut(tile, box, out_px, int(random.integers(TURNS)) if crops.flips else 0)

    global_views = [view(crops.global_scale, crops.global_px) for _ in range(2)]
    return global_views, [view(crops.local_scale, crops.local_px) for _ in range(crops.local_count)]
