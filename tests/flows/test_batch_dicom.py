"""From a prediction's tables to DICOM objects: the scores of ``attention.csv`` are those of the maps, tile by tile."""

from __future__ import annotations

import datetime
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from pathfm.batch.dicom import About, TileScores, dicom_sources, read_scores, tile_map, write_dicom_of
from pathfm.errors import SlideError
from pathfm.geometry import Mpp, Size
from pathfm.mil.bundle import open_bundle, write_bundle
from pathfm.mil.feature_cache import FeatureCache
from pathfm.mil.galleries import tile_table
from pathfm.mil.heatmap import SlideHeat
from pathfm.mil.outputs import write_table
from pathfm.mil.predict import Ensemble, predict
from pathfm.mil.prediction_pictures import Pictures
from pathfm.mil.prediction_table import Known, Result
from pathfm.mil.seen import Seen
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.store.feature_file import write_features
from pathfm.store.interop.dicom_results import DicomResult, TaskResult, write_dicom
from pathfm.store.record import Outcome
from pathfm.store.tile_store import write_tiles

from ..mil.bundles import DIM, IDENTITY, facts_in

pydicom = pytest.importorskip("pydicom", reason="pip install 'pathfm[dicom]'")
highdicom = pytest.importorskip("highdicom", reason="pip install 'pathfm[dicom]'")

TIME = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
SIDE = 16


def grid(columns, rows, step=SIDE):
    x, y = np.meshgrid(np.arange(columns) * step, np.arange(rows) * step)
    return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.int64)


def test_a_table_of_tiles_is_read_as_it_was_written(tmp_path):
    value_NC = np.array([[0.25, -0.5], [np.nan, np.nan], [1e-7, 0.125]])
    heat = SlideHeat("s", grid(3, 1), (SIDE, SIDE), value_NC, ("normal", "tumour"), "gradient x input")
    several = replace(heat, kind="attention", logit_NC=value_NC)
    single = SlideHeat("s", grid(3, 1), (SIDE, SIDE), value_NC[:, :1], logit_NC=value_NC[:, :1])
    for each in (heat, several, single, replace(heat, value_NC=value_NC[:, :1], names=("score",))):
        write_table(tmp_path / "table.csv", *tile_table(each))
        found = read_scores(tmp_path / "table.csv")
        assert (found.names, found.kind) == (each.names, each.kind)
        assert np.array_equal(found.value_NC, each.value_NC, equal_nan=True) and np.array_equal(found.xy_level0, each.xy_level0)


