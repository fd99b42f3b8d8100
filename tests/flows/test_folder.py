"""An output folder keeps its study: moved, given labels later, used for predictions, with slides that change."""

from __future__ import annotations

import csv
import shutil

import pytest

from tests.flows.conftest import run

ENCODER = "untrained:resnet10t"
OPTIONS = ["--tile-px", "64", "--set", "tile.tissue.min_area_um2=500"]
SMALL = "folds: 2, ensemble: 1, epochs: 2, numbers.bootstrap: 20, hidden: 8, attention: 4"


def _mil(*arguments):
    settings = [part for pair in SMALL.split(", ") for part in ("--set", "mil." + pair.replace(": ", "="))]
    return run("mil", "train", *arguments, *settings, "--set", "mil.positive=lesion", "--set", "report.heatmaps=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cohort_table):
    folder = tmp_path_factory.mktemp("trained")
    table = folder / "cohort.csv"
    rows = list(csv.DictReader(cohort_table.read_text().splitlines()))
    slides = folder / "slides"
    shutil.copytree(cohort_table.parent / "slides", slides)
    lines = [f"{row['slide_id']},{slides / row['path'].split('/')[-1]},{row['patient_id']},{row['label']}" for row in rows]
    table.write_text("\n".join(["slide_id,path,patient_id,label", *lines]) + "\n")
    assert run("tile", slides, "--out", folder / "out", *OPTIONS)[0] == 0
    assert run("extract", folder / "out", "--encoder", ENCODER, "--set", "extract.input_px=32")[0] == 0
    code, out, err = run("tile", table, "--out", folder / "out")
    assert code == 0, err
    assert "12 done" in out  # other slide ids, the same settings
    assert run("extract", folder / "out")[0] == 0
    code, _, err = _mil(folder / "out")
    assert code == 0, err
    return folder


@pytest.mark.long
def test_a_table_that_comes_later_keeps_the_settings(trained):
    specs = [path.name for path in (trained / "out" / "tiles").iterdir()]
    assert len(specs) == 1
    assert specs[0].startswith("64px-")


@pytest.mark.long
def test_predictions_use_the_training_settings_whatever_was_run_since(trained, tmp_path):
    slide = next((trained / "slides").glob("*.tiff"))
    assert run("mil", "predict", trained / "out", slide, "--out", tmp_path / "one")[0] == 0
    shutil.copytree(trained / "out", tmp_path / "out")
    assert run("tile", tmp_path / "out", "--set", "tile.mpp=1.0", "--set", "extract.encoder=pretrained")[0] in {0, 3}
    code, _, err = run("mil", "predict", tmp_path / "out", slide, "--out", tmp_path / "two")
    assert code == 0, err
    assert (tmp_path / "one" / "predictions.csv").read_text() == (tmp_path / "two" / "predictions.csv").read_text()


@pytest.mark.long
def test_predictions_never_go_into_a_study(trained):
    slide = next((trained / "slides").glob("*.tiff"))
    before = (trained / "out" / "study.yaml").read_text()
    code, _, err = run("mil", "predict", trained / "out", slide, "--out", trained / "out")
    assert code == 2
    assert "a study of its own" in err
    assert (trained / "out" / "study.yaml").read_text() == before


@pytest.mark.long
def test_a_batch_of_bad_slides_alone_still_gets_its_rows(trained, tmp_path):
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    code, _, err = run("mil", "predict", trained / "out", tmp_path / "bad.svs", "--out", tmp_path / "new")
    assert code == 3, err
    assert "bad,,failed" in (tmp_path / "new" / "predictions.csv").read_text()


@pytest.mark.long
def test_a_copied_folder_works_on_itself(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "copy")
    before = sorted(path.name for path in (trained / "out" / "features").rglob("*"))
    code, _, err = run("extract", tmp_path / "copy", "--set", "extract.input_px=64")
    assert code == 0, err
    assert sorted(path.name for path in (trained / "out" / "features").rglob("*")) == before


@pytest.mark.long
def test_a_slide_whose_mpp_changed_is_not_used_until_it_is_tiled_again(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    table = tmp_path / "cohort.csv"
    header, first, *rest = (trained / "cohort.csv").read_text().splitlines()
    table.write_text("\n".join([header + ",mpp", first + ",0.9", *(line + "," for line in rest)]) + "\n")
    code, _, err = run("extract", tmp_path / "out", "--set", f"cohort.table={table}")
    assert code == 3
    assert "its tiles are stale" in err


@pytest.mark.long
def test_a_failed_command_changes_no_settings(trained):
    before = (trained / "out" / "study.yaml").read_text()
    assert run("extract", trained / "out", "--encoder", "untrained:nonsense")[0] == 2
    assert _mil(trained / "out", "--set", "mil.label=nonsense")[0] == 2
    assert (trained / "out" / "study.yaml").read_text() == before


@pytest.mark.long
def test_reasons_carry_no_paths(trained, tmp_path):
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "bad.svs").write_bytes(b"no slide")
    assert run("tile", tmp_path / "slides", "--out", tmp_path / "out")[0] == 3
    record = next((tmp_path / "out").rglob("record.json")).read_text()
    assert "bad" in record
    assert str(tmp_path) not in record


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, cohort_table):
    (tmp_path / "file").touch()
    code, _, err = run("tile", cohort_table.parent / "slides", "--out", tmp_path / "file" / "out")
    assert code == 2
    assert "Traceback" not in err
