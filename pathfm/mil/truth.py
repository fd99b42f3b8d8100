"""Where the lesion is, tile by tile, from a mask of the whole slide or from a table of tile labels.

It serves to judge the attention, and is no argument of anything that trains.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path, PurePath

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from pathfm.errors import StoreError, UsageError
from pathfm.geometry import Size
from pathfm.stats.localisation import UNKNOWN
from pathfm.store.tile_store import TileStore

LESION_SHARE = 0.25
"""A tile with at least this share of its area under the mask counts as lesion, any other as lesion-free."""
ASPECT_TOLERANCE = 0.02
"""A mask whose aspect differs by more from the slide's cannot cover the whole slide."""

TileLabels = Mapping[str, int]


def read_tile_labels(path: Path) -> dict[str, int]:
    """Tile name -> 1 lesion, 0 none, ``UNKNOWN``, from a CSV with the columns ``tile`` and ``tile_label``.

    Raises:
        UsageError: unreadable, a column is missing, a label is none of 1, 0 and empty, or a tile is labelled twice differently.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"the tile labels cannot be read: {error}", where=str(path), fix="check cohort.tile_labels") from None
    if not {"tile", "tile_label"} <= set(reader.fieldnames or ()):
        raise UsageError(
            "columns tile and tile_label are needed", where=str(path), fix=f"columns: {', '.join(reader.fieldnames or ())}"
        )
    meaning = {"1": 1, "0": 0, "": UNKNOWN}
    labels: dict[str, int] = {}
    for line, row in rows:
        tile, value = (row["tile"] or "").strip(), (row["tile_label"] or "").strip()
        if value not in meaning:
            raise UsageError(f"tile_label {value!r} must be 1, 0 or empty", where=f"{path}, line {line}")
        if labels.setdefault(tile, meaning[value]) != meaning[value]:
            raise UsageError(f"tile {tile!r} is labelled twice, differently", where=f"{path}, line {line}")
    return labels


def read_mask(path: Path, size_level0: Size) -> NDArray[np.bool_]:
    """The lesion mask [h, w]; every pixel that is not black is lesion.

    Raises:
        StoreError: unreadable, or its aspect is not the slide's.
    """
    data = np.frombuffer(path.read_bytes(), dtype=np.uint8) if path.is_file() else np.empty(0, dtype=np.uint8)
    picture = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) if data.size else None
    if picture is None:
        raise StoreError("the lesion mask cannot be read", where=str(path), fix="give a PNG of the whole slide")
    height, width = picture.shape
    # One pixel of the mask is the least by which rounding can change its sides.
    slack = ASPECT_TOLERANCE + 1 / min(height, width)
    if abs((width / height) / (size_level0.width / size_level0.height) - 1) > slack:
        sides = f"{width} x {height} px, the slide {size_level0.width} x {size_level0.height} px"
        raise StoreError(f"the lesion mask does not cover the whole slide: it has {sides}", where=str(path))
    return np.asarray(picture > 0)


def lesion_share(
    mask: NDArray[np.bool_], xy_level0: NDArray[np.int64], side_level0: float, size_level0: Size
) -> NDArray[np.float64]:
    """Share of each tile's area [N] that lies under the mask, exact to fractions of a mask pixel.

    Between the corners of pixels the integral of a mask is bilinear, so interpolating the summed-area table rounds nothing.
    Parts of a tile outside the slide count as lesion-free.
    """
    integral = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    integral[1:, 1:] = mask.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
    factor = np.array([mask.shape[1] / size_level0.width, mask.shape[0] / size_level0.height])
    near, far = xy_level0 * factor, (xy_level0 + side_level0) * factor

    def below(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(map_coordinates(integral, [y, x], order=1, mode="nearest"))

    covered = (
        below(far[:, 0], far[:, 1])
        - below(near[:, 0], far[:, 1])
        - below(far[:, 0], near[:, 1])
        + below(near[:, 0], near[:, 1])
    )
    return np.asarray(covered / (side_level0**2 * factor.prod()))


def tile_truth(store: TileStore, mask: NDArray[np.bool_] | None, labels: TileLabels | None) -> NDArray[np.int8] | None:
    """Truth [N] of a slide's tiles: 1 lesion, 0 none, ``UNKNOWN``; None when nothing is known of the slide.

    A mask wins over tile labels. Tile labels go by the name of the tile's source file without suffix.
    """
    if mask is not None:
        share = lesion_share(mask, store.xy_level0, store.tile_side_level0, store.size_level0)
        return (share >= LESION_SHARE - 1e-9).astype(np.int8)
    if labels is None or store.source_names is None:
        return None
    truth = np.array([labels.get(PurePath(name).stem, UNKNOWN) for name in store.source_names], dtype=np.int8)
    return truth if (truth != UNKNOWN).any() else None
