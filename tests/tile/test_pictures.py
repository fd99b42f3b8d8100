"""Overlays and contact sheets: what is drawn where, at any size, and the same bytes every time."""

from __future__ import annotations

import cv2
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from pathfm.tile import pictures
from pathfm.tile.pictures import contact_sheet, overlay, png_bytes, round_length, sample_evenly

GLASS = 240


def _glass(height, width):
    return np.full((height, width, 3), GLASS, dtype=np.uint8)


def _boxes(columns, rows, side):
    corners = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2) * float(side)
    return np.concatenate([corners, corners + side], axis=1)


def _longest_run(row):
    """Most neighbouring pixels of ink in a row of pixels."""
    best = run = 0
    for pixel in row:
        run = run + 1 if tuple(pixel) == pictures.INK else 0
        best = max(best, run)
    return best


def test_kept_is_outlined_removed_tinted_and_no_tissue_left_alone():
    picture = overlay(_glass(600, 600), 4.0, None, _boxes(3, 1, 800.0), ["kept", "pen", "no tissue"])
    assert tuple(picture[0, 100]) == tuple(picture[100, 0]) == tuple(picture[100, 199]) == pictures.COLOURS["kept"]
    assert (picture[2:198, 2:198] == GLASS).all()
    assert tuple(picture[0, 300]) == pictures.COLOURS["pen"]
    expected = np.rint(0.45 * GLASS + 0.55 * np.array(pictures.COLOURS["pen"]))
    assert (picture[2:198, 202:398] == expected).all()
    assert (picture[:200, 400:600] == GLASS).all()


def test_tiny_tiles_are_filled_like_a_plain_loop_would():
    rng = np.random.default_rng(3)
    corners = rng.uniform(-10, 610, (500, 2))
    boxes = np.concatenate([corners, corners + 4.3], axis=1)
    fates = rng.choice(["kept", "no tissue", "blur", "white", "a plug-in's own"], 500).tolist()
    colours = {**pictures.COLOURS, "a plug-in's own": pictures.OTHER_COLOURS[0]}
    expected = _glass(600, 600).astype(np.float32)
    for (left, top, right, bottom), fate in zip(np.rint(boxes).astype(int).clip(0, 600), fates, strict=True):
        if fate != "no tissue":
            opacity = 0.3 if fate == "kept" else 0.8
            expected[top:bottom, left:right] = GLASS * (1 - opacity) + np.array(colours[fate]) * opacity
    picture = overlay(_glass(600, 600), 1.0, None, boxes, fates)
    assert np.abs(picture[:600] - expected).max() <= 1


def test_a_hundred_thousand_tiles_of_less_than_a_pixel_are_seen():
    picture = overlay(_glass(300, 400), 100.0, None, _boxes(400, 250, 100.0), ["kept"] * 100_000)
    assert (picture[:250, :400] != GLASS).any(axis=2).all()


def test_tissue_is_outlined_at_any_resolution_of_the_mask():
    mask = np.zeros((50, 50), dtype=bool)
    mask[10:40, 10:40] = True
    picture = overlay(_glass(600, 600), 1.0, mask, np.zeros((0, 4)), [])
    assert tuple(picture[120, 300]) == tuple(picture[479, 300]) == pictures.INK
    assert tuple(picture[300, 300]) == tuple(picture[60, 60]) == (GLASS,) * 3
    whole = overlay(_glass(600, 600), 1.0, np.ones((50, 50), dtype=bool), np.zeros((0, 4)), [])
    assert (whole[:600] == GLASS).all()


@pytest.mark.parametrize(("size", "shown"), [((2000, 4000), (800, 1600)), ((3, 2), (513, 342)), ((900, 30), (900, 30))])
def test_large_pictures_shrink_and_tiny_ones_grow(size, shown):
    picture = overlay(_glass(*size), 10.0, None, _boxes(1, 1, 10.0), ["kept"], 0.25)
    assert picture.shape[1] == max(shown[1], pictures.LEAST_PX)
    assert shown[0] < picture.shape[0] < shown[0] + 200
    assert picture.dtype == np.uint8


