"""A small study from slides to report: what it must contain, and what must never be in it."""

from __future__ import annotations

import csv
import json

import cv2
import numpy as np
import pytest
import tifffile

from tests.flows.conftest import STUDY, run

SECRET = "Mustermann-Erika-19610403"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cohort_table):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "study.yaml").write_text(STUDY.format(out="out", table=cohort_table))
    code, out, err = run("run", folder / "study.yaml")
    assert code == 0, err
    return folder / "out", out


def test_one_row_per_patient_and_numbers_with_intervals(finished, cohort_table):
    out, _ = finished
    patients = {row["patient_id"] for row in csv.DictReader(cohort_table.open())}
    rows = list(csv.DictReader((out / "mil" / "predictions.csv").open()))
    assert {row["patient_id"] for row in rows} == patients
    summary = json.loads((out / "report" / "summary.json").read_text())
    assert summary["n_slides"] == 12
    assert summary["auroc_low"] <= summary["auroc"] <= summary["auroc_high"]
    assert set(summary["controls"]) == {"colour histogram", "tile count", "untrained encoder", "shuffled labels"}
    assert "index.html" in {path.name for path in (out / "report").iterdir()}


def test_predicting_new_slides_with_the_trained_networks(finished, cohort_table, tmp_path):
    out, _ = finished
    slides = sorted((cohort_table.parent / "slides").glob("*.tiff"))[:2]
    (tmp_path / "broken.tiff").write_bytes(b"no slide")
    code, _, err = run("mil", "predict", out, *slides, tmp_path / "broken.tiff", "--out", tmp_path / "new")
    assert code == 3, err
    rows = {row["slide_id"]: row for row in csv.DictReader((tmp_path / "new" / "predictions.csv").open())}
    assert len(rows) == 3
    assert rows["broken"]["outcome"] == "failed"
    used = [row for row in rows.values() if row["outcome"] == "predicted"]
    assert len(used) == 2
    assert all(float(row["p_lesion"]) + float(row["p_normal"]) == pytest.approx(1, abs=1e-5) for row in used)


def test_inspect_knows_every_artifact(finished):
    out, _ = finished
    store, features = next((out / "tiles").glob("*/*.zarr")), next((out / "features").glob("*/pretrained-*/*.h5"))
    for path in (out, store, features, next((out / "encoder").glob("*/teacher")), out / "study.yaml"):
        code, said, err = run("inspect", path)
        assert code == 0, err
        assert len(said.splitlines()) >= 3


def test_names_in_a_file_never_come_out(tmp_path):
    picture = cv2.GaussianBlur(np.random.default_rng(0).integers(60, 200, (512, 512, 3), dtype=np.uint8), (0, 0), 2)
    description = f"Aperio Image Library|AppMag = 20|MPP = 0.5|User = {SECRET}|Patient = {SECRET}|Barcode = {SECRET}"
    (tmp_path / "slides").mkdir()
    options = {
        "description": description,
        "metadata": None,
        "software": SECRET,
        "artist": SECRET,
        "datetime": "2001:02:03 04:05:06",
    }
    tifffile.imwrite(tmp_path / "slides" / "a.tif", picture, tile=(256, 256), photometric="rgb", **options)
    (tmp_path / "slides" / "png").mkdir()
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", SECRET)
    Image.fromarray(picture).save(tmp_path / "slides" / "png" / "b.png", pnginfo=info)
    settings = ["--mpp", "native", "--tile-px", "64", "--set", "tile.tissue.method=off"]
    code, out, err = run("tile", tmp_path / "slides", "--out", tmp_path / "out", *settings)
    assert code == 0, err
    assert SECRET not in out + err
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        data = path.read_bytes()
        assert SECRET.encode() not in data, path
        assert b"2001:02:03" not in data, path
