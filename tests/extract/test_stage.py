"""Extraction: rows match tiles, nothing is done twice, and nothing about how the work is done changes a byte of a file."""

from __future__ import annotations

import json
import threading

import h5py
import numpy as np
import pytest
import torch

from pathfm.config import load_study
from pathfm.errors import StoreError, UsageError
from pathfm.extract.stage import run_extract
from pathfm.models.encoders import load_encoder
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.store.commit import content_digest
from pathfm.store.dense_store import open_dense
from pathfm.store.feature_file import open_features
from pathfm.store.layout import Layout
from pathfm.store.lease import Lease, LeaseLostError, Leases
from pathfm.store.tile_store import TileStore, open_tiles, write_tiles
from pathfm.study import ExtractSettings

ENCODER = "untrained:test_vit"
CPU = torch.device("cpu")
COUNTS = (5, 1, 9, 30)


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    layout = Layout(out, "64px-0.5mpp-test")
    rng = np.random.default_rng(0)
    rows = []
    for number, count in enumerate(COUNTS):
        coarse = rng.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
        write_tiles(layout.store(f"s{number}"), coarse, slide_id=f"s{number}", codec="zstd")
        rows.append(SlideRow(f"s{number}", out / f"s{number}.svs"))
    return layout, Cohort((*rows, SlideRow("untiled", out / "untiled.svs")))


@pytest.fixture
def fresh(tiled, tmp_path):
    """The same stores under an output folder without features."""
    layout, cohort = tiled
    (tmp_path / "tiles").symlink_to(layout.out / "tiles")
    return Layout(tmp_path, layout.spec), cohort


def _study(layout, *settings):
    basic = (f"extract.encoder={ENCODER}", "extract.dtype=float32", "extract.precision=fp32", "extract.input_px=64")
    return load_study(None, [f"out={layout.out}", *basic, *settings])


def statuses(extraction):
    return {outcome.slide_id: outcome.status for outcome in extraction.report.outcomes}


def files(layout):
    return {path.relative_to(layout.out).as_posix(): content_digest(path) for path in layout.out.glob("features/*/*/*.h5")}


def test_rows_are_the_tiles_and_failures_are_named(tiled):
    layout, cohort = tiled
    done = run_extract(_study(layout), cohort, layout)
    assert statuses(done) == {**{f"s{number}": "done" for number in range(len(COUNTS))}, "untiled": "failed"}
    encoder = load_encoder(ENCODER, ExtractSettings(precision="fp32", input_px=64), CPU)
    for number, count in enumerate(COUNTS):
        features, store = open_features(done.sets["main"].folder / f"s{number}.h5"), open_tiles(layout.store(f"s{number}"))
        np.testing.assert_allclose(features.features, encoder(store.read(range(count))), atol=1e-5)
        np.testing.assert_array_equal(features.coords, store.xy_level0)
    again = run_extract(_study(layout), cohort, layout)
    assert statuses(again) == {**{f"s{number}": "kept" for number in range(len(COUNTS))}, "untiled": "failed"}


def test_a_file_says_how_it_was_made(tiled):
    layout, cohort = tiled
    done = run_extract(_study(layout), cohort, layout)
    attrs = open_features(done.sets["main"].folder / "s2.h5").attrs
    assert attrs["effective_mpp"] == pytest.approx(0.5)
    assert (attrs["slide_id"], attrs["tile_px"], attrs["encoder"]) == ("s2", 64, ENCODER)
    assert attrs["store_fingerprint"] == open_tiles(layout.store("s2")).fingerprint
    assert attrs["recipe_precision"] == "fp32"
    assert attrs["recipe_hash"].startswith(done.sets["main"].folder.name[-8:])
    assert {"version_torch", "version_timm", "version_pathfm", "recipe_weights_sha256", "tile_side_level0"} <= set(attrs)
    text = " ".join(str(value) for value in attrs.values())
    assert str(layout.out) not in text