def test_the_scale_bar_is_as_long_as_it_says():
    # 0.25 um x 8 = 2 um per px; a quarter of 1000 px is 500 um.
    foot = overlay(_glass(1000, 1000), 8.0, None, np.zeros((0, 4)), [], 0.25)[1000:]
    assert max(_longest_run(row) for row in foot) == 250
    shrunk = overlay(_glass(3200, 3200), 8.0, None, np.zeros((0, 4)), [], 0.25)[1600:]
    assert max(_longest_run(row) for row in shrunk) == 1000 / 4
    unknown = overlay(_glass(1000, 1000), 8.0, None, np.zeros((0, 4)), [])[1000:]
    assert max(_longest_run(row) for row in unknown) < 20
    assert (unknown != 255).any()


@pytest.mark.parametrize(("most", "length"), [(0.9, 0.5), (1.0, 1.0), (4.99, 2.0), (5.0, 5.0), (730.0, 500.0), (1e4, 1e4)])
def test_lengths_are_round(most, length):
    assert round_length(most) == pytest.approx(length)


def test_the_legend_does_not_depend_on_the_order_of_fates():
    fates = ["zebra", "pen", "apple", "kept", "white"]
    boxes = _boxes(5, 1, 100.0)
    foot = overlay(_glass(500, 600), 1.0, None, boxes, fates)[500:]
    assert (foot == overlay(_glass(500, 600), 1.0, None, boxes[::-1], fates[::-1])[500:]).all()
    assert list(pictures._colours(fates)) == ["kept", "white", "pen", "apple", "zebra"]


def test_a_long_legend_is_broken_into_lines():
    fates = [f"reason number {index}" for index in range(40)]
    picture = overlay(_glass(600, 600), 1.0, None, _boxes(40, 1, 10.0), fates)
    assert picture.shape[1] == 600
    assert picture.shape[0] > 600 + 10 * pictures.LINE_PX


def test_the_thumbnail_is_not_drawn_on():
    thumbnail = _glass(600, 600)
    overlay(thumbnail, 1.0, np.eye(600, dtype=bool), _boxes(1, 1, 50.0), ["pen"])
    assert (thumbnail == GLASS).all()


def test_a_sheet_shows_its_tiles_unchanged():
    rng = np.random.default_rng(0)
    tiles = [rng.integers(0, 200, (100, 100, 3), dtype=np.uint8) for _ in range(5)]
    sheet = contact_sheet(tiles, [f"x {index}\nsecond line" for index in range(5)], columns=4)
    step_x, step_y = 100 + pictures.GAP_PX, 100 + 2 * pictures.LINE_PX + pictures.GAP_PX
    assert sheet.shape == (2 * step_y + pictures.GAP_PX, 4 * step_x + pictures.GAP_PX, 3)
    for index, tile in enumerate(tiles):
        left, top = pictures.GAP_PX + index % 4 * step_x, pictures.GAP_PX + index // 4 * step_y
        assert (sheet[top : top + 100, left : left + 100] == tile).all()
        assert (sheet[top + 100 : top + 100 + pictures.LINE_PX, left : left + 100] != 255).any()


def test_a_sheet_shrinks_large_tiles_and_cuts_long_captions():
    sheet = contact_sheet([_glass(512, 512)] * 16, ["a very long caption " * 20] * 16, mpp=0.5)
    side = pictures.SHEET_TILE_PX
    assert sheet.shape[1] == 4 * (side + pictures.GAP_PX) + pictures.GAP_PX
    gap = sheet[:-50, pictures.GAP_PX + side + 1 : 2 * pictures.GAP_PX + side - 1]
    assert (gap == 255).all()
    # 512 px of 0.5 um are shown on 224 px; 200 um is the longest round length that fits one tile.
    assert max(_longest_run(row) for row in sheet[-40:]) == round(200 / (0.5 * 512 / side))


def test_a_sheet_without_tiles_says_so():
    assert (contact_sheet([], []) != 255).any()


@given(st.integers(0, 3000), st.integers(1, 40))
def test_a_sample_is_even(count, wanted):
    chosen = sample_evenly(count, wanted)
    assert len(chosen) == min(count, wanted) == len(set(chosen))
    assert chosen == sorted(chosen)
    assert all(0 <= index < count for index in chosen)
    steps = np.diff([*chosen])
    assert not len(steps) or steps.max() - steps.min() <= 1


def test_png_is_lossless_and_repeatable():
    picture = np.random.default_rng(1).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    data = png_bytes(picture)
    assert data == png_bytes(picture.copy())
    assert (cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1] == picture).all()
