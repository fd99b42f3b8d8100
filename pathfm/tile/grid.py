"""Which squares of a slide become tiles: a global grid from (0, 0), row by row, whatever the tissue mask says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pathfm.errors import SlideError
from pathfm.geometry import Box, Mpp, Size, best_level, scale_length, tile_corners, tiles_along
from pathfm.study import TileSettings


@dataclass(frozen=True)
class Grid:
    """The tiles of a slide and how to read them.

    Attributes:
        level: pyramid level the tiles are read from.
        read_px: width and height read at that level; equal to the tile side when nothing is rescaled.
        mpp: true micrometres per pixel of the tiles, None when the slide's is unknown.
        side_level0: exact width and height of a tile in level-0 pixels.
        corners_level0: [N, 2] upper left corners in level-0 pixels, row-major.
        columns: tiles per row.
    """

    level: int
    read_px: Size
    mpp: float | None
    side_level0: tuple[float, float]
    corners_level0: npt.NDArray[np.int64]
    columns: int

    def box_level0(self, index: int) -> Box:
        """The rectangle of a tile on the slide."""
        x, y = (int(value) for value in self.corners_level0[index])
        return Box(x, y, x + scale_length(self.side_level0[0], 1), y + scale_length(self.side_level0[1], 1))

    def boxes(self, downsample: float) -> npt.NDArray[np.float64]:
        """All tiles as [N, 4] left, top, right, bottom on a picture of the given downsample (fractional pixels)."""
        corners = self.corners_level0 / downsample
        return np.concatenate([corners, corners + np.array(self.side_level0) / downsample], axis=1)


def plan_grid(size_level0: Size, downsamples: tuple[float, ...], mpp: Mpp | None, settings: TileSettings) -> Grid:
    """The grid of whole tiles; partial tiles at the right and lower edge are left out.

    Args:
        size_level0: width and height of the slide.
        downsamples: downsample of each level, ascending.
        mpp: the slide's micrometres per pixel at level 0; needed unless ``settings.mpp`` is native.
        settings: resolution and side of the tiles.

    Raises:
        SlideError: the slide is coarser than the tiles that are asked for.
    """
    side = settings.tile_px
    level, ratio, tile_mpp = _level_and_ratio(downsamples, mpp, settings)
    side_x, side_y = side * ratio[0], side * ratio[1]
    columns, rows = tiles_along(size_level0.width, side_x), tiles_along(size_level0.height, side_y)
    x = np.array(tile_corners(size_level0.width, side_x, columns)[:-1], dtype=np.int64)
    y = np.array(tile_corners(size_level0.height, side_y, rows)[:-1], dtype=np.int64)
    corners = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    read = Size(scale_length(side_x, 1 / downsamples[level]), scale_length(side_y, 1 / downsamples[level]))
    return Grid(level, read, tile_mpp, (side_x, side_y), corners, columns)


def _level_and_ratio(
    downsamples: tuple[float, ...], mpp: Mpp | None, settings: TileSettings
) -> tuple[int, tuple[float, float], float | None]:
    """Level to read, level-0 pixels per tile pixel along x and y, and the tiles' true mpp."""
    if settings.mpp == "native" or mpp is None:
        return 0, (1.0, 1.0), mpp.mean if mpp else None
    wanted = settings.mpp
    square = abs(mpp.x / mpp.y - 1) <= settings.mpp_tolerance
    for level, downsample in enumerate(downsamples):
        if square and abs(mpp.mean * downsample / wanted - 1) <= settings.mpp_tolerance:
            return level, (downsample, downsample), mpp.mean * downsample
    ratio = (wanted / mpp.x, wanted / mpp.y)
    if min(ratio) < 1:
        raise SlideError(
            f"tiles of {wanted:g} mpp would have to be made up: the slide has {mpp.mean:.4g}",
            fix="set a coarser tile.mpp, or tile.mpp=native",
        )
    return best_level(downsamples, min(ratio)), ratio, wanted