WAYS = {
    "batches of 1": ["compute.batch_size=1"],
    "batches of 8": ["compute.batch_size=8"],
    "batches of 64": ["compute.batch_size=64"],
    "one thread": ["compute.threads=1"],
    "three threads": ["compute.threads=3"],
}


@pytest.mark.parametrize("way", WAYS)
def test_how_the_work_is_done_changes_no_byte(tiled, fresh, way):
    layout, cohort = tiled
    run_extract(_study(layout), cohort, layout)
    run_extract(_study(fresh[0], *WAYS[way]), *reversed(fresh))
    assert files(fresh[0]) == files(layout)


def test_neither_order_nor_shards_change_a_byte(tiled, fresh):
    layout, cohort = tiled
    run_extract(_study(layout), cohort, layout)
    backwards = Cohort(tuple(reversed(cohort.rows)))
    for shard in ("2/2", "1/2"):
        done = run_extract(_study(fresh[0], f"compute.shard={shard}"), backwards, fresh[0])
        assert len(done.report.outcomes) == (3 if shard == "1/2" else 2)
    assert files(fresh[0]) == files(layout)


def test_half_precision_too_does_not_depend_on_batches(tiled, fresh):
    layout, cohort = fresh
    run_extract(_study(layout, "extract.precision=bf16", "extract.min_fidelity=0", "compute.batch_size=8"), cohort, layout)
    first = files(layout)
    for path in layout.out.glob("features/*/*/*.h5"):
        path.unlink()
    run_extract(_study(layout, "extract.precision=bf16", "extract.min_fidelity=0", "compute.batch_size=40"), cohort, layout)
    assert files(layout) == first


def test_features_follow_their_tile(fresh):
    """A planted tile: wherever it lies, its row has its feature and its place."""
    layout, _ = fresh
    other = Layout(layout.out, "64px-0.5mpp-planted")
    rng = np.random.default_rng(1)
    planted = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    rows = []
    for slide, place in (("a", 3), ("b", 17)):
        tiles = np.full((20, 64, 64, 3), 200, dtype=np.uint8)
        tiles[place] = planted
        write_tiles(other.store(slide), tiles, slide_id=slide, codec="zstd")
        rows.append(SlideRow(slide, layout.out / slide))
    done = run_extract(_study(other), Cohort(tuple(rows)), other)
    expected = load_encoder(ENCODER, ExtractSettings(precision="fp32", input_px=64), CPU)(planted[None])[0]
    for slide, place in (("a", 3), ("b", 17)):
        file = open_features(done.sets["main"].folder / f"{slide}.h5")
        near = np.abs(file.features - expected).max(axis=1) < 1e-5
        assert np.flatnonzero(near).tolist() == [place]
        np.testing.assert_array_equal(file.coords[place], open_tiles(other.store(slide)).xy_level0[place])


def _cut(path):
    path.write_bytes(path.read_bytes()[:200])


def _cut_a_little(path):
    path.write_bytes(path.read_bytes()[:-100])


def _nan(path):
    with h5py.File(path, "r+") as file:
        file["features"][...] = np.nan


def _foreign(path):
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = np.zeros((5, 192)), np.zeros((5, 2))


def _another_length(path):
    with h5py.File(path, "r+") as file:
        rows = file["features"].shape[0]
        del file["features"]
        file["features"] = np.zeros((rows, 7), dtype=np.float32)


@pytest.mark.parametrize("harm", [_cut, _cut_a_little, _nan, _foreign, _another_length])
def test_a_harmed_feature_file_is_made_again(fresh, harm):
    layout, cohort = fresh
    done = run_extract(_study(layout), cohort, layout)
    before = files(layout)
    harm(done.sets["main"].folder / "s0.h5")
    harm(done.sets["colour"].folder / "s1.h5")
    again = run_extract(_study(layout), cohort, layout)
    assert [outcome.status for outcome in again.report.outcomes][:4] == ["done", "done", "kept", "kept"]
    assert files(layout) == before


