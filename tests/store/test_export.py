"""Exported tiles: exact, repeatable, safely named, and never over somebody else's files."""

from __future__ import annotations

import csv
import json
import shutil
import tarfile

import cv2
import numpy as np
import pytest

from pathfm import jpeg, tiling, workflow
from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.geometry import Size
from pathfm.store import export
from pathfm.store.commit import commit_dir, content_digest
from pathfm.store.export import FORMATS, export_stores, export_tiles
from pathfm.store.interop import read_coords
from pathfm.store.tile_store import TileCodec, TileStoreInfo, TileStoreWriter, open_tiles, write_tiles
from pathfm.study import CohortSettings, Study, TileSettings

STRANGE = "TCGA-5P.v2 100% {a} Ünï 😀"
COUNT = 11


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return rng.integers(40, 230, (COUNT, 8, 8, 3), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)


@pytest.fixture
def make_store(tmp_path, images):
    def make(slide_id="a", codec="jpeg", count=COUNT, **facts):
        path = tmp_path / "stores" / f"{slide_id}.zarr"
        xy = np.stack([np.arange(count) * 32, np.full(count, 64)], axis=1).astype(np.int64)
        write_tiles(path, images[:count], slide_id=slide_id, codec=codec, xy_level0=facts.pop("xy_level0", xy), **facts)
        return open_tiles(path)

    return make


def picture(data):
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("codec", ["jpeg", "zstd"])
def test_again_and_elsewhere_the_same_bytes(tmp_path, make_store, format, codec):
    store = make_store(STRANGE, codec)
    written = export_tiles(store, tmp_path / "one", format)
    before = content_digest(tmp_path / "one")
    assert export_tiles(store, tmp_path / "one", format) == written
    export_tiles(store, tmp_path / "two", format)
    assert content_digest(tmp_path / "one") == content_digest(tmp_path / "two") == before
    assert all(path.exists() and path.is_relative_to(tmp_path / "one") for path in written)
    for file in (path for path in (tmp_path / "one").rglob("*") if path.is_file()):
        assert not file.name.startswith(".")
        assert str(tmp_path).encode() not in file.read_bytes()


@pytest.mark.parametrize("codec", ["jpeg", "zstd"])
def test_png_holds_the_very_pixels(tmp_path, make_store, codec):
    store = make_store(codec=codec)
    assert export_tiles(store, tmp_path / "out", "png") == (tmp_path / "out" / "a",)
    for index, (x, y) in enumerate(store.xy_level0.tolist()):
        np.testing.assert_array_equal(picture((tmp_path / "out" / "a" / f"{x}_{y}.png").read_bytes()), store[index])
    with (tmp_path / "out" / "a" / "tiles.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["file"], int(row["x_level0"]), row["mpp"]) for row in rows[:2]] == [
        ("0_64.png", 0, "0.5"),
        ("32_64.png", 32, "0.5"),
    ]
    assert len(rows) == len(list((tmp_path / "out" / "a").glob("*.png"))) == COUNT


def test_jpeg_data_are_passed_on_unchanged(tmp_path, make_store):
    store = make_store()
    export_tiles(store, tmp_path, "jpeg")
    for index, (x, y) in enumerate(store.xy_level0.tolist()):
        assert (tmp_path / "a" / f"{x}_{y}.jpg").read_bytes() == store.encoded(index)
    lossless = make_store("z", "zstd")
    export_tiles(lossless, tmp_path, "jpeg")
    assert np.abs(jpeg.decode((tmp_path / "z" / "0_64.jpg").read_bytes()).astype(int) - lossless[0]).mean() < 12


def test_two_tiles_of_one_place_are_two_pictures(tmp_path, make_store):
    export_tiles(make_store(count=3, xy_level0=np.zeros((3, 2), np.int64)), tmp_path, "png")
    assert sorted(path.name for path in (tmp_path / "a").glob("*.png")) == ["0_0.png", "0_0_2.png", "0_0_3.png"]


