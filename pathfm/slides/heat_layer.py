"""Scores of tiles as a layer over the slide: an OME-TIFF with one pixel per step of the tile grid and one channel per score.

Shapes: N tiles, C channels, h x w pixels of the layer.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from pathfm.geometry import Mpp, Size, nearest, scale_length

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

LEAST_STEP = 1 / 16
"""Tiles closer together than this share of their side lie on no grid."""
OFF_GRID_PX = 1.0
"""Corners are rounded, so that tiles of a grid are at most this far from it [level-0 px]."""


@dataclass(frozen=True)
class HeatGrid:
    """Where the pixels of a layer lie on the slide.

    Attributes:
        origin_level0: x and y of the upper left corner of the first pixel [level-0 px].
        step_level0: width and height of a pixel [level-0 px].
        size: pixels of the layer.
    """

    origin_level0: tuple[float, float]
    step_level0: tuple[float, float]
    size: Size


def heat_grid(xy_level0: Places, sides_level0: tuple[float, float], size_level0: Size) -> HeatGrid:
    """The grid of which every pixel is one tile step, over the whole slide and all of its tiles.

    The step is the distance between neighbouring tiles, which is less than their side where they overlap. The grid starts at
    the corner of the slide or, where the tiles' own grid does not, at the nearest corner of that. Tiles that lie on no grid
    get pixels of a tile's side from the corner of the slide on.

    Args:
        xy_level0: upper left corners of the tiles [N, 2].
        sides_level0: width and height of a tile.
        size_level0: of the slide.
    """
    (left, width, columns), (top, height, rows) = (
        _axis(xy_level0[:, axis], sides_level0[axis], size_level0[axis]) for axis in (0, 1)
    )
    return HeatGrid((left, top), (width, height), Size(columns, rows))


def _axis(corner_N: Places, side: float, length: int) -> tuple[float, float, int]:
    """Origin, step and number of the pixels along one axis."""
    origin, step = _lattice(np.unique(corner_N).astype(np.float64), side)
    origin -= float(nearest(np.array(origin / step))) * step
    corner = corner_N.astype(np.float64)
    first = int(nearest((corner - origin) / step).min(initial=0))
    end = int(nearest((corner + side - origin) / step).max(initial=0))
    origin += first * step
    return origin, step, max(scale_length(length - origin, 1 / step), end - first)


def _lattice(corners: Floats, side: float) -> tuple[float, float]:
    """Origin and step of the lattice on which the distinct corners along an axis lie; (0, side) when on none."""
    gaps = np.diff(corners)
    if not len(gaps):
        return (float(corners[0]), side) if len(corners) else (0.0, side)
    if gaps.min() < LEAST_STEP * side:
        return 0.0, side
    close = float(gaps[gaps <= gaps.min() + OFF_GRID_PX].mean())
    index = nearest((corners - corners[0]) / close)
    # Without the last digits, which are noise of the fit.
    fitted = round(float(np.polyfit(index, corners, 1)[0]), 6)
    for step in (side, fitted):
        rest = corners - nearest((corners - corners[0]) / step) * step
        if np.ptp(rest) <= 2 * OFF_GRID_PX:
            middle = float(rest.max() + rest.min()) / 2
            return (0.0 if abs(middle) <= OFF_GRID_PX / 2 else middle), step
    return 0.0, side


def paint_tiles(xy_level0: Places, sides_level0: tuple[float, float], value_N: Floats, grid: HeatGrid) -> Floats:
    """The values of the tiles as a picture [h, w]; a pixel has the mean of all tiles over its centre.

    A tile that covers no centre has the pixel of its upper left corner. NaN: no tile, or only tiles whose value is not finite.
    """
    known = np.isfinite(value_N)
    corner_N2 = (xy_level0[known] - np.asarray(grid.origin_level0)) / grid.step_level0
    near_N2 = nearest(corner_N2)
    far_N2 = np.maximum(nearest(corner_N2 + np.divide(sides_level0, grid.step_level0)), near_N2 + 1)
    (x, y), (right, bottom) = np.clip(near_N2, 0, grid.size).T, np.clip(far_N2, 0, grid.size).T
    # Each tile adds its value at two of its corners and takes it away at the others; running sums fill what lies between.
    total, count = (np.zeros((grid.size.height + 1, grid.size.width + 1)) for _ in range(2))
    for rows, columns, sign in ((y, x, 1.0), (y, right, -1.0), (bottom, x, -1.0), (bottom, right, 1.0)):
        np.add.at(total, (rows, columns), sign * value_N[known])
        np.add.at(count, (rows, columns), sign)
    total, count = (corners.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] for corners in (total, count))
    picture = np.full(count.shape, np.nan)
    np.divide(total, count, out=picture, where=count > 0)
    return picture


def write_heat_layer(path: Path, layer_Chw: Floats, grid: HeatGrid, mpp_level0: Mpp | None, names: Sequence[str]) -> None:
    """Writes a layer as OME-TIFF (float32, one channel per name) at the place given; the same layer gives the same bytes.

    ``PhysicalSizeX`` and ``Y`` are those of a tile step [um], ``PositionX`` and ``Y`` the place of the layer's corner on the
    slide [mm]; the description says both in level-0 px. Without a resolution of the slide there are no physical sizes.

    Args:
        path: the file.
        layer_Chw: values; those that are not finite are written as 0.
        grid: where the pixels lie.
        mpp_level0: micrometres per level-0 px; None: unknown.
        names: of the channels.
    """
    data = np.where(np.isfinite(layer_Chw), layer_Chw, 0.0).astype(np.float32)
    (left, top), (width, height) = grid.origin_level0, grid.step_level0
    identity = hashlib.sha256(data.tobytes() + repr((grid, mpp_level0, list(names))).encode()).hexdigest()
    facts: dict[str, Any] = {
        "axes": "CYX",
        "Description": f"origin_level0={left:.8g},{top:.8g} step_level0={width:.8g},{height:.8g}",
        "Channel": {"Name": list(names)},
        "Creator": "pathfm",
        "UUID": str(uuid.UUID(identity[:32])),
    }
    resolution = None
    if mpp_level0 is not None:
        um_per_px = (width * mpp_level0.x, height * mpp_level0.y)
        places = {"PositionX": left * mpp_level0.x / 1000, "PositionY": top * mpp_level0.y / 1000}
        facts |= {"PhysicalSizeX": um_per_px[0], "PhysicalSizeY": um_per_px[1]}
        units = {f"{name}Unit": ["mm"] * len(names) for name in places}
        facts["Plane"] = {name: [value] * len(names) for name, value in places.items()} | units
        resolution = (1e4 / um_per_px[0], 1e4 / um_per_px[1])
    with tifffile.TiffWriter(path, ome=True, byteorder="<") as tiff:
        tiff.write(
            data,
            photometric="minisblack",
            compression="zlib",
            metadata=facts,
            resolution=resolution,
            resolutionunit="CENTIMETER" if resolution else None,
        )
