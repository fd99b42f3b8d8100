"""The manifest of a pretraining run: what it holds, and what it finds among other slides."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from pathfm.errors import StoreError
from pathfm.store.commit import write_json
from pathfm.store.manifest import COLUMNS, DIGEST, MANIFEST, find_by_identity, find_seen, manifest_of, name_key, write_manifest
from pathfm.store.tile_store import write_tiles

SIDE = 64


def tiles_of(seed, count=9):
    """Tiles [count, SIDE, SIDE, 3] with coarse structure, like tissue."""
    coarse = np.random.default_rng(seed).integers(60, 230, (count, 8, 8, 3), dtype=np.uint8)
    return np.stack([cv2.resize(tile, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for tile in coarse])


def grid(count):
    return np.stack([np.arange(count) % 3, np.arange(count) // 3], axis=1).astype(np.int64) * SIDE


def make(folder: Path, slide_id: str, images, *, tile_folder=False) -> Path:
    path = folder / f"{slide_id}.zarr"
    write_tiles(path, images, slide_id=slide_id, xy_level0=None if tile_folder else grid(len(images)))
    return path


@pytest.fixture
def seen(tmp_path):
    """Manifest of three slides (a, b of patient P1, c of P2) and a folder of tiles."""
    stores = [make(tmp_path / "seen", name, tiles_of(number)) for number, name in enumerate("abc")]
    stores.append(make(tmp_path / "seen", "folder", tiles_of(50, 40), tile_folder=True))
    patients = {"a": "P1", "b": "P1", "c": "P2", "folder": None}
    write_manifest(tmp_path / MANIFEST, stores, patients)
    return tmp_path, stores, patients


def reasons(manifest, stores, patients=None):
    return {
        slide_id: [each.reason for each in found] for slide_id, found in find_seen(manifest, stores, patients or {}).items()
    }


def test_bytes_do_not_depend_on_the_order_and_hold_no_name(seen):
    folder, stores, patients = seen
    digest = write_manifest(folder / "again.csv", stores[::-1], patients)
    text = (folder / MANIFEST).read_text()
    assert (folder / "again.csv").read_text() == text
    assert len(digest) == 64
    lines = text.splitlines()
    assert lines[0] == ",".join(COLUMNS) and len(lines) == 5
    assert all(set(line) <= set("0123456789abcdef,;") for line in lines[1:])
    assert "P1" not in text and str(folder) not in text


def test_size_of_a_line_stays_small(seen):
    lines = (seen[0] / MANIFEST).read_text().splitlines()[1:]
    assert sum(len(line) < 250 for line in lines) == 3  # the fourth is a folder of tiles with the hashes of 16


def test_a_renamed_copy_is_found_by_its_picture(seen):
    folder, _, _ = seen
    copy = make(folder / "new", "other name", tiles_of(1))
    (evidence,) = find_seen(folder / MANIFEST, [copy], {})["other name"]
    assert (evidence.reason, evidence.match) == ("same picture", name_key("slide", "b"))
    assert evidence.bits <= 8  # stored as JPEG, pictures differ a little


@pytest.mark.parametrize("way", range(1, 8))
def test_a_turned_copy_is_found(seen, way):
    folder, _, _ = seen
    images = tiles_of(2)
    whole = images.reshape(3, 3, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(3 * SIDE, 3 * SIDE, 3)
    whole = np.rot90(whole[:, ::-1] if way >= 4 else whole, way % 4)
    images = whole.reshape(3, SIDE, 3, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(9, SIDE, SIDE, 3)
    copy = make(folder / "new", "turned", np.ascontiguousarray(images))
    assert reasons(folder / MANIFEST, [copy]) == {"turned": ["same picture"]}


def test_another_slide_of_the_same_patient_is_found_however_the_id_is_written(seen):
    folder, _, _ = seen
    other = make(folder / "new", "x", tiles_of(99))
    assert reasons(folder / MANIFEST, [other], {"x": " p1"}) == {"x": ["same patient"]}


def test_a_patient_is_found_whatever_a_spreadsheet_made_of_the_number(seen):
    folder, stores, _ = seen
    write_manifest(folder / "numbers.csv", stores[:2], {"a": "007", "b": "8.0"})
    other = make(folder / "new", "x", tiles_of(99))
    for name, was in {"7": "a", "7.0": "a", "0007": "a", "008": "b"}.items():
        (evidence,) = find_seen(folder / "numbers.csv", [other], {"x": name})["x"]
        assert (evidence.reason, evidence.match) == ("same patient", name_key("slide", was))
        assert find_by_identity(folder / "numbers.csv", {"x": ""}, {"x": name}) == {"x": (evidence,)}
    assert reasons(folder / "numbers.csv", [other], {"x": "70"}) == {}


def test_different_slides_raise_no_alarm_even_under_a_name_that_was_used(seen):
    folder, _, _ = seen
    others = [make(folder / "new", name, tiles_of(100 + number)) for number, name in enumerate(("a", "y", "z"))]
    assert reasons(folder / MANIFEST, others, {"a": "Q1", "y": "Q2", "z": None}) == {}


def test_a_name_counts_where_there_is_no_picture_to_contradict_it(seen):
    folder, _, _ = seen
    blank = make(folder / "new", "a", np.full((9, SIDE, SIDE, 3), 240, dtype=np.uint8))
    assert reasons(folder / MANIFEST, [blank]) == {"a": ["same slide id"]}


def test_folders_of_tiles_are_found_by_any_tile_in_any_order(seen):
    folder, _, _ = seen
    mixed = np.concatenate([tiles_of(200, 5), tiles_of(50, 40)[::-1]])
    copy = make(folder / "new", "renamed", mixed, tile_folder=True)
    assert reasons(folder / MANIFEST, [copy]) == {"renamed": ["same picture"]}
    other = make(folder / "new", "other", tiles_of(201, 40), tile_folder=True)
    assert reasons(folder / MANIFEST, [other]) == {}


def test_the_same_file_and_the_same_tiles_are_evidence_of_their_own(seen, tmp_path):
    folder, _, _ = seen
    blank = np.full((9, SIDE, SIDE, 3), 240, dtype=np.uint8)
    stores = []
    for name in ("first", "second"):
        path = make(tmp_path / "blank", name, blank)
        metadata = json.loads((path / "zarr.json").read_text())
        metadata["attributes"]["pathfm"] |= {"identity": "1" * 64, "fingerprint": "2" * 64}
        (path / "zarr.json").write_text(json.dumps(metadata))
        stores.append(path)
    write_manifest(folder / "blank.csv", stores[:1], {})
    assert reasons(folder / "blank.csv", stores[1:]) == {"second": ["same file", "same tiles"]}


def test_what_an_initial_encoder_has_seen_counts_too(seen):
    folder, stores, patients = seen
    write_manifest(folder / "first.csv", stores[:2], patients)
    write_manifest(folder / "both.csv", stores[2:], patients, [folder / "first.csv"])
    assert (folder / "both.csv").read_text() == (folder / MANIFEST).read_text()


def test_the_card_and_its_manifest_belong_together(seen, tmp_path):
    _, stores, patients = seen
    encoder = tmp_path / "teacher"
    encoder.mkdir()
    assert manifest_of(encoder) is None
    write_json(encoder / "card.json", {"step": 3})
    assert manifest_of(encoder) is None
    digest = write_manifest(encoder / MANIFEST, stores, patients)
    write_json(encoder / "card.json", {DIGEST: digest})
    assert manifest_of(encoder) == encoder / MANIFEST
    (encoder / MANIFEST).write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(StoreError, match="absent, or not the one"):
        manifest_of(encoder)
    (encoder / MANIFEST).unlink()
    with pytest.raises(StoreError, match="absent, or not the one"):
        manifest_of(encoder)


@pytest.mark.parametrize(
    "text", ["", "something,else\n", ",".join(COLUMNS) + "\n1,2,3\n", ",".join(COLUMNS) + "\na,b,c,d,1,1,zz\n"]
)
def test_a_damaged_manifest_is_named(seen, text):
    folder, stores, _ = seen
    (folder / "bad.csv").write_text(text)
    with pytest.raises(StoreError, match="not a manifest of pretraining"):
        find_seen(folder / "bad.csv", stores, {})


def test_a_folder_of_tiles_whose_pixels_are_not_stored_is_known_by_its_name(seen):
    folder = seen[0]
    stores = [
        make(folder / "new", name, tiles_of(number, 40), tile_folder=True) for name, number in (("folder", 60), ("x", 50))
    ]
    for store in stores:
        attrs = json.loads((store / "zarr.json").read_text())
        attrs["attributes"]["pathfm"]["has_pixels"] = False
        (store / "zarr.json").write_text(json.dumps(attrs))
    assert reasons(folder / MANIFEST, stores) == {"folder": ["same slide id"]}
