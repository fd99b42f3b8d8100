"""Where the lesion is, tile by tile: from a mask of the whole slide, from regions drawn in QuPath, or from a table of tiles.

It serves to judge the attention, and is no argument of anything that trains.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from pathfm.errors import SlideError, StoreError, UsageError
from pathfm.geometry import Size, fit_within
from pathfm.stats.localisation import UNKNOWN
from pathfm.store.interop.annotations import draw_regions, load_annotations
from pathfm.store.tile_store import TileStore

LESION_SHARE = 0.25
"""A tile with at least this share of its area under the mask counts as lesion, any other as lesion-free."""
ASPECT_TOLERANCE = 0.02
"""A mask whose aspect differs by more from the slide's cannot cover the whole slide."""
REGIONS_PX = 8192
"""Longer side of the mask that regions are drawn on; smaller slides have a mask of their own size."""
NO_LESION = "*"
"""Classes whose names end so (QuPath's Ignore* and Region*) are no lesion."""

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
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


def read_mask(path: Path, size_level0: Size, classes: Sequence[str] = ()) -> Mask:
    """Where the lesion is on the whole slide [h, w], from a picture or from regions (``.geojson``, ``.json``).

    Args:
        path: a PNG of the whole slide, of which every pixel that is not black is lesion; or GeoJSON with polygons in level-0
            px, where a file without any region says that there is no lesion.
        size_level0: of the slide.
        classes: of the regions that are lesion; none: all but those whose names end in ``*``.

    Raises:
        StoreError: unreadable; a picture's aspect is not the slide's; the file has regions, but none of these classes.
    """
    if path.suffix.lower() in {".geojson", ".json"}:
        return _draw(path, size_level0, classes)
    data = np.frombuffer(path.read_bytes(), dtype=np.uint8) if path.is_file() else np.empty(0, dtype=np.uint8)
    picture = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) if data.size else None
    if picture is None:
        fix = "give a PNG of the whole slide, or GeoJSON as QuPath exports it"
        raise StoreError("the lesion mask cannot be read", where=str(path), fix=fix)
    height, width = picture.shape
    # One pixel of the mask is the least by which rounding can change its sides.
    slack = ASPECT_TOLERANCE + 1 / min(height, width)
    if abs((width / height) / (size_level0.width / size_level0.height) - 1) > slack:
        sides = f"{width} x {height} px, the slide {size_level0.width} x {size_level0.height} px"
        raise StoreError(f"the lesion mask does not cover the whole slide: it has {sides}", where=str(path))
    return np.asarray(picture > 0)


def _draw(path: Path, size_level0: Size, classes: Sequence[str]) -> Mask:
    try:
        found = load_annotations(path)
    except SlideError as error:
        raise StoreError(error.what, where=error.where, fix=error.fix) from None
    regions = [
        region for region in found.regions if (region.name in classes if classes else not region.name.endswith(NO_LESION))
    ]
    if found.regions and not regions:
        named = ", ".join(found.names) or "none"
        raise StoreError(f"no region is lesion: of classes {named}", where=str(path), fix="check the classes that are lesion")
    size, _ = fit_within(size_level0, REGIONS_PX)
    return draw_regions(regions, (size_level0.width / size.width, size_level0.height / size.height), (size.height, size.width))


def lesion_share(mask: Mask, xy_level0: NDArray[np.int64], sides_level0: tuple[float, float], size_level0: Size) -> Floats:
    """Share of each tile's area [N] that lies under the mask, exact to fractions of a mask pixel.

    Between the corners of pixels the integral of a mask is bilinear, so interpolating the summed-area table rounds nothing.
    Parts of a tile outside the slide count as lesion-free.
    """
    integral = cv2.integral(mask.astype(np.uint8), sdepth=cv2.CV_32S)
    factor = np.array([mask.shape[1] / size_level0.width, mask.shape[0] / size_level0.height])
    near, far = xy_level0 * factor, (xy_level0 + np.asarray(sides_level0)) * factor

    def below(x: Floats, y: Floats) -> Floats:
        return np.asarray(map_coordinates(integral, [y, x], output=np.float64, order=1, mode="nearest"))

    covered = (
        below(far[:, 0], far[:, 1])
        - below(near[:, 0], far[:, 1])
        - below(far[:, 0], near[:, 1])
        + below(near[:, 0], near[:, 1])
    )
    return np.asarray(covered / (np.prod(sides_level0) * factor.prod()))


def tile_truth(
    store: TileStore, mask: Mask | None, labels: TileLabels | None, least_share: float = LESION_SHARE
) -> NDArray[np.int8] | None:
    """Truth [N] of a slide's tiles: 1 lesion, 0 none, ``UNKNOWN``; None when nothing is known of the slide.

    A mask wins over tile labels. Tile labels go by the name of the tile's source file without suffix.

    Args:
        store: the tiles.
        mask: of ``read_mask``.
        labels: of ``read_tile_labels``.
        least_share: of a tile's area under the mask, from which on the tile is lesion.
    """
    if mask is not None:
        share = lesion_share(mask, store.xy_level0, store.tile_sides_level0, store.size_level0)
        return (share >= least_share - 1e-9).astype(np.int8)
    if labels is None or store.source_names is None:
        return None
    truth = np.array([labels.get(PurePath(name).stem, UNKNOWN) for name in store.source_names], dtype=np.int8)
    return truth if (truth != UNKNOWN).any() else None
