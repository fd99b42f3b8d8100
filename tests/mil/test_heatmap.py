"""Heatmaps: colours where the tiles are, the same for the same ranks, what they mean written on them, sizes within bounds."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from pathfm.mil.heatmap import (
    FOOT_PX,
    LEAST_WIDTH_PX,
    MOST_PX,
    TITLE_PX,
    Canvas,
    SlideHeat,
    all_tiles,
    attention_percentile,
    draw_class_maps,
    draw_heatmap,
    tile_colours,
    write_heatmap,
)

GREY = np.full((300, 500, 3), 128, np.uint8)
XY = np.array([[0, 0], [1000, 0], [0, 1000]])


def heat(value, xy=XY, sides=(1000.0, 1000.0), **changes):
    value = np.asarray(value, dtype=np.float64)
    return SlideHeat("s", xy, sides, value.reshape(len(xy), -1), **changes)


def signed(value, **changes):
    return heat(value, kind="gradient x input", names=("tumour",), **changes)


def test_tiles_are_coloured_where_they_lie_and_nothing_else_is():
    picture = draw_heatmap(Canvas(GREY, 10.0), heat([0.1, 0.2, 0.7]))
    assert picture.shape == (300 + FOOT_PX, 500, 3)
    changed = (picture[:300] != 128).any(axis=2)
    wanted = np.zeros((300, 500), bool)
    wanted[:100, :200] = wanted[100:200, :100] = True
    assert (changed == wanted).all()
    assert picture[150, 50, :2].sum() > picture[50, 50, :2].sum()  # more attention, brighter


def test_colour_depends_on_ranks_within_the_slide_only():
    one, two = (draw_heatmap(Canvas(GREY, 10.0), heat(value)) for value in ([0.1, 0.2, 0.7], [1e-9, 2e-9, 1e-8]))
    assert (one == two).all()


def test_percentiles_share_ties_and_a_lone_tile_is_in_the_middle():
    assert attention_percentile(np.array([0.2, 0.2, 0.6])).tolist() == [1 / 3, 1 / 3, 2.5 / 3]
    assert attention_percentile(np.array([1.0])).tolist() == [0.5]
    assert attention_percentile(np.array([0.2, np.nan, 0.6]))[[0, 2]].tolist() == [0.25, 0.75]
    assert np.isnan(attention_percentile(np.array([np.nan]))).all()


def test_overlapping_tiles_are_averaged_whatever_their_order():
    # CLAM draws patches one over another, so that the last one wins (CLAM#254).
    xy = np.array([[0, 0], [500, 0], [3000, 0], [3000, 2000]])
    value = np.array([-1.0, 1.0, 1.0, -1.0])
    forward, backward = (
        draw_heatmap(Canvas(GREY, 10.0), signed(value[order], xy=xy[order])) for order in ([0, 1, 2, 3], [3, 2, 1, 0])
    )
    assert (forward == backward).all()
    red, blue, middle = forward[50, 120], forward[50, 20], forward[50, 70]
    assert red[0] > red[2] and blue[2] > blue[0]
    assert np.ptp(middle.astype(int)) <= 2  # as much for as against: neither red nor blue


def test_pixels_that_are_not_square_make_tiles_that_are_not():
    picture = draw_heatmap(Canvas(GREY, 10.0), heat([1.0], np.array([[500, 500]]), (400.0, 1200.0)))
    changed = (picture[:300] != 128).any(axis=2)
    assert np.argwhere(changed).min(axis=0).tolist() == [50, 50]
    assert np.argwhere(changed).max(axis=0).tolist() == [169, 89]


def test_tiles_without_a_value_are_hatched_and_take_no_rank():
    picture = draw_heatmap(Canvas(GREY, 10.0), heat([0.1, np.nan, 0.7]))
    other = draw_heatmap(Canvas(GREY, 10.0), heat([0.1, 0.7], XY[[0, 2]]))
    assert (picture[:300, :100] == other[:300, :100]).all()
    unseen = picture[:100, 100:200]
    assert (unseen[..., 0] == unseen[..., 2]).all()  # grey
    assert len(np.unique(unseen)) == 2
    assert (picture[300:, :250] != other[300:, :250]).any()  # and the strip says what the hatching means


def test_signed_maps_have_blue_against_and_red_for():
    picture = draw_heatmap(Canvas(GREY, 10.0), signed([2.0, -2.0, 0.0]))
    red, blue, none = picture[50, 50].astype(int), picture[50, 150].astype(int), picture[150, 50].astype(int)
    assert red[0] - red[2] > 60 and blue[2] - blue[0] > 60 and np.ptp(none) <= 2
    same = draw_heatmap(Canvas(GREY, 10.0), signed([2e-7, -2e-7, 0.0]))
    assert (picture == same).all()  # the scale is the slide's own
    assert np.isfinite(draw_heatmap(Canvas(GREY, 10.0), signed([0.0, 0.0, 0.0]))).all()


def test_scale_bar_only_where_the_scale_is_known():
    plain, scaled, mosaic = (
        draw_heatmap(canvas, heat([1.0, 1.0, 1.0]))[300:, 250:]
        for canvas in (
            Canvas(GREY, 10.0),
            Canvas(GREY, 10.0, mpp_level0=0.25),
            Canvas(GREY, 10.0, mpp_level0=0.25, synthetic=True),
        )
    )
    assert (plain == 255).all()
    bar = (scaled[15] < 100).all(axis=1).sum()
    assert bar * 10.0 * 0.25 == 200  # um: the round length that fits in a quarter of 1250 um
    assert (mosaic[:20] == 255).all()


def test_lesion_outline_is_drawn_from_a_mask_of_any_size():
    lesion = np.zeros((30, 50), bool)
    lesion[10:20, 10:30] = True
    with_line, without = (draw_heatmap(Canvas(GREY, 10.0, lesion=mask), heat([1.0] * 3))[:300] for mask in (lesion, None))
    changed = (with_line != without).any(axis=2)
    assert changed[100, 150:250].all()
    assert not changed[140:160, 140:260].any()


@pytest.mark.parametrize("shape", [(2, 3), (20, 30), (3000, 20), (20, 3000), (2500, 3900)])
def test_very_small_slides_are_enlarged_and_large_ones_bounded(shape):
    # STAMP draws one pixel per tile: maps of two to six pixels (STAMP#54).
    picture = draw_heatmap(Canvas(np.full((*shape, 3), 90, np.uint8), 100.0), heat([0.5], np.array([[0, 0]]), (100.0, 100.0)))
    height, width = picture.shape[0] - FOOT_PX, picture.shape[1]
    assert LEAST_WIDTH_PX <= width <= MOST_PX and height <= MOST_PX
    if min(shape) < 100:
        assert max(height, width) >= LEAST_WIDTH_PX
    coloured = (picture[:height] != 90).any(axis=2) & (picture[:height] != 255).any(axis=2)
    assert coloured.any()


def test_tiles_outside_the_slide_do_no_harm(tmp_path):
    xy = np.array([[-500, -500], [250, 150], [900, 900]])
    picture = draw_heatmap(Canvas(GREY[:20, :30], 10.0), heat([1.0] * 3, xy, (100.0, 100.0)))
    write_heatmap(tmp_path / "h.png", picture)
    assert (cv2.imread(str(tmp_path / "h.png"))[:, :, ::-1] == picture).all()


def test_class_maps_lie_side_by_side_under_their_names():
    value = np.array([[3.0, 1.0, 2.0, 0.1], [1.0, 2.0, 3.0, 0.1], [2.0, 3.0, 1.0, 0.1]])
    many = heat(value, names=("a", "b", "naïve ☂", "a name that is far too long for its picture" * 4))
    sheet = draw_class_maps(Canvas(GREY, 10.0), many)
    single = draw_heatmap(Canvas(GREY, 10.0), many, 1)
    assert (draw_heatmap(Canvas(GREY, 10.0), replace(many, main=1)) == single).all()
    width = single.shape[1]
    assert sheet.shape[1] <= MOST_PX + 100
    assert (sheet[TITLE_PX : TITLE_PX + 300, width + 12 : 2 * width + 12] == single[:300]).all()
    assert (sheet[:TITLE_PX, : width + 12] < 100).any()


def test_signed_class_maps_share_one_scale():
    value = np.array([[4.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    both = heat(value, names=("a", "b"), kind="gradient x input")
    strong, weak = tile_colours(both, 0)[0].astype(int), tile_colours(both, 1)[0].astype(int)
    assert strong[0] - strong[2] > weak[0] - weak[2] > 0


def test_values_go_back_to_the_tiles_that_were_looked_at():
    value = all_tiles(np.array([[1.0], [2.0]]), np.array([3, 1]), 4)
    np.testing.assert_array_equal(value, [[np.nan], [2.0], [np.nan], [1.0]])


def test_many_tiles_take_no_time_of_their_own():
    xy = np.stack(np.meshgrid(np.arange(400), np.arange(300)), axis=-1).reshape(-1, 2) * 256
    value = np.random.default_rng(0).random(len(xy))
    picture = draw_heatmap(Canvas(np.full((768, 1024, 3), 200, np.uint8), 100.0), heat(value, xy, (256.0, 256.0)))
    assert max(picture.shape) <= MOST_PX + FOOT_PX
