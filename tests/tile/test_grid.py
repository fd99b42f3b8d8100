"""The grid: global, deterministic, true to the micron."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.errors import SlideError
from pathfm.geometry import Mpp, Size
from pathfm.study import TileSettings
from pathfm.tile.grid import plan_grid


def _plan(size, downsamples, slide_mpp, **settings):
    return plan_grid(
        Size(*size), tuple(downsamples), Mpp(slide_mpp, slide_mpp) if slide_mpp else None, TileSettings(**settings)
    )


def test_half_a_micron_from_a_quarter():
    grid = _plan((4480, 2240), [1, 4], 0.25, mpp=0.5, tile_px=224)
    assert (grid.level, grid.read_px, grid.side_level0) == (0, Size(448, 448), (448.0, 448.0))
    assert len(grid.corners_level0) == 10 * 5
    assert grid.corners_level0[11].tolist() == [448, 448]


def test_a_level_within_tolerance_is_used_unscaled_and_its_true_mpp_kept():
    grid = _plan((2220, 2967), [1], 0.499, mpp=0.5, tile_px=224)
    assert (grid.read_px, grid.mpp, grid.side_level0[0]) == (Size(224, 224), 0.499, 224.0)


def test_corners_do_not_drift_on_odd_scanners():
    grid = _plan((60_000, 1000), [1, 4, 16], 0.2527, mpp=0.5, tile_px=224, mpp_tolerance=0.0)
    exact = np.arange(grid.columns) * 224 * 0.5 / 0.2527
    assert np.abs(grid.corners_level0[: grid.columns, 0] - exact).max() <= 0.5


def test_pixels_that_would_have_to_be_made_up_are_refused():
    with pytest.raises(SlideError, match="made up"):
        _plan((1000, 1000), [1], 1.0, mpp=0.5)


def test_native_needs_no_mpp():
    assert _plan((1000, 500), [1], None, mpp="native", tile_px=224).corners_level0.shape == (4 * 2, 2)


def test_slide_smaller_than_a_tile_gives_no_tile():
    assert len(_plan((497, 185), [1], 0.194, mpp=0.5, tile_px=224).corners_level0) == 0


@given(width=st.integers(1, 200_000), height=st.integers(1, 50_000), mpp=st.floats(0.1, 0.5), side=st.integers(224, 512))
def test_every_tile_lies_inside_the_slide(width, height, mpp, side):
    grid = _plan((width, height), [1.0, 4.0, 16.0], mpp, mpp=1.0, tile_px=side)
    boxes = grid.boxes(1.0)
    if len(boxes):
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= width + 1
        assert boxes[:, 3].max() <= height + 1
        assert [grid.level] == [max(level for level, d in enumerate([1.0, 4.0, 16.0]) if d <= 1.0 / mpp * 1.01)]