def test_a_damaged_store_fails_its_slide_alone(fresh, tmp_path):
    layout, cohort = fresh
    other = Layout(tmp_path / "harmed", layout.spec)
    for row in cohort.rows[:4]:
        store = open_tiles(layout.store(row.slide_id))
        write_tiles(other.store(row.slide_id), store.read(range(len(store))), slide_id=row.slide_id, codec="zstd")
    shard = next((other.store("s2") / "tiles").rglob("0/0/0/0"))
    shard.write_bytes(b"\0" * 40 + shard.read_bytes()[40:])
    done = run_extract(_study(other), cohort, other)
    assert statuses(done) == {"s0": "done", "s1": "done", "s2": "failed", "s3": "done", "untiled": "failed"}
    assert "damaged" in done.report.outcomes[2].reason
    assert not list(other.out.glob("features/*/*/*s2*"))


def test_a_full_disk_is_said_and_the_next_run_goes_on(fresh, monkeypatch):
    layout, cohort = fresh
    from pathfm.extract import stage

    class Full(stage.FeatureWriter):
        def write(self, start, rows, valid=None):
            try:
                raise OSError(28, "No space left on device")
            except OSError as error:
                raise StoreError("the disk is full", fix="free some space") from error

    with monkeypatch.context() as patched:
        patched.setattr(stage, "FeatureWriter", Full)
        done = run_extract(_study(layout, "compute.batch_size=1"), cohort, layout)
    assert set(statuses(done).values()) == {"failed"}
    assert all("the disk is full (free some space)" in outcome.reason for outcome in done.report.outcomes[:4])
    assert not files(layout)
    assert list(statuses(run_extract(_study(layout), cohort, layout)).values()) == ["done"] * 4 + ["failed"]
    assert [path.name for path in layout.out.glob("features/*/*/.*")] == [".chain-id"]


def test_a_slide_that_another_process_holds_is_waited_for(tiled, fresh):
    layout, cohort = tiled
    made = run_extract(_study(layout), cohort, layout)
    held = Leases(60.0)
    lease = held.take(Layout(fresh[0].out, layout.spec).out / made.sets["main"].folder.relative_to(layout.out) / "s1.h5")
    threading.Timer(3.0, lease.release).start()
    try:
        done = run_extract(_study(fresh[0]), cohort, fresh[0])
    finally:
        held.close()
    assert statuses(done) == {**{f"s{number}": "done" for number in range(len(COUNTS))}, "untiled": "failed"}
    assert files(fresh[0]) == files(layout)


def test_a_slide_whose_lease_is_lost_is_tried_again(fresh, monkeypatch):
    layout, cohort = fresh
    lost = []

    def check(lease):
        if not lost:
            lost.append(lease)
            raise LeaseLostError("another process has taken it over")

    monkeypatch.setattr(Lease, "check", check)
    done = run_extract(_study(layout), cohort, layout)
    assert lost
    assert list(statuses(done).values()) == ["done"] * 4 + ["failed"]


def test_a_slide_that_cannot_be_read_does_not_stop_the_others(fresh, monkeypatch):
    """An error of a drive while reading concerns one slide; only one of writing concerns them all."""
    layout, cohort = fresh
    plain = TileStore.__getitem__

    def read(store, index):
        if store.slide_id != "s0":
            return plain(store, index)
        try:
            raise OSError(5, "Input/output error")
        except OSError as error:
            raise StoreError("shard cannot be opened") from error

    monkeypatch.setattr(TileStore, "__getitem__", read)
    done = run_extract(_study(layout, "compute.batch_size=1"), cohort, layout)
    assert list(statuses(done).values()) == ["failed", "done", "done", "done", "failed"]


def test_tiles_that_are_stale_are_not_used(tiled):
    layout, cohort = tiled
    done = run_extract(_study(layout), cohort, layout, stale_tiles={"s1"})
    assert statuses(done)["s1"] == "failed"


