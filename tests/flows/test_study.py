"""A small study from slides to report: what it must contain, and what must never be in it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from tests.flows.conftest import STUDY, run

SECRET = "Mustermann-Erika-19610403"


def _rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cohort_table):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "study.yaml").write_text(STUDY.format(out="out", table=cohort_table))
    code, out, err = run("run", folder / "study.yaml")
    assert code == 0, err
    return folder / "out", out


def test_one_row_per_patient_and_numbers_with_intervals(finished, cohort_table):
    out, _ = finished
    patients = {row["patient_id"] for row in _rows(cohort_table)}
    rows = _rows(out / "mil" / "predictions.csv")
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
    rows = {row["slide_id"]: row for row in _rows(tmp_path / "new" / "predictions.csv")}
    assert len(rows) == 3
    assert rows["broken"]["outcome"] == "failed"
    used = [row for row in rows.values() if row["outcome"] == "predicted"]
    assert len(used) == 2
    for row in used:
        assert float(row["probability_lesion"]) + float(row["probability_normal"]) == pytest.approx(1, abs=1e-5)


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
        "extratags": [(315, "s", 0, SECRET, True)],
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
    assert len(files) > 10
    for path in files:
        data = path.read_bytes()
        assert SECRET.encode() not in data, path
        assert b"2001:02:03" not in data, path


def test_the_readmes_notebook_lines_run(finished):
    out, _ = finished
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    store = next((out / "tiles").glob("*/*.zarr"))
    features = next((out / "features").glob("*/pretrained-*")) / f"{store.stem}.h5"
    code = code.replace("out/tiles/224px-0.5mpp-6fe0/a01.zarr", str(store)).replace(
        "out/tiles/224px-0.5mpp-6fe0", str(store.parent)
    )
    code = code.replace("out/features/224px-0.5mpp-6fe0/pretrained-1a2b3c4d/a01.h5", str(features))
    names: dict[str, object] = {}
    exec(code, names)
    assert len(names["tiles"]) >= len(names["store"]) == len(names["features"].features) == len(names["sharp"])
    assert names["image"].shape == (3, 64, 64)


def test_the_exported_encoder_is_plain_timm(finished):
    import timm
    import torch

    from pathfm.models.encoders import load_encoder
    from pathfm.store.feature_file import open_features
    from pathfm.store.tile_store import open_tiles
    from pathfm.study import ExtractSettings

    out, _ = finished
    teacher = next((out / "encoder").glob("*/teacher"))
    model = timm.create_model(f"local-dir:{teacher}", pretrained=True).eval()
    store = open_tiles(next((out / "tiles").glob("*/*.zarr")))
    tiles = store.read(range(4))
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        tokens = model.forward_features((torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - mean) / std)
    plain = torch.cat([tokens[:, 0], tokens[:, model.num_prefix_tokens :].mean(1)], dim=1).numpy()
    ours = load_encoder(f"local-dir:{teacher}", ExtractSettings(input_px=64, precision="fp32"), torch.device("cpu"))(tiles)
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    kept = open_features(next((out / "features").glob("*/pretrained-*")) / f"{store.slide_id}.h5")
    np.testing.assert_allclose(kept.features[:4].astype(np.float32), plain, rtol=2e-3, atol=2e-3)


@pytest.mark.long
def test_a_patients_name_in_dicom_never_comes_out(shared_data, tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="pip install 'pathfm[dicom]'")
    source = shared_data / "formats" / "dicom" / "sm_image"
    files = [path for path in source.rglob("*") if path.is_file()]
    (tmp_path / "slides" / "series").mkdir(parents=True)
    for path in files:
        data = pydicom.dcmread(path)
        data.PatientName = data.PatientID = data.AccessionNumber = SECRET[:16]
        data.save_as(tmp_path / "slides" / "series" / path.name)
    options = ["--mpp", "native", "--tile-px", "16", "--set", "tile.tissue.method=off", "--set", "tile.filters.max_white=1.0"]
    code, out, err = run("tile", tmp_path / "slides", "--out", tmp_path / "out", *options)
    assert code == 0, err
    assert all(SECRET[:16].encode() not in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert SECRET[:16] not in out + err
