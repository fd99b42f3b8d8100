"""Tables, galleries, QuPath files and layers of a slide's tiles: complete, in order, and the same numbers in all of them."""

import csv
import json

import numpy as np
import pytest
import tifffile

from pathfm.errors import StoreError
from pathfm.mil.explain import Explained
from pathfm.mil.feature_cache import SlideFacts
from pathfm.mil.galleries import (
    HIGH,
    Extremes,
    extreme_tiles,
    galleries,
    heat_of,
    tile_features,
    tile_table,
    write_layer,
    write_qupath,
)
from pathfm.mil.heatmap import SlideHeat, attention_percentile, tile_colours
from pathfm.stats.localisation import UNKNOWN
from pathfm.store.tile_store import open_tiles, write_tiles

XY = np.stack([np.arange(12) % 4, np.arange(12) // 4], axis=1) * 16


def heat(value, names=("",), **changes):
    value = np.asarray(value, dtype=np.float64)
    return SlideHeat("s", XY[: len(value)], (16.0, 16.0), value.reshape(len(value), -1), names, **changes)


def attention(maps=1, seed=0):
    value = np.random.default_rng(seed).random((12, maps))
    return value / value.sum(axis=0)


def test_extremes_go_by_score_then_number_and_share_no_tile():
    assert extreme_tiles(np.array([0.1, 0.5, 0.5, 0.2, 0.1, 0.0]), 2) == Extremes([1, 2], [5, 0])
    assert extreme_tiles(np.array([0.3, np.nan, 0.1]), 8) == Extremes([0, 2], [])
    assert extreme_tiles(np.array([0.3, 0.3, 0.3]), 2) == Extremes([0, 1], [2])
    assert extreme_tiles(np.empty(0), 2) == Extremes([], [])


def test_galleries_of_slides_do_not_depend_on_their_order():
    slides = [heat(attention()), SlideHeat("a", XY, (16.0, 16.0), attention(seed=1))]
    found = galleries(slides, 3)
    assert json.dumps(found) == json.dumps(galleries(slides[::-1], 3))
    assert set(found) == {"top_tiles.json", "bottom_tiles.json"}
    value = slides[0].value_NC[:, 0]
    assert found["top_tiles.json"]["s"] == np.argsort(-value)[:3].tolist()
    assert found["bottom_tiles.json"]["s"] == np.argsort(value)[:3].tolist()


def test_classes_have_galleries_of_their_own():
    value = attention(2)
    written = galleries([heat(value, ("normal", "tumour"), main=1)], 2)
    found = written["class_tiles.json"]
    assert written["top_tiles.json"]["s"] == found["s"]["tumour"]["top"]
    assert found["s"]["tumour"] == {
        "top": np.argsort(-value[:, 1])[:2].tolist(),
        "bottom": np.argsort(value[:, 1])[:2].tolist(),
    }


def rows_of(*arguments):
    header, rows = tile_table(*arguments)
    return header, [dict(zip(header, row, strict=True)) for row in rows]


def test_tables_have_a_row_per_tile_and_empty_cells_where_nothing_is_known(tmp_path):
    value = attention()
    value[3] = np.nan
    truth = np.array([1, 0, UNKNOWN] * 4, np.int8)
    header, rows = rows_of(heat(value, logit_NC=np.log(value)), [f"{index}.png" for index in range(12)], truth)
    assert header == ("tile", "x_level0", "y_level0", "attention", "attention_logit", "source_name", "lesion")
    assert rows[3] == {
        "tile": 3, "x_level0": 48, "y_level0": 0, "attention": "", "attention_logit": "", "source_name": "3.png", "lesion": 1
    }  # fmt: skip
    assert rows[2]["lesion"] == ""
    assert rows[5]["attention"] == value[5, 0]
    with (tmp_path / "t.csv").open("w") as stream:
        csv.writer(stream).writerow(rows[0].values())


def test_class_wise_tables_have_columns_per_class():
    value = attention(2)
    header, rows = rows_of(heat(value, ("a", "b"), logit_NC=np.log(value), main=1))
    assert header[7:] == ("attention_a", "attention_logit_a", "attention_b", "attention_logit_b")
    assert sum(row["attention"] for row in rows) == pytest.approx(1)
    assert rows[4]["attention_b"] == value[4, 1]
    assert rows[4]["attention"] == value[4, 1]
    assert rows[4]["lesion"] == rows[4]["source_name"] == ""


def test_tables_of_gradients_do_not_call_them_attention():
    header, rows = rows_of(heat(np.arange(12.0) - 5, ("tumour",), kind="gradient x input"))
    assert header[7:] == ("gradient_x_input_tumour",)
    assert rows[0]["attention"] == ""
    assert rows[0]["gradient_x_input_tumour"] == -5.0


def test_qupath_tiles_carry_what_table_and_picture_say():
    value = attention()
    value[7] = np.nan
    one = heat(value)
    features = list(tile_features(one, {"distance": np.arange(12.0)}))
    percentile = attention_percentile(value[:, 0])
    for index, feature in enumerate(features):
        said = feature["properties"]
        assert said["color"] == tile_colours(one, 0)[index].tolist()
        assert said["measurements"]["distance"] == index
        if index == 7:
            assert said["classification"]["name"] == "Not looked at"
            assert set(said["measurements"]) == {"distance"}
            continue
        assert said["measurements"]["attention"] == pytest.approx(value[index, 0], rel=1e-5)
        assert said["measurements"]["attention percentile"] == pytest.approx(percentile[index], rel=1e-5)
        assert (said["classification"]["name"] == "High attention") == (percentile[index] >= HIGH)


def test_qupath_tiles_of_several_maps_have_the_class_in_whose_map_they_are_high():
    value = np.zeros((12, 2))
    value[2, 0], value[9, 1] = 1.0, 1.0
    names = [feature["properties"]["classification"]["name"] for feature in tile_features(heat(value, ("a", "b")))]
    assert (names[2], names[9], names[0]) == ("a", "b", "Tile")
    signed = heat(value - 0.5, ("a", "b"), kind="gradient x input")
    first = next(iter(tile_features(signed)))
    assert set(first["properties"]["measurements"]) == {"gradient x input a", "gradient x input b"}
    assert first["properties"]["measurements"]["gradient x input a"] == -0.5


def test_layers_lie_over_the_slide(tmp_path):
    write_tiles(tmp_path / "s.zarr", np.zeros((12, 16, 16, 3), np.uint8), slide_id="s", xy_level0=XY.astype(np.int64), mpp=0.5)
    store = open_tiles(tmp_path / "s.zarr")
    value = attention(2)
    value[5] = np.nan
    write_layer(tmp_path / "s.ome.tif", heat(value, ("a", "b")), store)
    with tifffile.TiffFile(tmp_path / "s.ome.tif") as tiff:
        layer = tiff.asarray()
        assert 'PhysicalSizeX="8.0"' in tiff.ome_metadata
    wanted = np.nan_to_num(np.stack([attention_percentile(column) for column in value.T]))
    np.testing.assert_allclose(layer.reshape(2, 12), wanted, atol=1e-7)
    assert layer[0, 1, 1] == 0  # not looked at
    assert [path.name for path in tmp_path.glob("*")] != [".s.ome.tif"]


@pytest.mark.parametrize("write", [write_layer, write_qupath])
def test_tiles_without_places_have_neither_layer_nor_squares(tmp_path, write):
    write_tiles(tmp_path / "s.zarr", np.zeros((12, 16, 16, 3), np.uint8), slide_id="s")
    with pytest.raises(StoreError, match="no coordinates"):
        write(tmp_path / "s.out", heat(attention()), open_tiles(tmp_path / "s.zarr"))
    assert not (tmp_path / "s.out").exists()


def test_qupath_files_are_whole_or_absent_and_the_same_each_time(tmp_path):
    write_tiles(tmp_path / "s.zarr", np.zeros((12, 16, 16, 3), np.uint8), slide_id="s", xy_level0=XY.astype(np.int64))
    store, one = open_tiles(tmp_path / "s.zarr"), heat(attention())
    for name in ("a", "b"):
        write_qupath(tmp_path / name, one, store)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(json.loads((tmp_path / "a").read_text())["features"]) == 12
    with pytest.raises(IndexError):  # in the middle of the file: values of three tiles only
        write_qupath(tmp_path / "c", one, store, {"distance": np.zeros(3)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "s.zarr"]


def test_the_heat_of_a_slide_shows_the_map_of_the_positive_class_and_what_was_not_looked_at(tmp_path):
    write_tiles(tmp_path / "s.zarr", np.zeros((12, 16, 16, 3), np.uint8), slide_id="s", xy_level0=XY.astype(np.int64))
    place = {"corner_N2": XY[:11].astype(np.int32), "used_N": np.arange(11), "file_rows": 12, "tile_side_level0": (9.0, 9.0)}
    empty = np.zeros(0)
    facts = SlideFacts("s", 1, np.dtype("float16"), "", empty.astype(np.uint64), empty, empty, **place, encoder={})
    explained = Explained(attention(2)[:11], ("no", "yes"), "attention", main=1)
    stored, alone = heat_of(facts, open_tiles(tmp_path / "s.zarr"), explained), heat_of(facts, None, explained)
    assert (stored.main, alone.main) == (1, 1)
    assert (stored.sides_level0, alone.sides_level0) == ((16.0, 16.0), (9.0, 9.0))
    assert np.isnan(stored.value_NC[11]).all() and len(alone.value_NC) == 11
    np.testing.assert_array_equal(stored.value_NC[:11], explained.value_NC)