@pytest.mark.long
def test_several_processes_make_the_same_files(tiled, fresh):
    layout, cohort = tiled
    run_extract(_study(layout), cohort, layout)
    done = run_extract(_study(fresh[0], "compute.devices=2", "compute.device=cpu"), cohort, fresh[0])
    assert statuses(done) == {**{f"s{number}": "done" for number in range(len(COUNTS))}, "untiled": "failed"}
    assert [outcome.slide_id for outcome in done.report.outcomes] == [row.slide_id for row in cohort.rows]
    assert files(fresh[0]) == files(layout)


def test_what_the_encoder_sees_is_said_and_a_wrong_scale_refused(fresh, capsys):
    layout, cohort = fresh
    run_extract(_study(layout), cohort, layout)
    assert "0.5" in capsys.readouterr().out
    with pytest.raises(UsageError, match="mpp"):
        run_extract(_study(layout, "extract.encoder=untrained:lunit-s8", "extract.input_px=null"), cohort, layout)


def test_dense_features_and_slide_vectors_come_with_the_features(fresh):
    layout, cohort = fresh
    settings = ("extract.dense=true", "extract.slide_vectors=[mean, max]", "extract.pooling=mean")
    done = run_extract(_study(layout, *settings), cohort, layout)
    main = done.sets["main"].folder
    for number, count in enumerate(COUNTS):
        dense, features = open_dense(done.sets["dense"].folder / f"s{number}.zarr"), open_features(main / f"s{number}.h5")
        assert (len(dense), dense.grid, dense.dim) == (count, (4, 4), 64)
        np.testing.assert_allclose(dense.read(range(count)).mean(axis=(1, 2)), features.features, atol=1e-4)
        np.testing.assert_array_equal(dense.coords, features.coords)
    assert {path.name for path in (main / "slides").iterdir()} >= {"mean", "max"}
    assert done.vectors.statuses == {"done": 8}
    again = run_extract(_study(layout, *settings), cohort, layout)
    assert list(statuses(again).values()) == ["kept"] * 4 + ["failed"]


def test_events_tell_of_every_slide(fresh):
    layout, cohort = fresh
    done = run_extract(_study(layout), cohort, layout)
    (path,) = done.sets["main"].folder.glob("events-*.jsonl")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [event["kind"] for event in events if not event["kind"].startswith("slide")] == ["run_started", "run_ended"]
    assert {event["slide_id"] for event in events if event["kind"] == "slide_done"} == {"s0", "s1", "s2", "s3"}


def test_several_encoders_share_one_pass(fresh):
    layout, cohort = fresh
    done = run_extract(_study(layout, "extract.also=[untrained:test_convnext]", "extract.pooling=mean"), cohort, layout)
    assert set(done.sets) == {"main", "colour", "also 0"}
    other = load_encoder("untrained:test_convnext", ExtractSettings(precision="fp32"), CPU)
    for number, count in enumerate(COUNTS):
        kept = open_features(done.sets["also 0"].path(f"s{number}"))
        expected = other(open_tiles(layout.store(f"s{number}")).read(range(count)))
        np.testing.assert_allclose(kept.features, expected, atol=1e-4)
    alone = run_extract(_study(layout, "extract.encoder=untrained:test_convnext", "extract.input_px=null"), cohort, layout)
    assert statuses(alone)["s0"] == "kept"  # the same recipe, whichever way it was asked for


def test_an_encoder_that_loses_tiles_is_named(fresh, tmp_path, monkeypatch):
    (tmp_path / "lossy_net.py").write_text(
        "import torch\n"
        "class Lossy(torch.nn.Module):\n"
        "    def forward(self, images):\n"
        "        return images.mean(dim=(2, 3))[: 4 if len(images) > 1 else 1]\n"
        "def build():\n    return Lossy(), {'input_px': 64}\n"
    )
    monkeypatch.chdir(tmp_path)
    layout, cohort = fresh
    with pytest.raises(UsageError, match="4 vectors for 16 tiles"):
        settings = ("extract.encoder=python:lossy_net:build", "extract.input_px=null", "extract.controls=false")
        run_extract(_study(layout, *settings), cohort, layout)