def test_overlapping_tiles_have_their_mean_and_unseen_ones_nothing():
    scores = TileScores(grid(2, 1, SIDE // 2), np.array([[0.25], [0.75]]), ("",), "attention")
    found = tile_map(scores, (SIDE, SIDE), Size(4 * SIDE, SIDE))
    assert found.step_level0[0] == SIDE / 2 and found.value_Chw[0, 0, :3].tolist() == [0.25, 0.5, 0.75]
    unseen = tile_map(
        TileScores(grid(3, 1), np.array([[0.5], [np.nan], [0.25]]), ("",), "attention"), (SIDE, SIDE), Size(64, 16)
    )
    assert unseen.analysed_hw.tolist() == [[True, False, True, False]]


def test_the_highest_tenth_is_marked_and_nothing_that_speaks_against():
    value_N = np.linspace(-1, -0.5, 20)
    value_N[[3, 7]] = 0.5, 0.6
    found = tile_map(TileScores(grid(20, 1), value_N[:, None], ("x",), "gradient x input"), (SIDE, SIDE), Size(320, 16))
    assert np.flatnonzero(found.marked_hw).tolist() == [3, 7]
    against = tile_map(
        TileScores(grid(20, 1), -np.abs(value_N)[:, None], ("x",), "gradient x input"), (SIDE, SIDE), Size(320, 16)
    )
    assert not against.marked_hw.any() and against.marked_as == "Highest tenth of gradient x input"


def test_twenty_thousand_tiles_take_less_than_two_seconds(tmp_path):
    xy = grid(200, 100, 448)
    scores = TileScores(xy, np.random.default_rng(0).dirichlet(np.ones(len(xy)))[:, None], ("",), "attention")
    start = time.process_time()
    tiles = tile_map(scores, (448.0, 448.0), Size(200 * 448, 100 * 448))
    thumbnail = np.zeros((512, 1024, 3), dtype=np.uint8)
    task = TaskResult("label", {"a": 0.5, "b": 0.5})
    said = DicomResult("s", "ab", Size(89600, 44800), Mpp(0.25, 0.25), len(xy), tiles, (task,), "cd", "m", "0", TIME)
    write_dicom(tmp_path / "dicom", replace(said, thumbnail=thumbnail))
    assert time.process_time() - start < 2
    pixels = highdicom.imread(tmp_path / "dicom" / "map-1.dcm").get_total_pixel_matrix()
    assert np.array_equal(pixels, scores.value_NC.reshape(100, 200).astype(np.float32))
    assert round(tiles.marked_hw.mean(), 6) == 0.1


@pytest.fixture
def predicted(tmp_path):
    """A slide of 3 x 4 tiles and one without places, asked about as ``pathfm mil predict`` does."""
    write_bundle(tmp_path / "bundle", facts_in(tmp_path))
    ensemble = Ensemble(open_bundle(tmp_path / "bundle"), torch.device("cpu"))
    out, stores = tmp_path / "out", tmp_path / "out" / "tiles" / "spec"
    rows = tuple(SlideRow(slide_id, tmp_path / f"{slide_id}.png") for slide_id in ("s1", "nowhere"))
    for row in rows:
        xy = grid(3, 4)
        images = np.full((len(xy), SIDE, SIDE, 3), 200, dtype=np.uint8)
        write_tiles(
            stores / f"{row.slide_id}.zarr", images, slide_id=row.slide_id, xy_level0=xy if row.slide_id == "s1" else None
        )
        feature = np.random.default_rng(0).normal(size=(len(xy), DIM)).astype(np.float16)
        write_features(tmp_path / f"{row.slide_id}.h5", feature, xy, {"fingerprint": "f", **IDENTITY})
    cohort, patients = Cohort(rows), {row.slide_id: row.slide_id for row in rows}
    pictures = Pictures(out, stores, cohort, layers=False)
    with FeatureCache(1 << 20, tmp_path / "scratch") as cache:
        answers = predict(
            ensemble, {name: tmp_path / f"{name}.h5" for name in patients}, cohort, patients, cache, pictures.look
        )
    known = Known(patients, dict.fromkeys(patients, "ab" * 32), {}, has_labels=False)
    done = {slide_id: Outcome(slide_id, "done") for slide_id in patients}
    return Result(cohort, stores, ensemble, known, Seen("mark", False, patients), answers, done), out / "attention"


def test_a_predicted_slide_becomes_dicom_under_another_name(predicted, tmp_path):
    result, tables = predicted
    about = About("pseudonym-1", TIME, "patient-x", ("blurred",))
    paths = write_dicom_of(tmp_path / "dicom", tables / "s1.csv", result, "s1", about)
    assert [path.name for path in paths] == ["map-1.dcm", "report.dcm", "segmentation.dcm", "slide.dcm"]
    pixels = highdicom.imread(paths[0]).get_total_pixel_matrix()
    assert np.array_equal(pixels, read_scores(tables / "s1.csv").value_NC.reshape(4, 3).astype(np.float32))
    (group,) = highdicom.sr.srread(paths[1]).content.get_image_measurement_groups()
    verdict = result.answers.slides["s1"]
    numbers = {each.name.meaning: each.value for each in group.get_measurements()}
    classes = result.ensemble.tasks.main.classes
    for name, value, calibrated in zip(classes, verdict.prediction_P, verdict.decisions["label"].calibrated_C, strict=True):
        assert numbers[f"Probability of {name}"] == pytest.approx(value, abs=1e-12)
        assert numbers[f"Calibrated probability of {name}"] == pytest.approx(calibrated, abs=1e-12)
    texts = " ".join(str(item.value) for path in paths for item in pydicom.dcmread(path).iterall() if item.VR != "SQ")
    assert "pseudonym-1" in texts and "patient-x" in texts and result.ensemble.bundle.digest in texts
    assert "s1.png" not in texts and str(tmp_path) not in texts


def test_what_has_no_place_or_no_prediction_is_refused(predicted, tmp_path):
    result, tables = predicted
    with pytest.raises(SlideError, match="no place on a slide"):
        write_dicom_of(tmp_path / "dicom", tables / "nowhere.csv", result, "nowhere", About("x", TIME))
    with pytest.raises(SlideError, match="no prediction"):
        write_dicom_of(tmp_path / "dicom", tables / "lost.csv", result, "lost", About("x", TIME))


@pytest.mark.long
def test_a_slide_is_dicom_with_the_files_of_its_series(shared_data):
    folder = shared_data / "formats" / "dicom"
    boxes = sorted((folder / "boxes").glob("*.dcm"))
    assert dicom_sources(boxes[0]) == tuple(boxes) == dicom_sources(folder / "boxes")
    assert dicom_sources(shared_data / "formats" / "boxes.tiff") == ()
