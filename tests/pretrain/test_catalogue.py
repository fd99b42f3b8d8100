import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from pathfm.errors import StoreError, UsageError
from pathfm.geometry import Size
from pathfm.pretrain.catalogue import Entry, build_catalogue, catalogue_of, open_catalogue, shared_catalogue
from pathfm.pretrain_settings import SamplingSettings
from pathfm.store.tile_store import TileCodec, TileStoreInfo, TileStoreWriter

PLAIN = SamplingSettings(slide_power=1.0)


def write_scales(path: Path, slide_id: str, counts: dict[float, int], codec: str = "zstd") -> Path:
    """A store of several resolutions, as ``pathfm tile`` writes it."""
    for number, (mpp, count) in enumerate(counts.items()):
        folder = path / f"{mpp:g}mpp" if number else path
        folder.mkdir(parents=True)
        writer = TileStoreWriter(folder, TileCodec(codec), 32, shard_tiles=8)
        for tile in range(count):
            writer.append(np.full((32, 32, 3), tile, np.uint8), (tile, 0), (tile / 10,))
        extra = {"scale_of": slide_id} if number else {"scales": list(counts) if len(counts) > 1 else []}
        writer.finish(TileStoreInfo(slide_id, "", 32, mpp, 32.0, Size(99, 99), ("tissue",), 1.0, False, extra), None)
    return path


def entry(slide_id, tiles=10, mpp=0.5, **changes):
    return Entry(slide_id, mpp, f"/tiles/{slide_id}.zarr", tiles, 256, 224)._replace(**changes)


def test_every_resolution_of_every_store_is_an_entry(tmp_path):
    several = write_scales(tmp_path / "b.zarr", "b", {0.5: 9, 0.25: 20})
    one = write_scales(tmp_path / "a.zarr", "a", {1.0: 3})
    catalogue = build_catalogue([several, one], PLAIN, {})
    assert [(catalogue.slide_id(row), catalogue.path(row)) for row in range(len(catalogue))] == [
        ("a", one),
        ("b", several / "0.25mpp"),
        ("b", several),
    ]
    assert catalogue.tiles_E.tolist() == [3, 20, 9] and catalogue.mpp_E.tolist() == [1.0, 0.25, 0.5]
    assert catalogue.shard_tiles_E.tolist() == [8, 8, 8] and catalogue.tile_px == 32
    assert catalogue.used == [("a", 3), ("b", 29)]


def test_the_order_of_the_paths_does_not_matter(stores):
    first, second = build_catalogue(stores, PLAIN, {}), build_catalogue(stores[::-1], PLAIN, {})
    assert np.array_equal(first.ends_E, second.ends_E) and np.array_equal(first.texts_N, second.texts_N)


def test_a_saved_catalogue_is_the_same_and_travels_as_its_place(tmp_path, stores):
    catalogue = build_catalogue(stores, PLAIN, {})
    saved = catalogue.saved(tmp_path / "catalogue", "abc")
    opened = open_catalogue(tmp_path / "catalogue", "abc")
    assert isinstance(saved.tiles_E, np.memmap) and len(pickle.dumps(saved)) < 1000
    for other in (saved, opened, pickle.loads(pickle.dumps(saved)), pickle.loads(pickle.dumps(catalogue))):
        assert other.used == catalogue.used and np.array_equal(other.ends_E, catalogue.ends_E)
        assert [other.path(row) for row in range(3)] == stores


@pytest.mark.parametrize("harm", ["absent", "other", "damaged", "incomplete"])
def test_a_catalogue_that_cannot_be_used_is_none(tmp_path, stores, harm):
    folder = tmp_path / "catalogue"
    build_catalogue(stores, PLAIN, {}).saved(folder, "abc")
    if harm == "absent":
        shutil.rmtree(folder)
    if harm == "damaged":
        (folder / "tiles_E.npy").write_bytes(b"")
    if harm == "incomplete":
        (folder / "texts_N.npy").unlink()
    assert open_catalogue(folder, "xyz" if harm == "other" else "abc") is None


