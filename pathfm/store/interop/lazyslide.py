"""LazySlide and wsidata: ``<slide_id>.zarr``, a SpatialData store whose shapes are GeoParquet (WKB polygons, level-0 pixels).

The store also keeps every property of the slide, the scanner's user and the date included; only sizes are read from it.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from pathfm.errors import MissingExtraError
from pathfm.geometry import Size
from pathfm.store.interop.foreign import ForeignTiles, UnfitError, needed, positive, whole
from pathfm.store.interop.foreign_features import ForeignFeatures, tile_features

TILES = "tiles"
"""The key that LazySlide gives tiles by default."""
WKB_POLYGON = 3
UNEQUAL_PX = 1.0
"""Sides of tiles may differ by this much from rounding [level-0 px]."""


def read_lazyslide(path: Path, key: str | None = None) -> ForeignTiles:
    """Tiles of LazySlide: those under ``key``, by default those under ``tiles``, or the only ones there are.

    Raises:
        MissingExtraError: pyarrow is not installed.
        UnfitError, OSError, KeyError, ValueError, RuntimeError: not such a store, or damaged.
    """
    attrs: Mapping[str, Any] = dict(zarr.open_group(path, mode="r", use_consolidated=False).attrs)
    specs = attrs["tile_spec"]
    if key is None:
        key = TILES if TILES in specs else min(specs)
        if key != TILES and len(specs) > 1:
            raise UnfitError(f"several sets of tiles, and none is called {TILES}")
    spec, slide = specs[key], attrs["slide_properties"]
    boxes = _boxes(_column(_shapes(path, key), "geometry"))
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


def read_lazyslide_features(path: Path, encoder: str | None = None) -> ForeignFeatures:
    """Features of LazySlide: of ``encoder``, or the only ones there are, each with the tile that its table names.

    Raises:
        MissingExtraError: pyarrow is not installed.
        UnfitError, OSError, KeyError, ValueError, RuntimeError: not such a store, or damaged.
    """
    tables = _groups(path / "tables")
    encoders = {name.removesuffix(f"_{table.attrs.get('region')}"): table for name, table in tables.items()}
    name = encoder or (next(iter(encoders)) if len(encoders) == 1 else "")
    if name not in encoders:
        raise UnfitError(f"features of {len(encoders)} encoders, wanted: one of {', '.join(encoders) or 'none'}")
    key, join = str(encoders[name].attrs["region"]), str(encoders[name].attrs["instance_key"])
    tiles, values, wanted = read_lazyslide(path, key), _array(encoders[name], "X"), _array(encoders[name], f"obs/{join}")
    ids = np.asarray(_column(_shapes(path, key), join))
    order = np.argsort(ids, kind="stable")
    rows = order[np.searchsorted(ids, wanted, sorter=order).clip(0, max(len(ids) - 1, 0))]
    if not np.array_equal(ids[rows], wanted):
        raise UnfitError("features of tiles that the store does not have")
    return tile_features(values, replace(tiles, xy_level0=tiles.xy_level0[rows]), name)


def _groups(folder: Path) -> dict[str, zarr.Group]:
    """The tables with features, by name."""
    if not folder.is_dir():
        return {}
    found = {name: zarr.open_group(folder / name, mode="r") for name in zarr.open_group(folder, mode="r").group_keys()}
    return {name: found[name] for name in sorted(found) if "X" in found[name]}


def _array(table: zarr.Group, name: str) -> npt.NDArray[Any]:
    array = table[name]
    if not isinstance(array, zarr.Array):
        raise UnfitError("features that are sparse")
    return np.asarray(array[:])


def _shapes(path: Path, key: str) -> Path:
    return path / "shapes" / key / "shapes.parquet"


def _column(path: Path, name: str) -> Sequence[Any]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError("LazySlide keeps tiles as GeoParquet, and pyarrow is not installed", extra="interop") from error
    rows: list[Any] = parquet.ParquetFile(path).read(columns=[name]).column(name).to_pylist()
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