@pytest.mark.parametrize(("codec", "ending"), [("jpeg", "jpg"), ("zstd", "png")])
def test_webdataset_shards(tmp_path, make_store, monkeypatch, codec, ending):
    monkeypatch.setattr(export, "TAR_TILES", 4)
    store = make_store(STRANGE, codec)
    key = "TCGA-5P%2Ev2 100%25 %7Ba%7D Ünï 😀"
    shards = export_tiles(store, tmp_path / "out", "webdataset")
    assert [shard.name for shard in shards] == [f"{key}-{number:06d}.tar" for number in range(3)]
    index = 0
    for shard in shards:
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
            assert {(each.mtime, each.uid, each.gid, each.uname, each.gname, each.mode) for each in members} == {
                (0, 0, 0, "", "", 0o644)
            }
            for image, facts in zip(members[::2], members[1::2], strict=True):
                # WebDataset cuts names at the first dot: both parts of a sample must have one key
                assert image.name.split(".", 1) == [f"{key}_{index:08d}", ending]
                assert facts.name.split(".", 1) == [f"{key}_{index:08d}", "json"]
                np.testing.assert_array_equal(picture(tar.extractfile(image).read()), store[index])
                content = json.loads(tar.extractfile(facts).read())
                assert (content["xy_level0"], content["mpp"], content["index"]) == ([32 * index, 64], 0.5, index)
                assert content["slide_id"] == STRANGE
                index += 1
    assert index == COUNT


@pytest.mark.parametrize(("format", "file"), [("clam", "patches/a.h5"), ("trident", "patches/a_patches.h5")])
def test_coordinates_lie_where_the_tools_look(tmp_path, make_store, format, file):
    store = make_store()
    assert export_tiles(store, tmp_path / "out", format) == (tmp_path / "out" / file,)
    tiles = read_coords(tmp_path / "out" / file)
    np.testing.assert_array_equal(tiles.xy_level0, store.xy_level0)
    assert tiles.side_level0 == 32


@pytest.mark.parametrize(("format", "place"), [("png", "a"), ("clam", "patches/a.h5"), ("geojson", "a.geojson")])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_others_have_put_there_stays(tmp_path, make_store, format, place, kind):
    theirs = tmp_path / "out" / place
    if kind == "folder":
        theirs = theirs / "precious.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    with pytest.raises(StoreError, match="something else is here"):
        export_tiles(make_store(), tmp_path / "out", format)
    assert theirs.read_text() == "precious"
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [theirs]


@pytest.mark.parametrize("name", [".notes", "record.json", "timing.csv", "more/x.txt"])
def test_files_that_others_have_added_to_an_export_stay(tmp_path, make_store, name):
    store = make_store()
    export_tiles(store, tmp_path / "out", "png")
    theirs = tmp_path / "out" / "a" / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("precious")
    with pytest.raises(StoreError, match="something else is here"):
        export_tiles(store, tmp_path / "out", "png")
    assert theirs.read_text() == "precious"


@pytest.mark.parametrize("format", ["png", "webdataset", "clam"])
def test_exporting_again_does_not_touch_what_is_there(tmp_path, make_store, format):
    def places():
        return {
            path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in (tmp_path / "out").rglob("*") if not path.is_dir()
        }

    export_tiles(make_store(), tmp_path / "out", format)
    before = places()
    export_tiles(make_store(), tmp_path / "out", format)
    assert before
    assert places() == before


def test_a_link_to_nowhere_is_not_replaced(tmp_path, make_store):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.geojson").symlink_to("nowhere")
    with pytest.raises(StoreError, match="something else is here"):
        export_tiles(make_store(), tmp_path / "out", "geojson")
    assert (tmp_path / "out" / "a.geojson").is_symlink()


