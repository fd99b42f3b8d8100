"""The heatmap: colours where the tiles are, the same for the same ranks, and room for its bars."""

import cv2
import numpy as np

from pathfm.mil.heatmap import FOOT_PX, Canvas, attention_percentile, draw_heatmap, write_heatmap

GREY = np.full((300, 500, 3), 128, np.uint8)
XY = np.array([[0, 0], [1000, 0], [0, 1000]])


def test_tiles_are_coloured_where_they_lie_and_nothing_else_is():
    picture = draw_heatmap(Canvas(GREY, 10.0), XY, 1000.0, np.array([0.1, 0.2, 0.7]))
    assert picture.shape == (300 + FOOT_PX, 500, 3)
    changed = (picture[:300] != 128).any(axis=2)
    wanted = np.zeros((300, 500), bool)
    wanted[:100, :200] = wanted[100:200, :100] = True
    assert (changed == wanted).all()
    assert picture[150, 50, :2].sum() > picture[50, 50, :2].sum()  # more attention, brighter


def test_colour_depends_on_ranks_within_the_slide_only():
    one = draw_heatmap(Canvas(GREY, 10.0), XY, 1000.0, np.array([0.1, 0.2, 0.7]))
    two = draw_heatmap(Canvas(GREY, 10.0), XY, 1000.0, np.array([1e-9, 2e-9, 1e-8]))
    assert (one == two).all()


def test_percentiles_share_ties_and_a_lone_tile_is_in_the_middle():
    assert attention_percentile(np.array([0.2, 0.2, 0.6])).tolist() == [1 / 3, 1 / 3, 2.5 / 3]
    assert attention_percentile(np.array([1.0])).tolist() == [0.5]


def test_scale_bar_only_where_the_scale_is_known():
    plain, scaled, mosaic = (
        draw_heatmap(canvas, XY, 1000.0, np.ones(3))[300:, 250:]
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
    with_line, without = (
        draw_heatmap(Canvas(GREY, 10.0, lesion=mask), XY, 1000.0, np.ones(3))[:300] for mask in (lesion, None)
    )
    changed = (with_line != without).any(axis=2)
    assert changed[100, 150:250].all()
    assert not changed[140:160, 140:260].any()


def test_small_thumbnails_are_enlarged_and_tiles_outside_do_no_harm(tmp_path):
    picture = draw_heatmap(Canvas(GREY[:20, :30], 10.0), np.array([[-500, -500], [250, 150], [900, 900]]), 100.0, np.ones(3))
    assert picture.shape[1] == 420
    write_heatmap(tmp_path / "h.png", picture)
    assert (cv2.imread(str(tmp_path / "h.png"))[:, :, ::-1] == picture).all()
