import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm import geometry
from pathfm.geometry import Box, Mpp, Size

lengths = st.integers(1, 300_000)
sides = st.floats(1.0, 5_000.0)
factors = st.floats(1e-3, 64.0)
boxes = st.builds(
    lambda left, top, width, height: Box(left, top, left + width, top + height),
    st.integers(0, 200_000),
    st.integers(0, 200_000),
    st.integers(1, 5_000),
    st.integers(1, 5_000),
)


@given(length=lengths, side=sides)
def test_tiles_cover_an_axis_without_gap_or_overlap_and_never_leave_it(length, side):
    count = geometry.tiles_along(length, side)
    corners = geometry.tile_corners(length, side, count)
    assert len(corners) == count + 1
    assert corners[0] == 0
    assert corners[-1] <= length
    assert all(abs((right - left) - side) <= 1.0 for left, right in pairwise(corners))
    assert all(abs(corner - index * side) <= 0.5 + 1e-6 for index, corner in enumerate(corners))


@given(length=lengths, side=sides)
def test_no_further_whole_tile_would_fit(length, side):
    count = geometry.tiles_along(length, side)
    assert (count + 1) * side > length
    assert count * side <= length + 0.5 + 1e-6


def test_rounding_errors_do_not_pile_up_along_a_row():
    corners = geometry.tile_corners(1_000_000, 224.4, 4_000)
    assert corners[4_000] == round(4_000 * 224.4)


@pytest.mark.parametrize(
    ("length", "side", "count"), [(224, 224.0, 1), (223, 224.0, 0), (448, 224.0, 2), (448, 224.2, 2), (0, 5.0, 0)]
)
def test_tiles_along_by_hand(length, side, count):
    assert geometry.tiles_along(length, side) == count


@pytest.mark.parametrize(("wanted", "level"), [(0.5, 0), (1.0, 0), (3.9, 0), (4.0, 1), (15.0, 1), (16.0, 2), (100.0, 2)])
def test_best_level_is_the_coarsest_that_is_fine_enough(wanted, level):
    assert geometry.best_level((1.0, 4.0, 16.0), wanted) == level


def test_best_level_forgives_a_level_whose_downsample_is_rounded_in_the_file():
    assert geometry.best_level((1.0, 4.00012, 16.0031), 4.0) == 1
    assert geometry.best_level((1.0, 4.2), 4.0) == 0


@given(box=boxes, factor_x=factors, factor_y=factors)
def test_a_scaled_box_contains_the_exact_one_and_is_never_empty(box, factor_x, factor_y):
    scaled = geometry.scale_box(box, factor_x, factor_y)
    assert scaled.size.width >= 1
    assert scaled.size.height >= 1
    assert scaled.left <= box.left * factor_x
    assert scaled.right >= box.right * factor_x
    assert scaled.top <= box.top * factor_y
    assert scaled.bottom >= box.bottom * factor_y


@given(box=boxes)
def test_scaling_by_one_changes_nothing(box):
    assert geometry.scale_box(box, 1.0, 1.0) == box
    assert geometry.scale_point(box.left, box.top, 1.0) == (box.left, box.top)


@given(x=st.floats(0, 1e6), y=st.floats(0, 1e6), factor=factors)
def test_a_scaled_point_is_the_nearest_pixel(x, y, factor):
    scaled_x, scaled_y = geometry.scale_point(x, y, factor)
    assert abs(scaled_x - x * factor) <= 0.5 + 1e-6
    assert abs(scaled_y - y * factor) <= 0.5 + 1e-6


@given(length=st.floats(0, 1e6), factor=factors)
def test_a_scaled_length_is_at_least_a_pixel(length, factor):
    assert geometry.scale_length(length, factor) == max(1, math.floor(length * factor + 0.5))


@given(width=lengths, height=lengths, longest=st.integers(1, 4096))
def test_fit_within_keeps_the_aspect_and_never_enlarges(width, height, longest):
    size, downsample = geometry.fit_within(Size(width, height), longest)
    assert max(size) <= longest
    assert downsample >= 1.0
    assert abs(size.width * downsample - width) <= max(downsample, 0.5 * downsample + 1)
    assert abs(size.height * downsample - height) <= max(downsample, 0.5 * downsample + 1)


def test_fit_within_leaves_a_small_image_alone():
    assert geometry.fit_within(Size(300, 200), 1024) == (Size(300, 200), 1.0)


@pytest.mark.parametrize("value", [0.05, 0.25, 0.5, 20.0])
def test_mpp_of_microscopes_is_sane(value):
    assert geometry.mpp_is_sane(value)


@pytest.mark.parametrize("value", [0.0, -0.5, 352.8, 1e-9, math.nan, math.inf])
def test_mpp_that_no_microscope_has_is_not(value):
    assert not geometry.mpp_is_sane(value)


def test_mean_mpp_keeps_areas_and_a_box_knows_its_size():
    assert Mpp(0.25, 1.0).mean == pytest.approx(0.5)
    assert Box(2, 3, 12, 8).size == Size(10, 5)
