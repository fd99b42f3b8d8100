"""Drawn regions: read as QuPath writes them, and masks of them that agree with asking pixel by pixel."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.errors import SlideError
from pathfm.store.interop.annotations import Annotations, Region, draw_regions, load_annotations

SQUARE = [[10, 10], [50, 10], [50, 50], [10, 50], [10, 10]]
HOLE = [[20, 20], [20, 40], [40, 40], [40, 20], [20, 20]]


def feature(coordinates, kind="Polygon", **classification):
    return {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": {"objectType": "annotation", **({"classification": classification} if classification else {})},
    }


def load(tmp_path, document):
    path = tmp_path / "slide.geojson"
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return load_annotations(path)


@pytest.mark.parametrize("wrap", [lambda found: {"type": "FeatureCollection", "features": found}, list])
def test_collections_lists_holes_and_several_polygons_are_read(tmp_path, wrap):
    shifted = [[[x + 60, y] for x, y in SQUARE]]
    found = load(
        tmp_path,
        wrap(
            [
                feature([SQUARE, HOLE], name="Tumor", color=[200, 0, 0]),
                feature([[SQUARE], shifted], "MultiPolygon", names=["Tumor", "Invasive"]),
                feature([5, 5], "Point", name="Tumor"),
                feature([SQUARE]),
            ]
        ),
    )
    assert [(region.name, len(region.rings)) for region in found.regions] == [
        ("Tumor", 2),
        ("Tumor: Invasive", 1),
        ("Tumor: Invasive", 1),
        ("", 1),
    ]
    assert found.ignored == 1
    assert found.names == ("Tumor", "Tumor: Invasive")
    assert load(tmp_path, {"type": "FeatureCollection", "features": []}) == Annotations()


@pytest.mark.parametrize(
    "document", ["{", "[1]", '{"type": "Topology"}', json.dumps(feature([["a", "b"]])), json.dumps(feature([[[1, None]] * 4]))]
)
def test_what_is_no_geojson_is_refused_with_what_to_do(tmp_path, document):
    with pytest.raises(SlideError, match=r"slide\.geojson: the annotations are not GeoJSON.*export it again"):
        load(tmp_path, document)
    with pytest.raises(SlideError, match="cannot be read"):
        load_annotations(tmp_path / "absent.geojson")


def edges(rings):
    return [edge for ring in rings for edge in zip(ring, np.roll(ring, -1, axis=0), strict=True)]


def inside(rings, x, y):
    """Even-odd rule, edge by edge."""
    crossed = [
        ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / np.where(y1 == y0, 1, y1 - y0))
        for (x0, y0), (x1, y1) in edges(rings)
    ]
    return np.sum(crossed, axis=0) % 2 == 1


def distance(rings, x, y):
    """From points to the nearest edge."""
    found = []
    for start, end in edges(rings):
        along = end - start
        share = np.clip(((x - start[0]) * along[0] + (y - start[1]) * along[1]) / (along @ along), 0, 1)
        found.append(np.hypot(x - start[0] - share * along[0], y - start[1] - share * along[1]))
    return np.min(found, axis=0)


@given(seed=st.integers(0, 999))
def test_masks_agree_with_asking_pixel_by_pixel_away_from_edges(seed):
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, 7))
    outer = np.stack([np.cos(angle), np.sin(angle)], axis=1) * rng.uniform(60, 110, (7, 1)) + (150, 130)
    rings = (outer, outer.mean(axis=0) + (outer - outer.mean(axis=0)) * 0.4)
    downsample = (6.5, 9.0)  # pixels of the mask need not be square
    mask = draw_regions([Region("", rings)], downsample, (30, 50))
    y, x = (np.indices(mask.shape) + 0.5) * np.reshape(downsample[::-1], (2, 1, 1))
    clear = distance(rings, x, y) > max(downsample)
    assert (mask == inside(rings, x, y))[clear].all()
    assert clear.any()


def test_regions_far_outside_do_no_harm():
    far = np.array([[-1e12, -1e12], [1e12, -1e12], [1e12, 1e12], [-1e12, 1e12]])
    assert draw_regions([Region("", (far,))], (1.0, 1.0), (5, 5)).all()
    assert not draw_regions([], (1.0, 1.0), (5, 5)).any()
