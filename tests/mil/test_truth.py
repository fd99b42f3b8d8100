"""Tile truth: areas without rounding, regions as they are drawn, tables without contradictions."""

import json

import cv2
import numpy as np
import pytest

from pathfm.errors import StoreError, UsageError
from pathfm.geometry import Size
from pathfm.mil.truth import REGIONS_PX, lesion_share, read_mask, read_tile_labels, tile_truth
from pathfm.stats.localisation import UNKNOWN
from pathfm.store.tile_store import open_tiles, write_tiles


def test_share_is_exact_at_fractions_of_a_mask_pixel():
    rng = np.random.default_rng(0)
    mask = rng.random((6, 8)) < 0.5
    fine = np.kron(mask, np.ones((10, 10)))  # the slide itself: ten level-0 px per mask px
    xy = np.array([[0, 0], [3, 7], [41, 22], [60, 40]])
    wanted = [fine[y : y + 17, x : x + 17].mean() for x, y in xy]
    np.testing.assert_allclose(lesion_share(mask, xy, (17.0, 17.0), Size(80, 60)), wanted, atol=1e-12)


def test_tiles_need_not_be_square():
    mask = np.zeros((6, 8), dtype=bool)
    mask[:3] = True
    share = lesion_share(mask, np.array([[0, 0], [0, 30]]), (10.0, 60.0), Size(80, 60))
    np.testing.assert_allclose(share, [0.5, 0.0], atol=1e-12)


def test_what_lies_outside_the_slide_counts_as_lesion_free():
    share = lesion_share(np.ones((4, 4), dtype=bool), np.array([[30, 0]]), (20.0, 20.0), Size(40, 40))
    assert share.tolist() == pytest.approx([0.5])


def test_mask_of_another_aspect_is_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "mask.png"), np.full((30, 40), 255, np.uint8))
    assert read_mask(tmp_path / "mask.png", Size(4000, 3010)).all()
    with pytest.raises(StoreError, match="whole slide"):
        read_mask(tmp_path / "mask.png", Size(4000, 4000))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(StoreError, match="cannot be read"):
        read_mask(tmp_path / "broken.png", Size(4000, 3010))


def region(ring, name="", holes=()):
    properties = {"objectType": "annotation", **({"classification": {"name": name}} if name else {})}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring, *holes]}, "properties": properties}


def box(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def drawn(tmp_path, *features):
    path = tmp_path / "regions.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_regions_drawn_in_qupath_are_a_mask_with_holes(tmp_path):
    path = drawn(
        tmp_path,
        region(box(1000, 500, 3000, 2500), "Tumor", [box(1500, 1000, 2000, 1500)]),
        region(box(2900, 2400, 3500, 2600)),
        region(box(0, 0, 4000, 400), "Ignore*"),
    )
    size = Size(4000, 3000)
    mask = read_mask(path, size)
    assert mask.shape == (3000, 4000)
    xy = np.array([[1000, 500], [1500, 1000], [900, 500], [3200, 2400], [100, 100], [2900, 2400]])
    share = lesion_share(mask, xy, (200.0, 200.0), size)
    # The edges of regions are drawn along with them: up to a pixel each.
    np.testing.assert_allclose(share, [1.0, 0.0, 0.5, 1.0, 0.0, 1.0], atol=0.02)
    assert read_mask(path, size, ["Tumor"])[2450, 3200] == 0


def test_regions_of_large_slides_have_a_mask_of_bounded_size(tmp_path):
    size = Size(120_000, 90_001)
    mask = read_mask(drawn(tmp_path, region(box(30_000, 30_000, 60_000, 60_000))), size)
    assert max(mask.shape) == REGIONS_PX
    xy = np.array([[30_000, 30_000], [29_872, 40_000], [29_700, 40_000], [59_744, 59_744]])
    np.testing.assert_allclose(lesion_share(mask, xy, (256.0, 256.0), size), [1, 0.5, 0, 1], atol=0.05)


def test_no_region_means_no_lesion_but_none_of_the_classes_is_an_error(tmp_path):
    assert not read_mask(drawn(tmp_path), Size(40, 40)).any()
    with pytest.raises(StoreError, match="no region is lesion: of classes Stroma"):
        read_mask(drawn(tmp_path, region(box(0, 0, 9, 9), "Stroma")), Size(40, 40), ["Tumor"])
    with pytest.raises(StoreError, match="Ignore"):
        read_mask(drawn(tmp_path, region(box(0, 0, 9, 9), "Ignore*")), Size(40, 40))
    (tmp_path / "broken.geojson").write_text("{")
    with pytest.raises(StoreError, match="not GeoJSON"):
        read_mask(tmp_path / "broken.geojson", Size(40, 40))


def test_the_share_that_makes_a_tile_lesion_is_a_setting(tmp_path):
    write_tiles(tmp_path / "s.zarr", np.zeros((2, 8, 8, 3), np.uint8), slide_id="s", xy_level0=np.array([[0, 0], [8, 0]]))
    mask = np.zeros((8, 16), dtype=bool)
    mask[:4, :8] = mask[:1, 8:] = True
    store = open_tiles(tmp_path / "s.zarr")
    assert [tile_truth(store, mask, None, share).tolist() for share in (0.1, 0.5, 0.6)] == [[1, 1], [1, 0], [0, 0]]


def test_a_tile_counts_as_lesion_from_a_quarter_of_its_area_on(tmp_path):
    write_tiles(
        tmp_path / "s.zarr", np.zeros((3, 8, 8, 3), np.uint8), slide_id="s", xy_level0=np.array([[0, 0], [8, 0], [16, 0]])
    )
    mask = np.zeros((8, 24), dtype=bool)
    mask[:2, :8] = mask[:1, 8:16] = True
    assert tile_truth(open_tiles(tmp_path / "s.zarr"), mask, None).tolist() == [1, 0, 0]


def test_tile_labels_go_by_the_name_of_the_source_file(tmp_path):
    write_tiles(tmp_path / "s.zarr", np.zeros((3, 8, 8, 3), np.uint8), slide_id="s", source_names=["b.1.png", "a.jpg", "c.jpg"])
    store = open_tiles(tmp_path / "s.zarr")
    assert tile_truth(store, None, {"a": 1, "b.1": 0}).tolist() == [0, 1, UNKNOWN]
    assert tile_truth(store, None, {"other": 1}) is None
    assert tile_truth(store, None, None) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tile,tile_label\na,2\n", "line 2"),
        ("tile,tile_label\na,1\na,0\n", "line 3.*twice"),
        ("name,label\na,1\n", "columns tile and tile_label"),
    ],
)
def test_tile_labels_that_cannot_be_meant_are_refused(tmp_path, text, problem):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UsageError, match=problem):
        read_tile_labels(tmp_path / "labels.csv")


def test_tile_labels_empty_means_unknown(tmp_path):
    (tmp_path / "labels.csv").write_text("tile,tile_label,more\na,1,x\nb,,x\nc,0,x\n")
    assert read_tile_labels(tmp_path / "labels.csv") == {"a": 1, "b": UNKNOWN, "c": 0}
