"""Tissue detection on drawn and on real thumbnails: tissue in, glass, smear, dust, borders and ink out."""

from __future__ import annotations

import importlib.metadata
import sys
import types

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pathfm.errors import SlideError, UsageError
from pathfm.slides.reader import open_slide
from pathfm.study import TissueSettings
from pathfm.tile.tissue import has_dark_background, load_plugin, mask_fractions, tissue_mask

GLASS = (245, 243, 246)
INKS = {"green": (40, 160, 120), "blue": (50, 90, 200), "red": (205, 25, 50), "black": (22, 19, 14)}


def _thumbnail(glass=GLASS, tissue=(200, 120, 170), noise=2.0):
    """A piece of tissue at rows 50 to 150 and columns 60 to 200 of 200 x 300."""
    rng = np.random.default_rng(0)
    picture = np.empty((200, 300, 3), dtype=np.float32)
    picture[:] = glass
    picture[50:150, 60:200] = np.array(tissue) + rng.normal(0, 25, (100, 140, 1))
    return np.clip(picture + rng.normal(0, noise, picture.shape), 0, 255).astype(np.uint8)


def _assert_only_the_tissue(mask):
    assert mask[60:140, 70:190].mean() > 0.95
    outside = mask.copy()
    outside[44:156, 54:206] = False
    assert outside.mean() < 0.002


@pytest.mark.parametrize("method", ["otsu", "entropy"])
@pytest.mark.parametrize("glass", [GLASS, (235, 225, 240), (225, 210, 227)])
def test_tissue_in_glass_out(method, glass):
    _assert_only_the_tissue(tissue_mask(_thumbnail(glass), 8.0, TissueSettings(method=method)))


@pytest.mark.parametrize("method", ["otsu", "entropy"])
def test_glass_alone_is_no_tissue(method):
    rng = np.random.default_rng(0)
    glass = np.clip(rng.normal((232, 222, 238), 2, (200, 200, 3)), 0, 255).astype(np.uint8)
    assert not tissue_mask(glass, 8.0, TissueSettings(method=method)).any()


@pytest.mark.parametrize("mpp", [None, 0.25, 8.0, 20.0])
def test_tissue_that_fills_the_picture_stays(mpp):
    rng = np.random.default_rng(0)
    picture = np.clip(np.array((200, 120, 170)) + rng.normal(0, 30, (300, 200, 1)), 0, 255).astype(np.uint8)
    assert tissue_mask(picture, mpp, TissueSettings()).mean() > 0.99


@pytest.mark.parametrize("plain", [(205, 165, 200), (225, 175, 210)])
def test_tissue_without_texture_stays(plain):
    picture = _thumbnail(noise=1)
    picture[50:150, 60:200] = plain
    _assert_only_the_tissue(tissue_mask(picture, 8.0, TissueSettings()))


def test_smear_of_stain_stays_out():
    rows, columns = np.mgrid[:200, :300]
    smear = np.exp(-(((rows - 100) / 80.0) ** 2 + ((columns - 220) / 60.0) ** 2))
    picture = _thumbnail().astype(np.float32)
    picture[..., 1] *= np.where((picture[..., 1] > 220), 1 - 0.2 * smear, 1)
    _assert_only_the_tissue(tissue_mask(picture.astype(np.uint8), 8.0, TissueSettings()))


def test_pale_fat_is_kept_whole():
    picture = _thumbnail(noise=1)
    picture[50:150, 200:260] = GLASS
    picture[50:150, 200:260:9] = picture[50:150:9, 200:260] = (215, 180, 210)
    mask = tissue_mask(picture, 8.0, TissueSettings())
    assert mask[60:140, 205:250].mean() > 0.95
    assert not mask[:, 270:].any()


def test_grey_dust_shadow_and_black_border_stay_out():
    picture = _thumbnail()
    picture[:, :12] = picture[190:] = 6
    picture[:20, 12:] = (150, 151, 150)
    cv2.circle(picture, (250, 100), 14, (140, 140, 141), -1)
    picture[:, 280:282] = 170
    _assert_only_the_tissue(tissue_mask(picture, 8.0, TissueSettings()))


@pytest.mark.parametrize("colour", INKS)
def test_ink_on_glass_stays_out(colour):
    picture = _thumbnail()
    cv2.ellipse(picture, (130, 100), (105, 85), 0, 0, 300, INKS[colour], 8, cv2.LINE_AA)
    _assert_only_the_tissue(tissue_mask(picture, 8.0, TissueSettings()))


def test_ink_over_tissue_does_not_make_holes():
    picture = _thumbnail()
    cv2.line(picture, (80, 60), (180, 140), INKS["green"], 10)
    assert tissue_mask(picture, 8.0, TissueSettings(max_hole_um2=0))[60:140, 70:190].mean() > 0.95


