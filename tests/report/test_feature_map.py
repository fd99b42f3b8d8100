import re
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

from pathfm.errors import StoreError, UsageError
from pathfm.report.feature_map import (
    COLOURS,
    FONT_PX,
    GAP_PX,
    OPACITY,
    PALE,
    ScatterMap,
    atlas_picture,
    colour_map,
    feature_map_chart,
    legend_entries,
    scatter_png,
    tile_atlas,
)
from pathfm.report.feature_points import columns, read_points
from pathfm.report.picture_page import Picture, PicturePage, Section, write_picture_page
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.store.feature_file import write_features


def row(slide_id, patient="p", site="x", **labels):
    return SlideRow(slide_id, Path(slide_id), patient_id=patient, site=site, labels=labels)


def write(folder, slide_id, values):
    write_features(folder / f"{slide_id}.h5", values, np.zeros((len(values), 2), dtype=np.int64), {"fingerprint": "f"})


def features(seed, count=20, dim=6):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float16) + 1


def test_points_are_of_unit_length_and_know_where_they_come_from(tmp_path):
    made = {f"s{n}": features(n, 5 + n) for n in range(3)}
    for slide_id, values in made.items():
        write(tmp_path, slide_id, values)
    write(tmp_path, "t", features(9, dim=7))
    (tmp_path / "u.h5").write_bytes(b"no")
    points = read_points(tmp_path, ["u", "t", "s2", "s1", "s0", "absent"])
    assert points.slide_ids == ("s0", "s1", "s2") and points.tiles_S.tolist() == [5, 6, 7]
    assert set(points.left_out) == {"absent", "t", "u"} and "7 dimensions instead of 6" in points.left_out["t"]
    np.testing.assert_allclose(np.linalg.norm(points.sample_ND, axis=1), 1, rtol=1e-6)
    for slide, number, unit in zip(points.slide_N, points.row_N, points.sample_ND, strict=True):
        plain = made[points.slide_ids[slide]][number].astype(np.float64)
        np.testing.assert_allclose(unit, plain / np.linalg.norm(plain), rtol=1e-5)
    mean = points.sample_ND[points.slide_N == 2].mean(axis=0)
    np.testing.assert_allclose(points.mean_SD[2], mean / np.linalg.norm(mean), rtol=1e-5)
    assert points.sample_words == "all 18 tiles of 3 slides"
    assert read_points(tmp_path, ["s0", "s1", "s2"], limit=4).sample_words == "4 of 18 tiles of 3 slides"
    with pytest.raises(StoreError, match="no slide has usable features"):
        read_points(tmp_path, ["absent"])


def test_features_of_other_tools_are_read(tmp_path):
    with h5py.File(tmp_path / "s0.h5", "w") as file:
        file["features"], file["coords"] = features(0), np.arange(40).reshape(20, 2)
    assert read_points(tmp_path, ["s0"]).sample_words == "all 20 tiles of 1 slide"


def test_columns_that_tell_slides_apart():
    rows = tuple(row(f"s{n}", f"p{n // 2}", "one", stage=str(n), label="ab"[n % 2], note="same") for n in range(20))
    cohort = Cohort(rows, ("stage", "label", "note"))
    found, notes = columns(cohort, [row.slide_id for row in rows], "label")
    assert list(found) == ["slide", "label", "patient"]
    assert len(notes) == 1 and "'stage' has 20 values" in notes[0]
    wanted, _ = columns(cohort, ["s1"], "label", ("stage", "site"))
    assert wanted == {"stage": {"s1": "1"}, "site": {"s1": "one"}}
    with pytest.raises(UsageError, match=r"no column 'grade'.*columns: slide, label, stage"):
        columns(cohort, ["s1"], "label", ("grade",))
    assert columns(Cohort((row("a", site=None),)), ["a"])[0] == {"slide": {"a": "a"}}


def test_legend_names_the_most_frequent_values_and_sums_up_the_rest():
    values = [f"v{n:02d}" for n in range(12) for _ in range(n + 1)] + ["(none)"] * 3
    entries = legend_entries(values)
    assert [entry[0] for entry in entries] == [*(f"v{n:02d}" for n in range(4, 12)), "4 others", "(none)"]
    assert sum(entry[3] for entry in entries) == len(values)
    assert len({entry[1] for entry in entries}) == len(entries) and len(set(COLOURS)) == len(COLOURS)
    assert [entry[:3] for entry in legend_entries(["b", "a"])] == [("a", COLOURS[0], "o"), ("b", COLOURS[1], "s")]