def test_one_process_builds_and_the_others_wait(tmp_path, stores, monkeypatch):
    folder, built = tmp_path / "catalogue", []

    def build():
        built.append(1)
        return build_catalogue(stores, PLAIN, {})

    monkeypatch.setattr("time.sleep", lambda _: shared_catalogue(folder, "abc", build, makes_it=True))
    for makes_it in (False, True, False):
        assert shared_catalogue(folder, "abc", build, makes_it).used == [("a", 24), ("b", 10), ("c", 7)]
    assert built == [1]
    monkeypatch.setattr("pathfm.pretrain.catalogue.PATIENCE_S", -1)
    with pytest.raises(StoreError, match="has made no catalogue"):
        shared_catalogue(folder, "xyz", build, makes_it=False)


def test_names_of_any_script_and_paths_of_any_bytes_survive():
    odd = entry("Gewebe ü 組織", path="/data/\udcff.zarr")
    catalogue = catalogue_of([entry("a"), odd, entry("b")], PLAIN, {})
    assert [catalogue.slide_id(row) for row in range(3)] == ["Gewebe ü 組織", "a", "b"]
    assert str(catalogue.path(0)) == "/data/\udcff.zarr"


def test_all_stores_that_cannot_be_read_are_named_at_once(tmp_path, stores):
    for name in ("x", "y"):
        (tmp_path / f"{name}.zarr").mkdir()
    with pytest.raises(StoreError, match=r"(?s)2 problems.*x\.zarr.*y\.zarr"):
        build_catalogue([*stores, tmp_path / "x.zarr", tmp_path / "y.zarr"], PLAIN, {})


def test_a_store_without_pixels_is_refused(tmp_path):
    with pytest.raises(StoreError, match="coordinates only"):
        build_catalogue([write_scales(tmp_path / "a.zarr", "a", {0.5: 3}, codec="none")], PLAIN, {})


def test_a_quality_column_that_is_absent_is_told_with_those_there_are(tmp_path):
    store = write_scales(tmp_path / "a.zarr", "a", {0.5: 3})
    with pytest.raises(UsageError, match="no quality column 'tisue', did you mean 'tissue'"):
        build_catalogue([store], SamplingSettings(quality=("tisue",)), {})


def test_a_slide_that_is_there_twice_is_refused():
    with pytest.raises(UsageError, match=r"slide 'a' is there twice at 0.5 mpp"):
        catalogue_of([entry("a"), entry("b"), entry("a", path="/other/a.zarr")], PLAIN, {})
    with pytest.raises(UsageError, match="slide 'a' is there twice"):
        catalogue_of([entry("a", mpp=math.nan), entry("a", mpp=math.nan)], PLAIN, {})
    catalogue_of([entry("a"), entry("a", mpp=0.25)], PLAIN, {})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"sit": {"A": 1}}, "no column 'sit', did you mean 'site'?.*there are mpp, site"),
        ({"site": {"AA": 1}}, "no slide has site 'AA', did you mean 'A'?.*there are A, B"),
        ({"mpp": {"0.7": 1}}, "no slide has mpp '0.7'.*there are 0.25, 0.5"),
        ({"mpp": {"20x": 1}}, "mpp must be numbers"),
    ],
)
def test_weights_of_what_does_not_exist_are_told(weights, message):
    entries = [entry("a"), entry("b", mpp=0.2521)]
    facts = {"a": {"site": "A"}, "b": {"site": "B"}}
    with pytest.raises(UsageError, match=message):
        catalogue_of(entries, SamplingSettings(weights=weights), facts)


def test_resolutions_that_are_nearly_a_named_one_count_as_it():
    entries = [entry("a", mpp=0.4987), entry("b", mpp=0.51), entry("c", mpp=0.2521), entry("d", mpp=math.nan)]
    sampling = SamplingSettings(slide_power=1.0, weights={"mpp": {"0.50": 3}}, max_repeats=100)
    catalogue = catalogue_of(entries, sampling, {})
    widths = dict(zip("cabd", [0] * 4, strict=True))
    for row, width in enumerate(np.diff(catalogue.ends_E, prepend=0) / 2**16):
        widths[catalogue.slide_id(row)] = width
    assert widths == pytest.approx({"a": 12, "b": 12, "c": 8, "d": 8})


def test_slides_that_share_a_group_lie_together_on_the_line():
    facts = {f"s{i}": {"site": "BA"[i % 2]} for i in range(6)}
    sampling = SamplingSettings(weights={"site": {"A": 1}})
    catalogue = catalogue_of([entry(f"s{i}") for i in range(6)], sampling, facts)
    assert [catalogue.slide_id(row) for row in range(6)] == ["s1", "s3", "s5", "s0", "s2", "s4"]