def test_a_blue_stain_is_not_taken_for_ink():
    _assert_only_the_tissue(tissue_mask(_thumbnail(tissue=(80, 120, 200)), 8.0, TissueSettings()))


def test_a_picture_without_colour_is_judged_by_density():
    grey = cv2.cvtColor(_thumbnail(), cv2.COLOR_RGB2GRAY)
    _assert_only_the_tissue(tissue_mask(np.repeat(grey[..., None], 3, axis=2), 8.0, TissueSettings()))


def test_off_keeps_everything():
    assert tissue_mask(_thumbnail(), None, TissueSettings(method="off")).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (5, 3), (31, 2000)])
@pytest.mark.parametrize("method", ["otsu", "entropy"])
def test_odd_shapes_have_masks(shape, method):
    for value in (0.1, 8.0, 5000.0):
        assert tissue_mask(np.full((*shape, 3), 240, np.uint8), value, TissueSettings(method=method)).shape == shape


def test_strips_do_not_show(monkeypatch):
    picture = cv2.resize(_thumbnail(), (900, 600), interpolation=cv2.INTER_CUBIC)
    whole = tissue_mask(picture, 8.0, TissueSettings())
    monkeypatch.setattr("pathfm.tile.tissue.STRIP_ROWS", 37)
    assert np.array_equal(tissue_mask(picture, 8.0, TissueSettings()), whole)


def test_small_pieces_go_and_small_holes_close():
    picture = _thumbnail(noise=0)
    picture[10:13, 10:13] = (200, 120, 170)
    picture[98:102, 128:132] = GLASS
    mask = tissue_mask(picture, 8.0, TissueSettings(min_area_um2=5_000, max_hole_um2=10_000))
    assert not mask[10:13, 10:13].any()
    assert mask[98:102, 128:132].all()


def test_large_holes_stay_open():
    picture = _thumbnail(noise=0)
    picture[80:120, 100:140] = GLASS
    assert not tissue_mask(picture, 8.0, TissueSettings(max_hole_um2=50_000))[90:110, 110:130].any()
    assert tissue_mask(picture, 8.0, TissueSettings(max_hole_um2=200_000))[90:110, 110:130].all()


def test_areas_of_an_unknown_scale_are_those_of_a_nominal_one():
    settings = TissueSettings(min_area_um2=300_000)
    assert np.array_equal(tissue_mask(_thumbnail(), None, settings), tissue_mask(_thumbnail(), 8.0, settings))


def _nuclei():
    """Blue nuclei on black in the lower half of 200 x 300."""
    rng = np.random.default_rng(0)
    picture = np.zeros((200, 300, 3), np.uint8)
    for x, y in zip(rng.integers(0, 300, 700), rng.integers(100, 200, 700), strict=True):
        cv2.circle(picture, (int(x), int(y)), 2, (10, 20, 220), -1)
    return picture


@pytest.mark.parametrize("method", ["otsu", "entropy"])
@pytest.mark.parametrize("picture", [_nuclei(), 255 - _thumbnail(), np.zeros((50, 50, 3), np.uint8)])
def test_a_dark_background_is_refused_with_advice(method, picture):
    with pytest.raises(SlideError, match="background is dark") as caught:
        tissue_mask(picture, 8.0, TissueSettings(method=method))
    assert "tile.tissue.background=dark" in caught.value.fix


def test_on_a_dark_background_tissue_is_what_is_lit():
    mask = tissue_mask(_nuclei(), 8.0, TissueSettings(background="dark"))
    assert mask[110:190].mean() > 0.95
    assert mask[:85].mean() == 0


def test_black_around_bright_glass_is_no_dark_background():
    picture = np.zeros((500, 700, 3), np.uint8)
    picture[150:350, 200:500] = _thumbnail()
    assert not has_dark_background(picture)
    _assert_only_the_tissue(tissue_mask(picture, 8.0, TissueSettings())[150:350, 200:500])


def _plug_in(monkeypatch, function):
    module = types.ModuleType("masks_of_mine")
    module.own = function
    monkeypatch.setitem(sys.modules, "masks_of_mine", module)
    return TissueSettings(plugin="masks_of_mine:own", min_area_um2=0, max_hole_um2=0)


def test_a_plug_in_makes_the_mask(monkeypatch):
    def own(thumbnail, mpp):
        assert mpp == 8.0
        thumbnail[:] = 0
        mask = np.zeros(thumbnail.shape[:2], dtype=bool)
        mask[:10], mask[100, 100] = True, True
        return mask

    picture = _thumbnail()
    settings = _plug_in(monkeypatch, own)
    assert tissue_mask(picture, 8.0, settings).sum() == 3001
    assert tissue_mask(picture, 8.0, settings.model_copy(update={"min_area_um2": 100.0})).sum() == 3000
    assert np.array_equal(picture, _thumbnail())


