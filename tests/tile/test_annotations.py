"""Annotated regions: read as QuPath writes them, drawn where they are, and refused by name when they are broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.errors import SlideError
from pathfm.store.interop.annotations import Annotations, Region, load_annotations
from pathfm.study import TissueSettings
from pathfm.tile.annotations import apply_annotations, unmatched_classes

SQUARE = [[10, 10], [50, 10], [50, 50], [10, 50], [10, 10]]
HOLE = [[20, 20], [20, 40], [40, 40], [40, 20], [20, 20]]


def _feature(coordinates, kind="Polygon", classification=None, object_type="annotation"):
    properties = {"objectType": object_type}
    if classification is not None:
        properties["classification"] = classification
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}


def _load(tmp_path, document):
    path = tmp_path / "slide.geojson"
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return load_annotations(path)


def _keep(annotations, downsample=1.0, size=60, **settings):
    return apply_annotations(
        np.ones((size, size), dtype=bool), annotations, downsample, TissueSettings(annotations=Path("drawn"), **settings)
    )


@pytest.mark.parametrize(
    "wrap", [lambda one: {"type": "FeatureCollection", "features": [one]}, lambda one: [one], lambda one: one]
)
def test_every_shape_of_document_is_read(tmp_path, wrap):
    found = _load(tmp_path, wrap(_feature([SQUARE], classification={"name": "Tumor", "colorRGB": -3670016})))
    assert found.names == ("Tumor",)
    assert found.ignored == 0


@pytest.mark.parametrize(
    ("classification", "name"),
    [
        ({"name": "Tumor", "color": [200, 0, 0]}, "Tumor"),
        ({"names": ["Tumor"]}, "Tumor"),
        ({"names": ["Tumor", "Positive"]}, "Tumor: Positive"),
        ("Tumor", "Tumor"),
        (None, ""),
    ],
)
def test_class_names_old_and_new(tmp_path, classification, name):
    assert _load(tmp_path, _feature([SQUARE], classification=classification)).regions[0].name == name


def test_any_object_with_an_area_counts_and_the_rest_is_counted(tmp_path):
    features = [_feature([SQUARE], object_type=kind) for kind in ("annotation", "detection", "tile")]
    features += [_feature([5, 5], "Point"), _feature(SQUARE, "LineString"), _feature([SQUARE[:2]]), {"type": "Feature"}]
    found = _load(tmp_path, features)
    assert (len(found.regions), found.ignored) == (3, 4)


def test_a_file_without_regions_is_fine(tmp_path):
    assert _load(tmp_path, {"type": "FeatureCollection", "features": []}) == Annotations()


@pytest.mark.parametrize(
    "document",
    [
        "",
        "not json",
        "[" * 100_000,
        "3",
        "[3]",
        '{"type": "Topology"}',
        '{"type": "FeatureCollection"}',
        '{"type": "Feature", "properties": [], "geometry": {"type": "Polygon"}}',
        '{"type": "Feature", "properties": {"classification": {"name": 3}}}',
        '{"type": "Feature", "geometry": {"type": "Polygon"}}',
        '{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[1, 2, 3]]}}',
        '{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[1], [2], [3], [4]]]}}',
        '{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[1, 2], [3, NaN], [5, 6]]]}}',
        '{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[["a", 2], [3, 4], [5, 6]]]}}',
        '{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": 7}}',
        '{"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": [7]}}',
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, document):
    with pytest.raises(SlideError, match="not GeoJSON") as caught:
        _load(tmp_path, document)
    assert caught.value.fix
    assert "slide.geojson" in caught.value.where


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(SlideError, match="cannot be read"):
        load_annotations(tmp_path / "none.geojson")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "x.geojson").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SlideError, match="not GeoJSON"):
        load_annotations(tmp_path / "x.geojson")


def test_regions_are_drawn_with_their_holes(tmp_path):
    found = _load(tmp_path, _feature([SQUARE, HOLE], classification={"name": "Tumor"}))
    kept = _keep(found, include=("Tumor",))
    assert kept[12:18, 12:48].all()
    assert not kept[22:38, 22:38].any()
    assert not kept[:9].any()
    left = _keep(found, exclude=("Tumor",))
    assert np.array_equal(left, ~kept)


def test_overlapping_regions_unite_and_exclusion_wins():
    square = np.array(SQUARE, dtype=float)
    found = Annotations((Region("a", (square,)), Region("a", (square + 5,)), Region("b", (square[:] * [1, 0.5],))))
    kept = _keep(found, include=("a",), exclude=("b",))
    assert kept[30, 30]
    assert not kept[15, 30]
    assert not kept[5, 5]


def test_unclosed_rings_multi_polygons_and_collections(tmp_path):
    far = [[[x + 100, y] for x, y in SQUARE[:-1]]]
    parts = {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": [SQUARE]}]}
    features = [_feature([[SQUARE[:-1]], far], "MultiPolygon"), {"type": "Feature", "geometry": parts}]
    assert len(_load(tmp_path, features).regions) == 3


def test_regions_may_leave_the_slide():
    ring = np.array([[-1e12, -1e12], [1e12, -1e12], [1e12, 30], [-1e12, 30]])
    kept = _keep(Annotations((Region("a", (ring,)),)), include=("a",))
    assert kept[:29].all()
    assert not kept[31:].any()


@given(st.floats(20, 40), st.floats(20, 40), st.floats(5, 15), st.floats(1.0, 7.3))
def test_a_disc_has_its_area_and_its_place(x, y, radius, downsample):
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    ring = downsample * np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)
    kept = _keep(Annotations((Region("a", (ring,)),)), downsample, include=("a",))
    rows, columns = np.nonzero(kept)
    assert abs(columns.mean() + 0.5 - x) < 0.3
    assert abs(rows.mean() + 0.5 - y) < 0.3
    assert np.pi * (radius - 0.5) ** 2 < kept.sum() < np.pi * (radius + 1) ** 2


def test_without_a_region_to_include_nothing_is_kept_and_the_reason_is_told():
    found = Annotations((Region("Tumor", (np.array(SQUARE, dtype=float),)),))
    settings = TissueSettings(annotations=Path("drawn"), include=("tumour",), exclude=("Fold",))
    assert not _keep(found, include=("tumour",)).any()
    assert unmatched_classes(found, settings) == "no annotated region is of class tumour, Fold (did you mean Tumor?)"
    assert unmatched_classes(Annotations(), settings).endswith("(its classes: none)")
    assert unmatched_classes(found, TissueSettings(annotations=Path("drawn"), include=("Tumor",))) == ""


def test_without_classes_in_the_settings_nothing_changes():
    assert _keep(Annotations((Region("Tumor", (np.array(SQUARE, dtype=float),)),))).all()


def test_a_file_of_another_tool_is_read(shared_data):
    path = shared_data.parent / "interop" / "trident" / "contours_geojson" / "CMU-1-Small-Region.geojson"
    if not path.is_file():
        pytest.skip("no GeoJSON of another tool beside the test data")
    assert load_annotations(path).regions
