"""Scored tiles for QuPath: valid GeoJSON, one square per tile in level-0 pixels, nothing that JSON cannot say."""

import json
import uuid

import numpy as np

from pathfm.store.commit import commit_file
from pathfm.store.interop.annotations import load_annotations
from pathfm.store.interop.geojson import write_geojson
from pathfm.store.interop.heat_geojson import TileLooks, heat_geojson

XY = np.array([[0, 0], [224, 0], [0, 449]])
LOOKS = TileLooks(
    ["High attention", "Tile", "Not looked at"],
    {"High attention": (230, 159, 0), "Tile": (70, 110, 200), "Not looked at": (150, 150, 150)},
    np.array([[253, 231, 36], [68, 1, 84], [150, 150, 150]], np.uint8),
    {"attention": np.array([0.75, 0.25, np.nan]), "attention percentile": np.array([0.75, 0.25, np.nan])},
)


def write(tmp_path, slide_id="s"):
    path = tmp_path / f"{slide_id}.geojson"
    with commit_file(path) as temporary:
        write_geojson(temporary, heat_geojson(slide_id, XY, (224.0, 448.5), LOOKS))
    return path


def test_tiles_are_squares_with_measurements_class_and_colour(tmp_path):
    document = json.loads(write(tmp_path).read_text(), parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert document["type"] == "FeatureCollection"
    first, _, last = document["features"]
    assert first["geometry"] == {
        "type": "Polygon",
        "coordinates": [[[0, 0], [224.0, 0], [224.0, 448.5], [0, 448.5], [0, 0]]],
    }
    assert first["properties"] == {
        "objectType": "tile",
        "color": [253, 231, 36],
        "classification": {"name": "High attention", "color": [230, 159, 0]},
        "measurements": {"attention": 0.75, "attention percentile": 0.75},
    }
    assert last["properties"]["classification"]["name"] == "Not looked at"
    assert last["properties"]["measurements"] == {}


def test_ids_are_valid_unique_and_the_same_each_time(tmp_path):
    features = list(heat_geojson("s", XY, (224.0, 224.0), LOOKS))
    assert len({uuid.UUID(feature["id"]) for feature in features}) == 3
    assert features == list(heat_geojson("s", XY, (224.0, 224.0), LOOKS))
    other = list(heat_geojson("other", XY, (224.0, 224.0), LOOKS))
    assert not {feature["id"] for feature in features} & {feature["id"] for feature in other}


def test_rings_are_closed_and_run_as_the_standard_says(tmp_path):
    for feature in heat_geojson("s", XY, (224.0, 224.0), LOOKS):
        ring = np.array(feature["geometry"]["coordinates"][0])
        assert (ring[0] == ring[-1]).all()
        x, y = ring.T
        assert (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2 == 224 * 224  # counterclockwise as numbers


def test_our_own_reader_reads_it_back(tmp_path):
    found = load_annotations(write(tmp_path))
    assert [region.name for region in found.regions] == LOOKS.class_N
    assert found.regions[1].rings[0].min(axis=0).tolist() == [224.0, 0.0]
