"""The grid: global, deterministic, true to the micron."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.errors import SlideError
from pathfm.geometry import Mpp, Size
from pathfm.slides.reader import Level
from pathfm.study import TileSettings
from pathfm.tile.grid import grid_at, plan_grids


def _levels(size, downsamples):
    return [Level(Size(*(math.ceil(side / each) for side in size)), each) for each in downsamples]


def _plans(size, downsamples, slide_mpp, **settings):
    mpp = Mpp(*slide_mpp) if isinstance(slide_mpp, tuple) else Mpp(slide_mpp, slide_mpp) if slide_mpp else None
    return plan_grids(_levels(size, downsamples), mpp, TileSettings(**settings))


def _plan(*args, **settings):
    (grid,) = _plans(*args, **settings)
    return grid


def test_half_a_micron_from_a_quarter():
    grid = _plan((4480, 2240), [1, 4], 0.25, mpp=0.5, tile_px=224)
    assert (grid.cut.level, grid.cut.shrink, grid.side_level0) == (0, 2, (448.0, 448.0))
    assert len(grid) == 10 * 5
    assert grid.corners_level0[11].tolist() == [448, 448]
    assert grid.cut.boxes[11].tolist() == [224, 224, 448, 448]


@pytest.mark.parametrize(
    ("slide_mpp", "downsamples", "level", "shrink", "mpp"),
    [
        (0.499, [1], 0, 1, 0.499),
        (0.2527, [1, 4], 0, 2, 0.5054),
        (0.1265, [1, 4.0], 1, 1, 0.506),
        (0.0625, [1], 0, 8, 0.5),
        (0.26, [1], 0, 1, 0.5),
    ],
)
def test_what_is_within_tolerance_is_used_unscaled_and_its_true_mpp_kept(slide_mpp, downsamples, level, shrink, mpp):
    grid = _plan((4000, 2967), downsamples, slide_mpp, mpp=0.5, tile_px=224)
    assert (grid.cut.level, grid.cut.shrink) == (level, shrink)
    assert grid.mpp == pytest.approx(mpp)
    assert grid.side_level0[0] == pytest.approx(224 * mpp / slide_mpp)


def test_corners_do_not_drift_on_odd_scanners():
    grid = _plan((60_000, 1000), [1, 4, 16], 0.2527, mpp=0.5, tile_px=224, mpp_tolerance=0.0)
    row = grid.corners_level0[grid.corners_level0[:, 1] == 0, 0]
    assert np.abs(row - np.arange(len(row)) * 224 * 0.5 / 0.2527).max() <= 0.5


def test_pixels_that_would_have_to_be_made_up_are_refused_unless_asked_for():
    with pytest.raises(SlideError, match="would have to be made up: the slide has 1"):
        _plan((4000, 4000), [1], 1.0, mpp=0.5)
    grid = _plan((4000, 4000), [1], 1.0, mpp=0.5, upsample=True)
    assert grid.side_level0 == (112.0, 112.0)
    assert grid.mpp == 0.5


def test_native_takes_level_0_as_it_is_also_without_mpp():
    assert _plan((1000, 500), [1], None, mpp="native", tile_px=250).mpp is None
    grid = _plan((1000, 500), [1, 4], 0.31, mpp="native", tile_px=250)
    assert (grid.mpp, len(grid), grid.cut.level) == (0.31, 8, 0)


def test_pixels_that_are_not_square_become_square_tiles():
    grid = _plan((4000, 4000), [1], (0.25, 0.2), mpp=0.5, tile_px=200)
    assert grid.side_level0 == pytest.approx((400.0, 500.0))
    left, top, right, bottom = grid.cut.boxes[0]
    assert (right - left) / (bottom - top) == pytest.approx(400 / 500)


def test_overlap_and_kept_region_do_not_move_the_grid():
    plain = _plan((4480, 4480), [1], 0.25, mpp=0.5, tile_px=224)
    overlapping = _plan((4480, 4480), [1], 0.25, mpp=0.5, tile_px=224, overlap_px=56)
    assert overlapping.corners_level0[1].tolist() == [336, 0]
    roomy = _plan((4480, 4480), [1], 0.25, mpp=0.5, tile_px=224, keep_px=392)
    # Regions of the outermost tiles reach out of the slide, and are dropped with them.
    assert len(roomy) == (10 - 2) ** 2
    assert roomy.cut.side == 392
    assert roomy.corners_level0[0].tolist() == [448 - 168, 448 - 168]
    assert roomy.cells[0].tolist() == [448, 448, 896, 896]
    assert {tuple(cell) for cell in roomy.cells[:, :2]} <= {tuple(corner) for corner in plain.corners_level0}
    padded = _plan((4480, 4480), [1], 0.25, mpp=0.5, tile_px=224, keep_px=392, edge="pad")
    assert len(padded) == 100
    assert padded.corners_level0[0].tolist() == [-168, -168]


def test_partial_tiles_are_dropped_or_padded():
    assert len(_plan((500, 460), [1], 0.5, mpp=0.5, tile_px=224)) == 4
    assert len(_plan((500, 460), [1], 0.5, mpp=0.5, tile_px=224, edge="pad")) == 9


@given(
    size=st.tuples(st.integers(300, 20_000), st.integers(300, 20_000)),
    mpp=st.floats(0.1, 0.5),
    wanted=st.floats(0.5, 4.0),
    tile_px=st.integers(16, 512),
    overlap=st.integers(0, 15),
    downsamples=st.sampled_from([(1.0,), (1.0, 4.0), (1.0, 2.0, 4.0, 8.0), (1.0, 4.0003, 16.002), (1.0, 2.5)]),
)
def test_every_tile_lies_in_slide_and_level_and_rounding_never_adds_up(size, mpp, wanted, tile_px, overlap, downsamples):
    levels = _levels(size, downsamples)
    settings = TileSettings(mpp=wanted, tile_px=tile_px, overlap_px=overlap)
    (grid,) = plan_grids(levels, Mpp(mpp, mpp), settings)
    if not len(grid):
        return
    boxes, level = grid.cut.boxes, levels[grid.cut.level]
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= level.size.width // grid.cut.shrink
    assert boxes[:, 3].max() <= level.size.height // grid.cut.shrink
    exact = grid.cells[:, :2]
    assert np.abs(grid.corners_level0 - exact).max() <= 0.5
    frame = level.downsample * grid.cut.shrink
    said = np.concatenate([grid.corners_level0, grid.corners_level0 + np.array(grid.side_level0)], axis=1)
    assert np.abs(boxes - said / frame).max() <= 0.5 + 1e-6
    assert (grid.cells[:, 2] <= size[0] + 0.5).all()
    # Nothing is upsampled: a box is at least about as wide as the tile made from it.
    assert (boxes[:, 2] - boxes[:, 0]).min() >= tile_px * 0.98 - 1
    order = np.lexsort((grid.corners_level0[:, 0], grid.corners_level0[:, 1]))
    assert (order == np.arange(len(grid))).all()


@given(mpp=st.floats(0.2, 0.3), tile_px=st.sampled_from([128, 224, 256]), number=st.integers(0, 500))
def test_the_same_tissue_at_several_mpp_overlaps_within_half_a_pixel(mpp, tile_px, number):
    grids = _plans((30_000, 20_000), [1.0, 4.0, 16.0], mpp, mpp=(0.5, 1.0, 2.0), tile_px=tile_px, mpp_tolerance=0.0)
    fine, coarse = grids[0], grids[2]
    tile = number % len(coarse)
    # A tile of 2 mpp covers exactly 4 x 4 tiles of 0.5 mpp: its corner is the corner of one of them.
    side = fine.side_level0[0]
    column, row = (round(value / (4 * side)) * 4 for value in coarse.cells[tile, :2])
    exact = np.array([column * side, row * side])
    inside = np.flatnonzero((np.abs(fine.cells[:, :2] - exact) < 1e-3).all(axis=1))
    assert len(inside) == 1
    assert np.abs(fine.corners_level0[inside[0]] - coarse.corners_level0[tile]).max() <= 1
    assert np.abs(coarse.corners_level0[tile] - exact).max() <= 0.5


def test_tiles_of_another_tool_keep_their_footprint():
    corners = np.array([[700.0, 10.0], [10.0, 10.0], [10.0, 900.5]])
    grid = grid_at(_levels((5000, 5000), [1, 4]), Mpp(0.25, 0.25), corners, 512.0, TileSettings(tile_px=256))
    assert grid.corners_level0.tolist() == [[10, 10], [700, 10], [10, 901]]
    assert (grid.cut.shrink, grid.mpp, grid.side_level0) == (2, 0.5, (512.0, 512.0))
