"""Telling tissue from glass on a thumbnail: pictures in, masks out."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from pathfm.study import TissueSettings

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

DENSITY_RANGE = (0.08, 0.12)
"""The threshold on optical density is kept in this range: below lie noise and stain smear, above would go pale tissue."""
FLOOR = 0.01
"""Added to densities before Otsu takes their logarithm, so that dark tissue does not hide pale tissue from it."""
ENTROPY_RANGE = (1.5, 4.5)
"""The threshold on local grey-level entropy is kept in this range [bit]."""
BACKGROUND_PERCENTILE = 95
SMOOTH_UM = 8.0
"""Detail smaller than this is not tissue [um]."""
NOMINAL_MPP = 8.0
"""Scale taken for thumbnails of slides whose mpp is unknown [um per px]."""


def tissue_mask(thumbnail: Pixels, mpp: float | None, settings: TissueSettings) -> Mask:
    """The tissue in a thumbnail [h, w, 3] as a mask [h, w].

    Args:
        thumbnail: RGB picture of the whole slide.
        mpp: micrometres per thumbnail pixel, None when unknown.
        settings: method, smallest piece and largest hole.
    """
    if settings.method == "off":
        return np.ones(thumbnail.shape[:2], dtype=bool)
    scale = mpp or NOMINAL_MPP
    if settings.method == "otsu":
        measure = _smooth(stain_density(thumbnail), scale)
        threshold = np.clip(np.exp(otsu_threshold(np.log(measure + FLOOR))) - FLOOR, *DENSITY_RANGE)
    else:
        measure = _smooth(local_entropy(thumbnail), scale)
        threshold = np.clip(otsu_threshold(measure), *ENTROPY_RANGE)
    mask = measure > threshold
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    mask = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, kernel, iterations=2).astype(bool)
    mask = _drop_small(mask, settings.min_area_um2 / scale**2)
    return ~_drop_small(~mask, settings.max_hole_um2 / scale**2)


def _smooth(measure: npt.NDArray[np.float32], mpp: float) -> npt.NDArray[np.float32]:
    smoothed: npt.NDArray[np.float32] = cv2.GaussianBlur(measure, (0, 0), max(0.8, SMOOTH_UM / mpp / 2))
    return smoothed


def stain_density(rgb: Pixels) -> npt.NDArray[np.float32]:
    """Optical density against the slide's own glass, weighted towards colour [h, w].

    The glass is taken as the bright end of each channel, which also removes the lilac tint some scanners give it. Grey shadows
    and dust have density but no colour, so half of the measure is the spread between channels.
    """
    white = np.maximum(np.percentile(rgb.reshape(-1, 3), BACKGROUND_PERCENTILE, axis=0), 150.0)
    density = -np.log10(np.clip((rgb.astype(np.float32) + 1.0) / (white.astype(np.float32) + 1.0), 1e-3, 1.0))
    spread = density.max(axis=2) - density.min(axis=2)
    result: npt.NDArray[np.float32] = (0.5 * density.mean(axis=2) + spread).astype(np.float32)
    return result


def local_entropy(rgb: Pixels, side_px: int = 9, levels: int = 16) -> npt.NDArray[np.float32]:
    """Shannon entropy of grey levels around each pixel [h, w], in bit: high in tissue however pale, low on glass."""
    bins = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY) // (256 // levels)
    entropy = np.zeros(bins.shape, dtype=np.float32)
    for level in range(levels):
        share = cv2.boxFilter((bins == level).astype(np.float32), -1, (side_px, side_px))
        entropy -= share * np.log2(np.maximum(share, 1e-6))
    return entropy


def otsu_threshold(measure: npt.NDArray[np.float32]) -> float:
    """Otsu's threshold (1979) of a real-valued picture."""
    low, high = float(measure.min()), float(np.percentile(measure, 99.9))
    if high <= low:
        return high
    scaled = (np.clip((measure - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    level, _ = cv2.threshold(scaled, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return low + (float(level) + 0.5) / 255 * (high - low)


def _drop_small(mask: Mask, area_px: float) -> Mask:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= area_px
    keep[0] = False
    return np.asarray(keep[labels]) if count > 1 else mask


def mask_fractions(mask: Mask, boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Share of each box [N, 4] (left, top, right, bottom in mask pixels, fractional) that is mask, by a summed-area table."""
    table = cv2.integral(mask.astype(np.uint8), sdepth=cv2.CV_64F)
    height, width = mask.shape
    edges = np.clip(boxes, 0, [width, height, width, height])
    left, top, right, bottom = edges.T
    total = _at(table, right, bottom) - _at(table, left, bottom) - _at(table, right, top) + _at(table, left, top)
    area = np.maximum((right - left) * (bottom - top), 1e-9)
    share: npt.NDArray[np.float32] = (total / area).astype(np.float32)
    return share


def _at(table: npt.NDArray[np.float64], x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A summed-area table read between pixels (bilinear, which is exact for it)."""
    x0 = np.minimum(np.floor(x).astype(int), table.shape[1] - 2)
    y0 = np.minimum(np.floor(y).astype(int), table.shape[0] - 2)
    dx, dy = x - x0, y - y0
    upper = table[y0, x0] * (1 - dx) + table[y0, x0 + 1] * dx
    lower = table[y0 + 1, x0] * (1 - dx) + table[y0 + 1, x0 + 1] * dx
    result: npt.NDArray[np.float64] = upper * (1 - dy) + lower * dy
    return result
