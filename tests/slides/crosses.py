"""Crosses planted at known places, and found again: whether a reader's coordinates are right to the pixel.

Positions are continuous: pixel ``i`` covers ``[i, i + 1)``, so its centre is at ``i + 0.5``.
"""

from collections.abc import Iterable

import cv2
import numpy as np

from pathfm.geometry import Size

TISSUE, INK = (222, 178, 208), (60, 25, 95)
"""Colours that tissue detection takes for tissue, with enough contrast to survive JPEG."""


def draw_crosses(
    size: Size, points: Iterable[tuple[float, float]], arm_px: float = 20, width_px: float = 4, background=TISSUE
) -> np.ndarray:
    """A flat picture [H, W, 3] with upright crosses, each pixel inked as far as the cross covers it.

    Args:
        size: of the picture [px].
        points: centres (x, y), at any fraction of a pixel.
        arm_px: from the centre to the end of an arm [px].
        width_px: of the arms [px].
        background: colour around the crosses.
    """
    picture = np.empty((size.height, size.width, 3), dtype=np.uint8)
    picture[:] = background
    for x, y in points:
        left, top = max(0, int(x - arm_px) - 1), max(0, int(y - arm_px) - 1)
        columns, rows = (
            np.arange(left, min(size.width, int(x + arm_px) + 2)),
            np.arange(top, min(size.height, int(y + arm_px) + 2)),
        )
        long_x, thin_x = _covered(columns, x, arm_px), _covered(columns, x, width_px / 2)
        long_y, thin_y = _covered(rows, y, arm_px), _covered(rows, y, width_px / 2)
        # The two bars overlap in the middle, which counts once.
        inked = np.outer(thin_y, long_x) + np.outer(long_y, thin_x) - np.outer(thin_y, thin_x)
        part = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        part[:] = np.rint(part + inked[..., None] * (np.array(INK) - part)).astype(np.uint8)
    return picture


def find_cross(picture: np.ndarray) -> tuple[float, float] | None:
    """Centre (x, y) of the only cross in a picture [H, W, 3] that holds the whole of it; None when there is none."""
    grey = picture.astype(float).mean(axis=2)
    dark = np.median(grey) - grey
    if dark.max() < 25:
        return None
    # Faint pixels count beside the cross alone: far from it they are the ringing of JPEG, beside it they are its edge.
    beside = cv2.dilate((dark > 0.3 * dark.max()).astype(np.uint8), np.ones((5, 5), np.uint8))
    dark = dark * beside
    rows, columns = np.indices(dark.shape)
    return float((dark * (columns + 0.5)).sum() / dark.sum()), float((dark * (rows + 0.5)).sum() / dark.sum())


def pyramid(picture: np.ndarray, downsamples: Iterable[float]) -> list[np.ndarray]:
    """Levels of a picture. Whole downsamples cut off what is left over, as Aperio does; others stretch it, as converters do."""
    levels = []
    for downsample in downsamples:
        height, width = (side / downsample for side in picture.shape[:2])
        whole = picture
        if float(downsample).is_integer():
            width, height = int(width), int(height)
            whole = picture[: height * int(downsample), : width * int(downsample)]
        levels.append(cv2.resize(whole, (round(width), round(height)), interpolation=cv2.INTER_AREA))
    return levels


def _covered(pixels: np.ndarray, centre: float, half: float) -> np.ndarray:
    """How much of each pixel an interval covers."""
    return np.clip(np.minimum(pixels + 1, centre + half) - np.maximum(pixels, centre - half), 0, 1)
