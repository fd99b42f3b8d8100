"""Which squares of a slide become tiles: a global grid from (0, 0), row by row, whatever the tissue mask says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pathfm.errors import SlideError
from pathfm.geometry import Box, Mpp, best_level, nearest, scale_length
from pathfm.slides.reader import Level
from pathfm.slides.stored import SHRINKS
from pathfm.slides.tile_reading import Cut
from pathfm.study import TileSettings


@dataclass(frozen=True)
class Grid:
    """The tiles of a slide at one resolution, and how to read them.

    Attributes:
        cut: where the stored pictures lie, for ``read_tiles``.
        mpp: true micrometres per pixel of the tiles, None when the slide's is unknown.
        side_level0: exact width and height of a stored picture in level-0 pixels.
        corners_level0: [N, 2] upper left corners of the stored pictures in level-0 pixels, row-major.
        cells: [N, 4] left, top, right, bottom of the tiles in level-0 pixels (fractions kept): the stored pictures, or without
            the room around them that ``keep_px`` asks for. Tissue is judged here.
    """

    cut: Cut
    mpp: float | None
    side_level0: tuple[float, float]
    corners_level0: npt.NDArray[np.int64]
    cells: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.corners_level0)

    def box_level0(self, index: int) -> Box:
        """The rectangle of a stored picture on the slide."""
        x, y = (int(value) for value in self.corners_level0[index])
        return Box(x, y, x + scale_length(self.side_level0[0], 1), y + scale_length(self.side_level0[1], 1))


@dataclass(frozen=True)
class _Scale:
    """Level and power of two to read at, level-0 pixels per tile pixel along x and y, and the tiles' true mpp."""

    level: int
    shrink: int
    ratio: tuple[float, float]
    mpp: float | None


def plan_grids(levels: Sequence[Level], mpp: Mpp | None, settings: TileSettings) -> list[Grid]:
    """The grids of all wanted resolutions, in the order of the settings.

    Args:
        levels: pyramid levels, finest first.
        mpp: the slide's micrometres per pixel at level 0; needed unless ``settings.mpp`` is native.
        settings: resolutions, side, overlap, region and edge of the tiles.

    Raises:
        SlideError: the slide is coarser than the tiles that are asked for.
    """
    wanted = settings.mpp if isinstance(settings.mpp, tuple) else (settings.mpp,)
    return [_plan(levels, _scale(levels, mpp, each, settings), settings) for each in wanted]


def grid_at(
    levels: Sequence[Level],
    mpp: Mpp | None,
    corners_level0: npt.NDArray[np.float64],
    side_level0: float,
    settings: TileSettings,
) -> Grid:
    """Tiles of given corners [N, 2] and footprint, as another tool chose them, in their order from top to bottom.

    Raises:
        SlideError: the tiles are finer than the slide.
    """
    ratio = side_level0 / settings.tile_px
    if ratio < 1 and not settings.upsample:
        raise _too_fine(f"tiles of {side_level0:.4g} level-0 px at {settings.tile_px} px")
    level, shrink = _finest_needed(levels, ratio)
    order = np.lexsort((corners_level0[:, 0], corners_level0[:, 1]))
    corners = corners_level0[order]
    scale = _Scale(level, shrink, (ratio, ratio), mpp.mean * ratio if mpp else None)
    exact = np.concatenate([corners, corners + side_level0], axis=1)
    return _grid(levels, scale, corners, exact, settings.tile_px)


def _plan(levels: Sequence[Level], scale: _Scale, settings: TileSettings) -> Grid:
    side, stride = settings.tile_px, settings.tile_px - settings.overlap_px
    kept = settings.keep_px or side
    starts = [_starts(levels, scale, axis, settings) for axis in (0, 1)]
    tops, lefts = np.meshgrid(starts[1] * stride, starts[0] * stride, indexing="ij")
    ratio = np.array(scale.ratio)
    corners = np.stack([lefts.ravel(), tops.ravel()], axis=1).astype(np.float64)
    cells = np.concatenate([corners, corners + side], axis=1) * np.tile(ratio, 2)
    return _grid(levels, scale, (corners - _room(settings)) * ratio, cells, kept)


