"""LazySlide and wsidata: ``<slide_id>.zarr``, a SpatialData store whose shapes are GeoParquet (WKB polygons, level-0 pixels).

The store also keeps every property of the slide, the scanner's user and the date included; only sizes are read from it.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from pathfm.errors import MissingExtraError
from pathfm.geometry import Size
from pathfm.store.interop.foreign import ForeignTiles, UnfitError, needed, positive, whole

TILES = "tiles"
"""The key that LazySlide gives tiles by default."""
WKB_POLYGON = 3
UNEQUAL_PX = 1.0
"""Sides of tiles may differ by this much from rounding [level-0 px]."""


def read_lazyslide(path: Path) -> ForeignTiles:
    """Tiles of LazySlide: those under the key ``tiles``, or the only ones there are.

    Raises:
        MissingExtraError: pyarrow is not installed.
        UnfitError, OSError, KeyError, ValueError, RuntimeError: not such a store, or damaged.
    """
    attrs: Mapping[str, Any] = dict(zarr.open_group(path, mode="r", use_consolidated=False).attrs)
    specs = attrs["tile_spec"]
    key = TILES if TILES in specs else min(specs)
    if key != TILES and len(specs) > 1:
        raise UnfitError(f"several sets of tiles, and none is called {TILES}")
    spec, slide = specs[key], attrs["slide_properties"]
    boxes = _boxes(_geometries(path / "shapes" / key / "shapes.parquet"))
    side, tile_px, mpp = _side(boxes, spec), positive(spec, "width"), positive(slide, "mpp")
    height, width = slide["shape"]
    return ForeignTiles(
        "LazySlide",
        boxes[:, :2],
        side,
        whole(tile_px),
        mpp * side / tile_px if mpp and tile_px else None,
        Size(int(width), int(height)),
    )


def _geometries(path: Path) -> Sequence[bytes]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError("LazySlide keeps tiles as GeoParquet, and pyarrow is not installed", extra="interop") from error
    rows: list[bytes] = parquet.ParquetFile(path).read(columns=["geometry"]).column("geometry").to_pylist()
    return rows


def _boxes(geometries: Sequence[bytes]) -> npt.NDArray[np.float64]:
    """Bounds [N, 4] (left, top, right, bottom) of polygons in well-known binary (OGC 06-103r4, section 8)."""
    bounds = np.empty((len(geometries), 4))
    for row, data in enumerate(geometries):
        order = "<" if data[0] == 1 else ">"
        kind, _, points = struct.unpack_from(f"{order}III", data, 1)
        if kind != WKB_POLYGON:
            raise UnfitError("tiles that are no polygons")
        ring = np.frombuffer(data, dtype=f"{order}f8", count=2 * points, offset=13).reshape(points, 2)
        bounds[row] = *ring.min(axis=0), *ring.max(axis=0)
    return bounds


def _side(boxes: npt.NDArray[np.float64], spec: Mapping[str, Any]) -> float:
    """Side of the tiles from their bounds; without any, as it was asked for."""
    if not len(boxes):
        return needed(spec, "width") * needed(spec, "base_downsample")
    sides = boxes[:, 2:] - boxes[:, :2]
    if np.ptp(sides) > UNEQUAL_PX:
        raise UnfitError("tiles that are no squares of one size")
    return float(np.median(sides))
