"""Ink by its colour: known colours, real pens on real thumbnails, drawn pens, and no ink in real tissue of many stains."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pathfm.geometry import Size
from pathfm.slides.synthetic import SyntheticSpec, draw_slide
from pathfm.study import FilterSettings
from pathfm.tile.pen import INKS, ink_of
from pathfm.tile.quality import measure, removed_by

LIMIT = FilterSettings().max_pen
SIDE = 16


@pytest.mark.parametrize(
    ("ink", "rgb"),
    [
        ("green", (57, 159, 141)),
        ("green", (34, 62, 50)),
        ("red", (207, 40, 62)),
        ("red", (197, 17, 18)),
        ("blue", (55, 111, 201)),
        ("blue", (27, 45, 150)),
        ("black", (23, 20, 14)),
        ("black", (40, 36, 34)),
        ("", (0, 0, 0)),  # unlit
        ("", (255, 255, 255)),
        ("", (240, 239, 241)),  # glass
        ("", (220, 205, 225)),  # lilac glass
        ("", (200, 98, 149)),  # eosin
        ("", (115, 108, 157)),  # haematoxylin
        ("", (28, 32, 79)),  # a dark nucleus
        ("", (122, 145, 182)),  # haematoxylin of immunohistochemistry
        ("", (51, 23, 59)),  # a fold
        ("", (137, 69, 42)),  # DAB
        ("", (196, 16, 55)),  # blood
        ("", (66, 45, 75)),  # a dark lymph node
    ],
)
def test_known_colours(ink, rgb):
    number = int(ink_of(np.array(rgb)))
    assert ("", *INKS)[number] == ink


def _thumbnail(shared_data, name):
    return cv2.cvtColor(cv2.imread(str(shared_data / "pen_marks" / f"{name}.png")), cv2.COLOR_BGR2RGB)


def _crops(picture, side):
    return [
        (np.s_[y : y + side, x : x + side], measure(picture[y : y + side, x : x + side], 1.0))
        for y in range(0, picture.shape[0] - side + 1, side)
        for x in range(0, picture.shape[1] - side + 1, side)
    ]


@pytest.mark.parametrize(("ink", "recall"), [("black", 0.85), ("green", 0.95), ("red", 0.88)])
def test_real_pens_with_masks(shared_data, ink, recall):
    picture = _thumbnail(shared_data, f"pen_{ink}")
    mask = _thumbnail(shared_data, f"pen_{ink}_mask")[..., 0] > 0
    crops = [(mask[place].mean(), quality.pen, getattr(quality, f"pen_{ink}")) for place, quality in _crops(picture, SIDE)]
    inked = [own for share, _, own in crops if share > 0.5]
    assert np.mean(np.array(inked) > LIMIT) >= recall
    clean = [pen for share, pen, _ in crops if share == 0]
    # The mask of the green pen leaves out a dot of blue ink.
    assert np.sum(np.array(clean) > LIMIT) <= 6


def test_ink_over_tissue_at_high_power(shared_data):
    green = _thumbnail(shared_data, "tcga-green-pen")
    assert measure(green[60:180, 290:400], 1.0).pen_green > 0.5
    red = _thumbnail(shared_data, "tcga-red-pen")
    assert measure(red[200:300, 20:110], 1.0).pen_red > 0.8
    blue = _thumbnail(shared_data, "wsi-blue-pen")
    assert measure(blue[56:74, 154:174], 1.0).pen_blue > LIMIT
    tissue = [green[100:300, 450:700], red[180:440, 260:460], blue[20:130, 10:110]]
    assert max(measure(picture, 1.0).pen for picture in tissue) < 0.05


@pytest.mark.parametrize("ink", ["green", "blue", "black"])
def test_drawn_pens_are_removed_and_tissue_stays(ink):
    spec = SyntheticSpec(size_px=Size(2048, 2048), seed=3)
    clean, _ = draw_slide(spec)
    inked, _ = draw_slide(SyntheticSpec(size_px=Size(2048, 2048), seed=3, pen=ink))
    mask = np.abs(inked.astype(np.int16) - clean).max(axis=2) > 40
    mostly, none = 0, 0
    for place, quality in _crops(inked, 256):
        reason = removed_by(quality, FilterSettings(max_white=1))
        if mask[place].mean() > 0.5:
            assert reason == "pen"
            assert getattr(quality, f"pen_{ink}") > LIMIT
            mostly += 1
        if mask[place].mean() == 0:
            assert not reason
            none += 1
    assert mostly >= 2
    assert none >= 40


def _tiles(folder, pattern, limit):
    names = sorted(folder.glob(pattern))
    return [cv2.cvtColor(cv2.imread(str(name)), cv2.COLOR_BGR2RGB) for name in names[:: max(1, len(names) // limit)]]


@pytest.mark.parametrize(("name", "pattern"), [("hpylori", "tiles/*/*"), ("lymphoma", "*/*.jpg"), ("lc25000", "*/*.jpeg")])
def test_no_ink_in_tissue_of_many_stains(shared_data, name, pattern):
    tiles = [crop for tile in _tiles(shared_data / name, pattern, 60) for crop in (tile[:256, :256], tile[-256:, -256:])]
    assert len(tiles) >= 120
    assert max(measure(tile, 1.0).pen for tile in tiles) < LIMIT