def _starts(levels: Sequence[Level], scale: _Scale, axis: int, settings: TileSettings) -> npt.NDArray[np.int64]:
    """Numbers of the columns (axis 0) or rows whose stored pictures lie in the slide, or at the edge at least reach into it."""
    side, stride, ratio = settings.tile_px, settings.tile_px - settings.overlap_px, scale.ratio[axis]
    kept = settings.keep_px or side
    length = levels[0].size[axis]
    numbers = np.arange(1 + int(length / (stride * ratio)), dtype=np.int64)
    if settings.edge == "pad":
        return numbers[numbers * stride * ratio < length]
    first = ((numbers * stride - _room(settings)) * ratio).astype(np.float64)
    _, _, last = _rounded(first, np.array(kept * ratio), levels[scale.level].downsample * scale.shrink)
    # Just under half a pixel of slack, which rounding a corner may use, but never a pixel that the level does not have.
    inside = (first >= 0) & (first + kept * ratio <= length + 0.49) & (last <= levels[scale.level].size[axis] // scale.shrink)
    return numbers[inside]


def _room(settings: TileSettings) -> int:
    """Room left of and above a tile [px]: whole pixels, since half ones would move the stored picture against its corner."""
    return ((settings.keep_px or settings.tile_px) - settings.tile_px) // 2


def _grid(
    levels: Sequence[Level], scale: _Scale, exact: npt.NDArray[np.float64], cells: npt.NDArray[np.float64], side: int
) -> Grid:
    sides = (side * scale.ratio[0], side * scale.ratio[1])
    corners, first, last = _rounded(exact, np.array(sides), levels[scale.level].downsample * scale.shrink)
    cut = Cut(scale.level, scale.shrink, np.concatenate([first, last], axis=1), side)
    return Grid(cut, scale.mpp, sides, corners, cells)


def _rounded(
    exact: npt.NDArray[np.float64], side_level0: npt.NDArray[np.float64], frame: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Corners in level-0 pixels, and first and last edges in pixels of the shrunk level, of tiles that start at exact places.

    Pixels are cut where the rounded corners say, so that the two roundings do not add up: what a tile shows lies within half a
    pixel of the shrunk level of where the store says it does.
    """
    corners = nearest(exact)
    return corners, nearest(corners / frame), nearest((corners + side_level0) / frame)


def _scale(levels: Sequence[Level], mpp: Mpp | None, wanted: float | str, settings: TileSettings) -> _Scale:
    if isinstance(wanted, str) or mpp is None:
        return _Scale(0, 1, (1.0, 1.0), mpp.mean if mpp else None)
    square = abs(mpp.x / mpp.y - 1) <= settings.mpp_tolerance
    for shrink, (level, (_, downsample)) in itertools.product(reversed(SHRINKS), enumerate(levels)):
        frame = downsample * shrink
        if square and abs(mpp.mean * frame / wanted - 1) <= settings.mpp_tolerance:
            return _Scale(level, shrink, (frame, frame), mpp.mean * frame)
    ratio = (wanted / mpp.x, wanted / mpp.y)
    if min(ratio) < 1 and not settings.upsample:
        raise _too_fine(f"tiles of {wanted:g} mpp", f"the slide has {mpp.mean:.4g}")
    return _Scale(*_finest_needed(levels, min(ratio)), ratio, wanted)


def _finest_needed(levels: Sequence[Level], ratio: float) -> tuple[int, int]:
    """The level to read, and the power of two to shrink it by, so that little is left for the area filter."""
    level = best_level([each.downsample for each in levels], ratio)
    return level, next((shrink for shrink in SHRINKS if levels[level].downsample * shrink <= ratio * 1.0001), 1)


def _too_fine(tiles: str, has: str = "the slide is coarser") -> SlideError:
    fix = "set a coarser tile.mpp, or tile.mpp=native; tile.upsample=true makes them all the same"
    return SlideError(f"{tiles} would have to be made up: {has}", fix=fix)
