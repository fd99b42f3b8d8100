"""Vectors of whole slides: against numpy, in any order, whole or absent; features of another encoder are refused."""

from __future__ import annotations

import csv
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pathfm.errors import MissingExtraError, StoreError, UsageError
from pathfm.extract.slide_level import write_slide_vectors
from pathfm.models import slide_encoders
from pathfm.models.cards import CARDS
from pathfm.models.slide_encoders import SLIDE_ENCODERS, SlideEncoder, grid_places, load_slide_encoder
from pathfm.store.commit import content_digest
from pathfm.store.feature_file import FeatureWriter
from pathfm.store.lease import Lease, LeaseLostError, Leases
from pathfm.store.slide_vectors import open_slide_vector, write_slide_table, write_slide_vector

CPU = torch.device("cpu")
SIDE = 448.0
DIM = 6


def write_slide(path: Path, tiles: int = 9, valid: np.ndarray | None = None, dim: int = DIM, **attrs: object) -> np.ndarray:
    """A feature file of random features; returns them as stored."""
    rng = np.random.default_rng(sum(path.stem.encode()))
    features = rng.normal(100.0, 5.0, (tiles, dim)).astype(np.float16)
    coords = np.stack([np.arange(tiles) % 4, np.arange(tiles) // 4], axis=1) * int(SIDE)
    facts = {"slide_id": path.stem, "fingerprint": f"features of {path.stem}", "tile_px": 224, "mpp": 0.5}
    facts |= {"tile_side_level0": SIDE, "recipe_encoder": "timm:x", "recipe_card": "timm:x", **attrs}
    with FeatureWriter(path, tiles, dim, "float16", coords, facts) as writer:
        writer.write(0, features, valid)
    return features


@pytest.fixture
def cohort(tmp_path):
    return [path for name in ("b", "a", "c") if write_slide(path := tmp_path / f"{name}.h5") is not None]


def statuses(outcomes):
    return {outcome.slide_id: outcome.status for outcome in outcomes}


def test_mean_and_max_are_those_of_the_valid_tiles(tmp_path):
    valid = np.array([True] * 5 + [False] + [True] * 3)
    features = write_slide(tmp_path / "s.h5", valid=valid)[valid].astype(np.float64)
    for name, expected in (("mean", features.mean(axis=0)), ("max", features.max(axis=0))):
        [outcome] = write_slide_vectors([tmp_path / "s.h5"], tmp_path / "slides", load_slide_encoder(name, CPU))
        vector = open_slide_vector(tmp_path / "slides" / name / "s.h5")
        np.testing.assert_array_equal(vector.vector, expected.astype(np.float32))
        assert (outcome.status, outcome.counts["dim"], vector.attrs["tiles"]) == ("done", DIM, 8)
        assert vector.attrs["slide_id"] == "s" and vector.attrs["slide_encoder"] == name and vector.attrs["mpp"] == 0.5


def test_a_long_sum_of_half_precision_is_exact(tmp_path):
    values = np.full((70_000, 1), 60.0, dtype=np.float16)  # the sum is beyond float16, and steps of it beyond float32
    assert load_slide_encoder("mean", CPU)(values, np.zeros((70_000, 2), dtype=np.int64), SIDE) == pytest.approx([60.0])


def test_plain_hdf5_reads_a_vector(tmp_path):
    write_slide(tmp_path / "s.h5")
    write_slide_vectors([tmp_path / "s.h5"], tmp_path / "slides", load_slide_encoder("mean", CPU))
    with h5py.File(tmp_path / "slides/mean/s.h5") as file:
        assert file["vector"].shape == (DIM,) and file["vector"].dtype == np.float32
        assert file.attrs["format"] == "pathfm-slide-vector" and file.attrs["features_encoder"] == "timm:x"


def test_the_order_of_slides_changes_nothing(tmp_path, cohort):
    encoder = load_slide_encoder("mean", CPU)
    write_slide_vectors(cohort, tmp_path / "one", encoder)
    write_slide_vectors(cohort[::-1], tmp_path / "two", encoder)
    assert content_digest(tmp_path / "one") == content_digest(tmp_path / "two")
    with (tmp_path / "one/mean.csv").open(newline="") as stream:
        header, *lines = csv.reader(stream)
    assert header == ["slide_id", *(f"v{number}" for number in range(DIM))] and [line[0] for line in lines] == ["a", "b", "c"]
    for slide_id, *values in lines:
        expected = open_slide_vector(tmp_path / f"one/mean/{slide_id}.h5").vector
        np.testing.assert_array_equal(np.array(values, dtype=np.float32), expected)  # every bit survives the text


def test_what_is_current_is_kept_and_what_is_stale_is_made_again(tmp_path, cohort):
    encoder, home = load_slide_encoder("mean", CPU), tmp_path / "slides"
    assert set(statuses(write_slide_vectors(cohort, home, encoder)).values()) == {"done"}
    table = (home / "mean.csv").stat()
    assert set(statuses(write_slide_vectors(cohort, home, encoder)).values()) == {"kept"}
    assert (home / "mean.csv").stat().st_ino == table.st_ino  # untouched
    write_slide(tmp_path / "a.h5", fingerprint="other features")
    (home / "mean/b.h5").write_bytes(b"torn")
    assert statuses(write_slide_vectors(cohort, home, encoder)) == {"a": "done", "b": "done", "c": "kept"}
    newer = SlideEncoder("mean", "mean 2", slide_encoders.mean_vector)
    assert set(statuses(write_slide_vectors(cohort, home, newer)).values()) == {"done"}


def test_jobs_at_the_same_time_encode_each_slide_once_and_leave_a_table_of_all(tmp_path, cohort):
    encoded, both = [], threading.Barrier(2, timeout=20)

    def pool(features, coords, side):
        encoded.append(float(features[0, 0]))
        if len(encoded) <= 2:
            both.wait()  # each job holds a slide that the other one wants
        return features.mean(axis=0)

    encoder, home = SlideEncoder("own", "own 1", pool), tmp_path / "slides"
    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(write_slide_vectors, cohort, home, encoder, 6.0) for _ in range(2)]
        found = [statuses(job.result()) for job in jobs]
    assert len(encoded) == 3
    assert all({found[0][name], found[1][name]} == {"done", "kept"} for name in "abc")
    assert sorted(path.name for path in home.rglob("*")) == ["a.h5", "b.h5", "c.h5", "own", "own.csv"]
    assert [line[0] for line in (home / "own.csv").read_text().splitlines()] == ["s", "a", "b", "c"]


def test_a_job_that_listed_its_files_earlier_leaves_a_table_of_all(tmp_path, cohort):
    home, plain = tmp_path / "slides", SlideEncoder("own", "own 1", slide_encoders.mean_vector)

    def pool(features, coords, side):
        write_slide_vectors(cohort[1:], home, plain)  # another job comes and goes meanwhile
        write_slide(tmp_path / "d.h5")
        return features.mean(axis=0)

    [outcome] = write_slide_vectors(cohort[:1], home, SlideEncoder("own", "own 1", pool))
    assert outcome.status == "done"
    assert [line[0] for line in (home / "own.csv").read_text().splitlines()] == ["s", "a", "b", "c"]
    write_slide(cohort[0], fingerprint="other features")
    write_slide_vectors(cohort[1:], home, plain)
    assert [line[0] for line in (home / "own.csv").read_text().splitlines()] == ["s", "a", "c"]  # b's is stale


def test_a_finished_study_may_lie_on_a_drive_that_cannot_be_written(tmp_path, cohort, monkeypatch):
    home, encoder = tmp_path / "slides", load_slide_encoder("mean", CPU)
    write_slide_vectors(cohort, home, encoder)
    monkeypatch.setattr(Leases, "take", lambda *_: pytest.fail("a file is written"))
    assert set(statuses(write_slide_vectors(cohort, home, encoder)).values()) == {"kept"}


def test_a_vector_whose_lease_was_lost_is_not_written(tmp_path, cohort, monkeypatch):
    home, encoder = tmp_path / "slides", load_slide_encoder("mean", CPU)

    def lost(lease):
        raise LeaseLostError("another process has taken it over")

    monkeypatch.setattr(Lease, "check", lost)
    outcomes = write_slide_vectors(cohort, home, encoder)
    assert {outcome.status for outcome in outcomes} == {"failed"} and "taken it over" in outcomes[0].reason
    assert list((home / "mean").iterdir()) == []


def test_a_slide_that_fails_ends_nothing_and_leaves_nothing(tmp_path, cohort):
    def pool(features, coords, side):
        if len(features) == 2:
            raise IndexError("index 7 is out of range")
        return features.mean(axis=0) if len(features) > 1 else np.full(DIM, np.nan)

    encoder, home = SlideEncoder("own", "own 1", pool), tmp_path / "slides"
    write_slide_vectors(cohort, home, encoder)
    write_slide(tmp_path / "a.h5", tiles=2, fingerprint="another a")
    write_slide(tmp_path / "b.h5", tiles=1, fingerprint="another b")
    write_slide(tmp_path / "d.h5", valid=np.zeros(9, dtype=bool))
    (tmp_path / "e.h5").write_bytes(b"nothing")
    paths = [*cohort, tmp_path / "d.h5", tmp_path / "e.h5", tmp_path / "absent.h5"]
    outcomes = {outcome.slide_id: outcome for outcome in write_slide_vectors(paths, home, encoder)}
    assert [path.stem for path in paths] == list(outcomes) and outcomes["c"].status == "kept"
    reasons = {
        "a": "index 7",
        "b": "not finite",
        "d": "no valid tile",
        "e": "damaged feature file",
        "absent": "no feature file",
    }
    for slide_id, words in reasons.items():
        assert outcomes[slide_id].status == "failed" and words in outcomes[slide_id].reason
    assert [file.name for file in (home / "own").iterdir()] == ["c.h5"]
    assert [line.partition(",")[0] for line in (home / "own.csv").read_text().splitlines()] == ["slide_id", "c"]


@pytest.mark.parametrize(("dim", "made"), [(4, np.zeros(3)), (None, np.zeros((2, 3))), (None, 1.0), (None, "text")])
def test_what_is_no_vector_is_refused(tmp_path, dim, made):
    write_slide(tmp_path / "s.h5")
    encoder = SlideEncoder("own", "own 1", lambda *_: made, dim)
    [outcome] = write_slide_vectors([tmp_path / "s.h5"], tmp_path / "slides", encoder)
    assert outcome.status == "failed" and not list((tmp_path / "slides/own").glob("*"))


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    body = "numpy.append(features.std(axis=0), coords.max() / side)"
    code = f"import numpy\n\ndef spread(features, coords, side):\n    return {body}\n"
    (tmp_path / "my_pooling_1.py").write_text(code)
    (tmp_path / "my_pooling_2.py").write_text(code.replace("std", "var"))
    monkeypatch.syspath_prepend(tmp_path)
    features = write_slide(tmp_path / "s.h5").astype(np.float32)
    encoder = load_slide_encoder("python:my_pooling_1:spread", CPU)
    write_slide_vectors([tmp_path / "s.h5"], tmp_path / "slides", encoder)
    vector = open_slide_vector(tmp_path / "slides/python-my_pooling_1-spread/s.h5").vector
    np.testing.assert_allclose(vector[:-1], features.std(axis=0), rtol=0.02)
    assert vector[-1] == 3.0 and len(vector) == DIM + 1
    other = load_slide_encoder("python:my_pooling_2:spread", CPU)
    assert other.identity.split()[-1] != encoder.identity.split()[-1]  # its code is part of what vectors depend on
    with pytest.raises(UsageError, match="cannot be imported"):
        load_slide_encoder("python:my_pooling_1:absent", CPU)
    with pytest.raises(UsageError, match="not a function"):
        load_slide_encoder("python:my_pooling_1:numpy", CPU)
    with pytest.raises(UsageError, match="did you mean 'titan'"):
        load_slide_encoder("titam", CPU)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"recipe_encoder": "uni2-h", "recipe_card": "uni2-h"}, "was trained on features of virchow, these are of uni2-h"),
        ({"recipe_encoder": "virchow2", "recipe_card": "virchow2"}, "these are of virchow2"),
        ({"dim": 1280}, "takes 2560 features per tile, these are 1280"),
        ({"mpp": 1.0}, "tiles of 112 um, these have 224 um"),
    ],
)
def test_features_that_a_slide_encoder_was_not_trained_on_are_refused(tmp_path, changed, words):
    encoder = SlideEncoder("prism", "prism 1", slide_encoders.mean_vector, None, CARDS["virchow"])
    facts = {"recipe_encoder": "virchow", "recipe_card": "virchow", "dim": 2560, **changed}
    write_slide(tmp_path / "s.h5", **facts)
    [outcome] = write_slide_vectors([tmp_path / "s.h5"], tmp_path / "slides", encoder)
    assert outcome.status == "failed" and words in outcome.reason and "extract.encoder=virchow" in outcome.reason