def test_slides_of_a_study_without_a_store_that_is_up_to_date_fail(tmp_path, capsys):
    slides, out = tmp_path / "slides", tmp_path / "out"
    for name in ("a", "b", "c"):
        tiles = np.random.default_rng(ord(name)).integers(60, 200, (2, 32, 32, 3), dtype=np.uint8)
        (slides / name).mkdir(parents=True)
        for number, pixels in enumerate(tiles):
            cv2.imwrite(str(slides / name / f"{number}.png"), pixels)
    cohort = CohortSettings(slides=[str(slides)], folder_of_tiles=True)
    study = Study(out=out, cohort=cohort, tile=TileSettings(tile_px=32, assume_mpp=0.5))
    assert workflow.tile(study) == ExitCode.DONE
    shutil.rmtree(next(out.glob("tiles/*/b.zarr")))
    cv2.imwrite(str(slides / "c" / "2.png"), tiles[0])
    assert tiling.export(out, "png", tmp_path / "exported") == ExitCode.SOME_FAILED
    assert [path.name for path in (tmp_path / "exported").iterdir()] == ["a"]
    told = "".join(capsys.readouterr())
    assert told.count("no up-to-date store (run `pathfm tile`)") == 2


@pytest.mark.parametrize("format", ["clam", "trident", "geojson"])
def test_tiles_without_a_slide_have_no_coordinates_to_export(tmp_path, make_store, format):
    with pytest.raises(StoreError, match="no coordinates"):
        export_tiles(make_store(xy_level0=None), tmp_path / "out", format)
    assert not list((tmp_path / "out").rglob("*.*"))


def test_an_id_that_would_leave_the_folder_is_refused(tmp_path, make_store):
    store = make_store()
    store.slide_id = "../../elsewhere"
    for format in FORMATS:
        with pytest.raises(StoreError, match="slash"):
            export_tiles(store, tmp_path / "out", format)


def test_an_unknown_format_lists_the_known(tmp_path, make_store):
    with pytest.raises(UsageError, match="webdataset"):
        export_tiles(make_store(), tmp_path, "bmp")
    with pytest.raises(UsageError, match="webdataset"):
        list(export_stores([make_store().path], tmp_path, "bmp"))


def test_one_bad_store_does_not_stop_the_others(tmp_path, make_store):
    good, bad, empty = make_store("good"), make_store("bad"), make_store("empty", count=0)
    next((bad.path / "tiles").rglob("0/0/0/0")).write_bytes(b"")
    paths = [bad.path, tmp_path / "absent.zarr", empty.path, good.path]
    outcomes = list(export_stores(paths, tmp_path / "out", "png"))
    assert [(each.slide_id, each.status) for each in outcomes] == [
        ("bad", "failed"),
        ("absent", "failed"),
        ("empty", "empty"),
        ("good", "done"),
    ]
    assert outcomes[-1].counts == {"tiles": COUNT, "written": 1}
    assert all(str(tmp_path) not in each.reason for each in outcomes)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["empty", "good"]


def test_a_store_of_several_resolutions_gives_a_folder_for_each(tmp_path):
    path = tmp_path / "s.zarr"
    with commit_dir(path) as folder:
        for mpp, place in ((0.5, folder), (1.0, folder / "1mpp")):
            place.mkdir(exist_ok=True)
            writer = TileStoreWriter(place, TileCodec("none"), 224)
            writer.append_encoded(b"", (0, 0))
            root = place == folder
            extra = {"objective": 40.0, "scales": [0.5, 1.0]} if root else {"scale_of": "s"}
            info = TileStoreInfo("s", "0", 224, mpp, 448 * mpp * 2, Size(4000, 4000), extra=extra)
            writer.finish(info, np.zeros((4, 4, 3), np.uint8) if root else None)
    (outcome,) = export_stores([path], tmp_path / "out", "trident")
    assert (outcome.status, outcome.counts) == ("done", {"tiles": 2, "written": 2})
    sides = [read_coords(tmp_path / "out" / name / "patches" / "s_patches.h5").side_level0 for name in ("0.5mpp", "1mpp")]
    assert sides == [448, 896]
    (outcome,) = export_stores([path], tmp_path / "out2", "png")
    assert (outcome.status, "coordinates only" in outcome.reason) == ("failed", True)
