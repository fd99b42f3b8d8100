"""TRIDENT: ``patches/<slide_id>_patches.h5``, its attributes on ``coords``.

TRIDENT knows magnifications, not micrometres. What it reads for a tile is ``patch_size`` times the ratio of the two
magnifications; ``patch_size_level0`` is that cut to a whole number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pathfm.errors import StoreError
from pathfm.geometry import Size, scale_length
from pathfm.store.interop.coords_file import Attribute, CoordsFile, write_coords_file
from pathfm.store.interop.foreign import ForeignTiles, needed, positive, whole
from pathfm.store.tile_store import TileStore, open_tiles

USUAL = (5, 10, 20, 40, 60, 80)
"""Magnifications that TRIDENT names."""
MPP_AT_1X = 10.0
"""TRIDENT takes 10 micrometres per pixel for 1x."""


def is_trident(file: CoordsFile) -> bool:
    """Whether TRIDENT wrote it: its coordinates, or its features, which repeat them."""
    return "patch_size_level0" in file.attrs or {"patch_size", "target_magnification"} <= set(file.attrs)


def read_trident(attrs: Mapping[str, Any], file: CoordsFile, tool: str = "TRIDENT") -> ForeignTiles:
    """Tiles of TRIDENT, or of a tool with its attributes.

    Raises:
        UnfitError: the size of the tiles cannot be known.
    """
    tile_px, said = positive(attrs, "patch_size"), positive(attrs, "patch_size_level0")
    source, target = positive(attrs, "level0_magnification"), positive(attrs, "target_magnification")
    read = tile_px * source / target if tile_px and source and target else None
    # The ratio is what was read, unless the file means something else with its magnifications.
    side = read if read and (said is None or abs(read - said) < 1) else needed(attrs, "patch_size_level0")
    width, height = positive(attrs, "level0_width"), positive(attrs, "level0_height")
    size = Size(round(width), round(height)) if width and height else None
    return ForeignTiles(tool, file.coords[:, :2], side, whole(tile_px), None, size)


@dataclass(frozen=True)
class Grid:
    """What TRIDENT's attributes are made of.

    Attributes:
        path: where the tiles come from, for errors.
        slide_id: the slide.
        tile_px: side of a tile [px].
        side_level0: side of the square it covers [level-0 px].
        mpp: micrometres per pixel of a tile, None when unknown.
        size_level0: size of the slide.
        xy_level0: [N, 2] upper left corners.
        objective: the objective's power, None when unknown.
    """

    path: Path
    slide_id: str
    tile_px: int
    side_level0: float
    mpp: float | None
    size_level0: Size
    xy_level0: npt.NDArray[np.int64]
    objective: float | None


def write_trident(path: Path, store: TileStore) -> None:
    """Writes the tiles of a store as TRIDENT's coordinates, at the place given.

    Raises:
        StoreError: neither mpp nor objective are known.
    """
    slide = open_tiles(store.path.parent).attrs if "scale_of" in store.attrs else store.attrs
    grid = Grid(
        *(store.path, store.slide_id, store.tile_px, store.tile_side_level0, store.mpp, store.size_level0, store.xy_level0),
        objective=positive(slide, "objective"),
    )
    write_coords_file(path, store.xy_level0, trident_attrs(grid))


def trident_attrs(grid: Grid) -> dict[str, Attribute]:
    """TRIDENT's attributes of ``coords``.

    The magnifications are chosen so that TRIDENT reads the very squares of the tiles; they are names, not measurements.

    Raises:
        StoreError: neither mpp nor objective are known.
    """
    side = scale_length(grid.side_level0, 1)
    source = _level0_magnification(grid)
    target = _target_magnification(grid, source, side)
    return {
        "patch_size": grid.tile_px,
        "patch_size_level0": side if isinstance(target, int) else float(side),
        "level0_magnification": source,
        "target_magnification": target,
        "overlap": _overlap_px(grid),
        "name": grid.slide_id,
        "savetodir": "",
        "level0_width": grid.size_level0.width,
        "level0_height": grid.size_level0.height,
    }


def _level0_magnification(grid: Grid) -> int | float:
    """The objective's power when it is known, else the usual one for the slide's mpp."""
    if grid.objective is not None:
        return int(grid.objective) if grid.objective.is_integer() else grid.objective
    if grid.mpp is None or not grid.side_level0:
        fix = "export as clam, which needs no magnification"
        raise StoreError(
            "TRIDENT needs a magnification, and neither mpp nor objective are known", where=str(grid.path), fix=fix
        )
    wanted = MPP_AT_1X * grid.side_level0 / (grid.mpp * grid.tile_px)
    return min(USUAL, key=lambda usual: abs(math.log(usual / wanted)))


def _target_magnification(grid: Grid, source: float, side: int) -> int | float:
    """A usual magnification that makes TRIDENT read ``side`` level-0 pixels, else the exact ratio."""
    for usual in (source, *USUAL):
        if float(usual).is_integer() and scale_length(grid.tile_px, source / usual) == side:
            return int(usual)
    return source * grid.tile_px / grid.side_level0


def _overlap_px(grid: Grid) -> int:
    """How far neighbouring tiles overlap [px of a tile], from the smallest step between columns."""
    columns: npt.NDArray[np.int64] = np.unique(grid.xy_level0[:, 0])
    steps = np.diff(columns)
    if not len(steps):
        return 0
    # Corners are rounded one by one, so that equal steps differ by a pixel.
    step = float(steps[steps <= steps.min() + 1].mean()) * grid.tile_px / grid.side_level0
    return max(0, round(grid.tile_px - step))