@pytest.mark.parametrize(
    ("name", "card"),
    [("virchow", "virchow"), ("virchow@trident", "x"), ("local-dir:Virchow", "x"), ("python:mine:load", "virchow")],
)
def test_the_right_features_are_known_by_whatever_name(tmp_path, name, card):
    encoder = SlideEncoder("prism", "prism 1", slide_encoders.mean_vector, None, CARDS["virchow"])
    write_slide(tmp_path / "s.h5", dim=2560, recipe_encoder=name, recipe_card=card)
    [outcome] = write_slide_vectors([tmp_path / "s.h5"], tmp_path / "slides", encoder)
    assert outcome.status == "done", outcome.reason


class Pretended(nn.Module):
    """Stands for TITAN, PRISM or GigaPath: notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1))
        self.given: list[object] = []

    def encode_slide_from_patch_features(self, features, coords, side):
        self.given.append((features, coords, side))
        return features.mean(1) + self.bias

    def slide_representations(self, features):
        return {"image_embedding": features.mean(1)[:, :1280]}

    def forward(self, features, coords):
        self.given.append((features, coords))
        return [features[0, :2, :768], features.mean(1)[:, :768]]


@pytest.mark.parametrize(("name", "card", "dim"), [("titan", "conch-v1.5", 768), ("prism", "virchow", 1280)])
def test_networks_of_the_hub_get_what_they_want(tmp_path, monkeypatch, name, card, dim):
    net, asked = Pretended(), []
    module = types.SimpleNamespace(
        AutoModel=types.SimpleNamespace(from_pretrained=lambda hub_id, **options: asked.append((hub_id, options)) or net)
    )
    monkeypatch.setitem(slide_encoders.importlib.sys.modules, "transformers", module)
    monkeypatch.setattr(slide_encoders.importlib.util, "find_spec", lambda package: package)
    encoder, needs = load_slide_encoder(name, CPU), CARDS[card]
    assert encoder.needs is needs and encoder.dim == dim and encoder.identity.startswith(name)
    assert asked[0][1]["local_files_only"] is True  # nothing is fetched behind the user's back
    features = write_slide(
        tmp_path / "s.h5", dim=needs.dim, recipe_encoder=card, tile_px=needs.tile_px, mpp=needs.mpp[0], tile_side_level0=SIDE
    )
    [outcome] = write_slide_vectors([tmp_path / "s.h5"], tmp_path / "slides", encoder)
    assert outcome.status == "done", outcome.reason
    if name == "titan":
        [(given, coords, side)] = net.given
        assert given.shape == (1, 9, 768) and given.dtype == torch.float32 and side == 512
        np.testing.assert_array_equal(given[0].numpy(), features.astype(np.float32))
        assert coords[0, 5].tolist() == [512, 512] and coords.dtype == torch.int64


def test_gigapaths_grid_is_in_tiles_of_256(tmp_path, monkeypatch):
    net = Pretended()
    modules = {
        "gigapath.slide_encoder": types.SimpleNamespace(create_model=lambda weights, arch, dim: net),
        "huggingface_hub": types.SimpleNamespace(hf_hub_download=lambda *names, local_files_only: "slide_encoder.pth"),
    }
    monkeypatch.setattr(slide_encoders.importlib, "import_module", lambda name: modules[name])
    monkeypatch.setattr(slide_encoders.importlib.util, "find_spec", lambda package: package)
    encoder = load_slide_encoder("gigapath-slide", CPU)
    write_slide(tmp_path / "s.h5", dim=1536, recipe_encoder="gigapath", tile_px=256)
    [outcome] = write_slide_vectors([tmp_path / "s.h5"], tmp_path / "slides", encoder)
    assert outcome.status == "done", outcome.reason
    assert net.given[0][1][0, 5].tolist() == [256.0, 256.0] and outcome.counts["dim"] == 768


@pytest.mark.parametrize("name", ["titan", "prism", "gigapath-slide"])
def test_an_absent_package_or_weight_is_one_line_with_what_to_do(monkeypatch, name):
    assert name in SLIDE_ENCODERS
    monkeypatch.setattr(slide_encoders.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(MissingExtraError, match=rf"{name} needs .*\(pip install "):
        load_slide_encoder(name, CPU)

    def fails(*_: object, **__: object) -> None:
        raise OSError("401 Client Error.\nCannot access gated repo")

    monkeypatch.setattr(slide_encoders.importlib.util, "find_spec", lambda package: package)
    broken = types.SimpleNamespace(from_pretrained=fails)
    module = types.SimpleNamespace(AutoModel=broken, create_model=fails, hf_hub_download=fails)
    monkeypatch.setattr(slide_encoders.importlib, "import_module", lambda name: module)
    with pytest.raises(UsageError, match=r"401 Client Error\. \(accept the licence at .*hf download") as caught:
        load_slide_encoder(name, CPU)
    assert "\n" not in str(caught.value)


@given(side=st.floats(16.0, 3000.0), column=st.integers(0, 400), row=st.integers(0, 400))
def test_rounded_corners_keep_their_place_in_the_grid(side, column, row):
    corner = np.array([[round(column * side), round(row * side)]])
    assert grid_places(corner, side).tolist() == [[column, row]]


def test_a_damaged_or_foreign_vector_is_refused(tmp_path):
    path = tmp_path / "s.h5"
    with pytest.raises(StoreError, match=r"extract\.slide_vectors"):
        open_slide_vector(path)
    with pytest.raises(StoreError, match="finite"):
        write_slide_vector(path, np.array([np.nan], dtype=np.float32), {})
    write_slide_vector(path, np.ones(3, dtype=np.float32), {"fingerprint": "f"})
    with h5py.File(path, "a") as file:
        file.attrs["version"] = 99
    with pytest.raises(StoreError, match="newer"):
        open_slide_vector(path)
    with h5py.File(path, "a") as file:
        file.attrs["format"] = "other"
    with pytest.raises(StoreError, match="not a slide vector"):
        open_slide_vector(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(StoreError, match="damaged"):
        open_slide_vector(path)
    with pytest.raises(StoreError, match="different lengths"):
        write_slide_table(tmp_path / "t.csv", {"a": np.ones(2, dtype=np.float32), "b": np.ones(3, dtype=np.float32)})
