"""Tile truth: areas without rounding, tables without contradictions."""

import cv2
import numpy as np
import pytest

from pathfm.errors import StoreError, UsageError
from pathfm.geometry import Size
from pathfm.mil.truth import lesion_share, read_mask, read_tile_labels, tile_truth
from pathfm.stats.localisation import UNKNOWN
from pathfm.store.tile_store import open_tiles, write_tiles


def test_share_is_exact_at_fractions_of_a_mask_pixel():
    rng = np.random.default_rng(0)
    mask = rng.random((6, 8)) < 0.5
    fine = np.kron(mask, np.ones((10, 10)))  # the slide itself: ten level-0 px per mask px
    xy = np.array([[0, 0], [3, 7], [41, 22], [60, 40]])
    wanted = [fine[y : y + 17, x : x + 17].mean() for x, y in xy]
    np.testing.assert_allclose(lesion_share(mask, xy, 17.0, Size(80, 60)), wanted, atol=1e-12)


def test_what_lies_outside_the_slide_counts_as_lesion_free():
    share = lesion_share(np.ones((4, 4), dtype=bool), np.array([[30, 0]]), 20.0, Size(40, 40))
    assert share.tolist() == pytest.approx([0.5])


def test_mask_of_another_aspect_is_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "mask.png"), np.full((30, 40), 255, np.uint8))
    assert read_mask(tmp_path / "mask.png", Size(4000, 3010)).all()
    with pytest.raises(StoreError, match="whole slide"):
        read_mask(tmp_path / "mask.png", Size(4000, 4000))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(StoreError, match="cannot be read"):
        read_mask(tmp_path / "broken.png", Size(4000, 3010))


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
