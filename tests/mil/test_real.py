"""The stage on real patients with true tile labels, with colours alone: what any encoder has to beat."""

import json

import cv2
import numpy as np
import pytest

from pathfm.mil.stage import MilInputs, run_mil
from pathfm.store.cohort import load_cohort
from pathfm.store.feature_file import write_features
from pathfm.store.tile_store import open_tiles, write_tiles
from pathfm.study import Study


@pytest.mark.long
def test_colours_alone_tell_helicobacter_as_well_as_is_known(shared_data, tmp_path):
    data = shared_data / "hpylori"
    labels = {"table": str(data / "cohort.csv"), "tile_labels": str(data / "tile_labels.csv")}
    mil = {"ensemble": 1, "split": {"leaks": "merge"}}  # two pairs of patients share tiles
    study = Study.model_validate({"cohort": labels, "compute": {"device": "cpu"}, "mil": mil})
    cohort = load_cohort(study.cohort, tmp_path)
    for row in cohort.rows:
        files = sorted(row.path.glob("*.jpg"))
        images = np.stack([cv2.imread(str(file))[:, :, ::-1] for file in files])
        write_tiles(
            tmp_path / f"{row.slide_id}.zarr", images, slide_id=row.slide_id, mpp=None, source_names=[f.name for f in files]
        )
        rows = [np.bincount((image // 64 @ [16, 4, 1]).ravel(), minlength=64) / image[..., 0].size for image in images]
        coords = open_tiles(tmp_path / f"{row.slide_id}.zarr").xy_level0
        write_features(
            tmp_path / "colour" / f"{row.slide_id}.h5", np.sqrt(rows).astype(np.float32), coords, {"fingerprint": "f"}
        )
    folders = {"main": tmp_path / "colour", "colour": tmp_path / "colour"}
    run_mil(study, cohort, MilInputs(folders, tmp_path, tmp_path / "mil", {}, "colours", "f"))
    models = json.loads((tmp_path / "mil" / "metrics.json").read_text())["models"]
    assert models["colour histogram"]["auroc"]["value"] > 0.78
    assert models["colours"]["localisation_auroc"]["value"] > 0.85
    assert models["colours"]["localisation_auroc"]["n_slides"] == 40
    assert 0.35 < models["shuffled labels"]["auroc"]["value"] < 0.65