@pytest.mark.parametrize("wrong", [None, np.ones((3, 3), bool), np.ones((200, 300)), [[True]]])
def test_a_plug_in_that_returns_no_mask_fails_the_slide(monkeypatch, wrong):
    with pytest.raises(SlideError, match=r"returned .* not bool \[200, 300\]"):
        tissue_mask(_thumbnail(), 8.0, _plug_in(monkeypatch, lambda *_: wrong))


@pytest.mark.parametrize("name", ["no_such_module_here:own", "math:no_such", "math:pi", ":x", "math:", "unknown_name"])
def test_a_plug_in_that_is_not_there_is_a_usage_error(name):
    with pytest.raises(UsageError) as caught:
        load_plugin(name)
    assert caught.value.where == "tile.tissue.plugin"
    assert caught.value.fix


def test_a_plug_in_by_the_name_of_its_entry_point(monkeypatch):
    point = importlib.metadata.EntryPoint("mine", "math:sqrt", "pathfm.tissue")
    monkeypatch.setattr("pathfm.tile.tissue.entry_points", lambda group: [point] if group == "pathfm.tissue" else [])
    assert load_plugin("mine")(4) == 2
    with pytest.raises(UsageError, match="mine"):
        load_plugin("yours")


def _slow_fraction(mask, box):
    left, top, right, bottom = np.clip(box, 0, [*mask.shape[::-1]] * 2)
    rows, columns = np.arange(mask.shape[0]), np.arange(mask.shape[1])
    high = np.clip(np.minimum(rows + 1, bottom) - np.maximum(rows, top), 0, None)
    wide = np.clip(np.minimum(columns + 1, right) - np.maximum(columns, left), 0, None)
    area = (right - left) * (bottom - top)
    return (high[:, None] * wide[None] * mask).sum() / area if area > 0 else 0.0


@given(arrays.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))), st.data())
def test_mask_fractions_are_exact(mask, data):
    edge = st.floats(-3, 15).map(lambda value: round(value, 3))
    corners = data.draw(st.lists(st.tuples(edge, edge, edge, edge), min_size=1, max_size=5))
    boxes = np.array([(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners])
    wanted = [_slow_fraction(mask, box) for box in boxes]
    np.testing.assert_allclose(mask_fractions(mask, boxes), wanted, atol=1e-5)


def test_no_boxes_have_no_fractions():
    assert mask_fractions(np.ones((4, 4), bool), np.zeros((0, 4))).shape == (0,)


def _picture(path):
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


@pytest.mark.parametrize(("colour", "most"), [("green", 0.01), ("black", 0.03), ("red", 0.5)])
def test_real_ink_stays_out(shared_data, colour, most):
    picture = _picture(shared_data / "pen_marks" / f"pen_{colour}.png")
    ink = _picture(shared_data / "pen_marks" / f"pen_{colour}_mask.png")[..., 0] > 127
    assert tissue_mask(picture, None, TissueSettings())[ink].mean() < most


def test_tissue_beside_real_ink_stays(shared_data):
    picture = _picture(shared_data / "pen_marks" / "pen_red.png")
    assert tissue_mask(picture, None, TissueSettings())[250:750, 220:700].mean() > 0.98


PLACES = {
    "her2st_B4.svs": {
        True: [(1375, 1225), (1515, 1400), (600, 1500), (300, 1700)],
        False: [(570, 500), (140, 600), (1725, 550)],
    },
    "her2st_C4.svs": {True: [(400, 1000), (1150, 950)], False: [(1380, 850), (1200, 1220), (300, 1700), (100, 100)]},
    "CMU-1-Small-Region.svs": {True: [(700, 1200), (800, 1900)], False: [(200, 400), (1400, 300), (1450, 1200)]},
    "TCGA-5P-A9K0_2.svs": {True: [(100, 100), (400, 400)], False: []},
}
"""Points of thumbnails of 2048 px (x, y) that are tissue (also pale fat), or glass and smear."""


@pytest.mark.parametrize("name", PLACES)
def test_real_slides(shared_data, name):
    with open_slide(shared_data / "slides" / name) as reader:
        thumbnail, downsample = reader.thumbnail(2048)
        mask = tissue_mask(thumbnail, reader.metadata.mpp.mean * downsample, TissueSettings())
    for wanted, points in PLACES[name].items():
        assert [bool(mask[y, x]) for x, y in points] == [wanted] * len(points)


def test_real_fluorescence_is_refused_or_handled(shared_data):
    with open_slide(shared_data / "formats" / "test3-DAPI-2-387.ndpi") as reader:
        thumbnail, downsample = reader.thumbnail(1024)
    with pytest.raises(SlideError, match="background is dark"):
        tissue_mask(thumbnail, 0.228 * downsample, TissueSettings())
    assert 0.5 < tissue_mask(thumbnail, 0.228 * downsample, TissueSettings(background="dark")).mean() < 0.9