def scatter(count=50):
    return ScatterMap("tiles", "PCA", np.random.default_rng(0).normal(size=(count, 2)), ("one", "two"))


def test_a_map_is_a_png_with_the_colours_of_its_values_and_always_the_same():
    png = scatter_png(scatter(), "label", ["a", "b"] * 25)
    assert png == scatter_png(scatter(), "label", ["a", "b"] * 25)
    picture = cv2.cvtColor(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    for colour in COLOURS[:2]:
        wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        assert (np.abs(picture.astype(int) - wanted).max(axis=2) < 3).sum() > 30


def test_odd_names_can_be_drawn():
    values = ["$x^2", "日本", "", "a" * 90, "<b>"] * 10
    assert scatter_png(scatter(), "$a_b$", values).startswith(b"\x89PNG")
    assert scatter_png(scatter(1), "label", ["a"], ["名$"]).startswith(b"\x89PNG")


def test_colour_map_paints_tiles_at_their_place():
    thumbnail = np.full((40, 60, 3), 100, dtype=np.uint8)
    xy, rgb = np.array([[0, 0], [40, 20], [100, 60]]), np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
    picture = colour_map((thumbnail, 2.0), xy, (20.0, 40.0), rgb, "words")
    assert (picture[:40, :60] == 100).all() and picture.shape[0] == 40 + FONT_PX + 2 * GAP_PX
    right = picture[:40, 60 + GAP_PX : 120 + GAP_PX].astype(int)
    pale = round(255 - PALE * 155)
    boxes = [(0, 0, 10, 20), (20, 10, 30, 30), (50, 30, 60, 40)]
    covered = np.zeros((40, 60), dtype=bool)
    for (left, top, end, bottom), colour in zip(boxes, rgb, strict=True):
        expected = (1 - OPACITY) * pale + OPACITY * colour.astype(float)
        assert np.abs(right[top:bottom, left:end] - expected).max() <= 1
        covered[top:bottom, left:end] = True
    assert (right[~covered] == pale).all()


def test_atlas_takes_the_tile_nearest_to_the_centre_of_each_cell():
    xy = np.array([[0.0, 0.0], [0.9, 0.9], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0], [10.0, 10.0]])
    cells = tile_atlas(xy, (5, 5))
    assert cells == [(0, 0, 3), (0, 4, 4), (4, 0, 1), (4, 4, 2)]
    assert tile_atlas(np.zeros((3, 2)), (4, 4)) == [(3, 0, 0)]
    picture = atlas_picture([(1, 2, np.zeros((9, 9, 3), dtype=np.uint8))], (2, 3), 10)
    assert picture.shape == (20, 30, 3) and (picture[11:19, 21:29] == 0).all() and (picture == 0).all(axis=2).sum() == 64


def test_chart_of_the_report(tmp_path):
    for number in range(4):
        write(tmp_path, f"s{number}", features(number))
    cohort = Cohort(tuple(row(f"s{n}", grade="hi" if n % 2 else "lo") for n in range(5)), ("grade",))
    chart = feature_map_chart(tmp_path, cohort, "grade")
    assert chart.uri.startswith("data:image/png;base64,") and "all 80 tiles of 4 slides" in chart.caption
    assert feature_map_chart(tmp_path, cohort, "stage") is None
    assert feature_map_chart(tmp_path / "absent", cohort, "grade") is None


def test_the_page_loads_nothing_and_escapes(tmp_path):
    picture = Picture("data:image/png;base64,AA==", 'a "b"', ("<i>x</i>", "y"))
    page = PicturePage(
        "map", "<script>alert(1)", [("a", "<b>")], ["<u>"], [Section("h", "t", [picture]), Section("g", "", [picture], True)]
    )
    write_picture_page(tmp_path / "index.html", page)
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<script" not in html and "<i>" not in html and "<u>" not in html and html.count("<img") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", html)
