"""The whole stage on a planted study: honest, repeatable, resumable."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from pathfm.errors import StoreError, UsageError
from pathfm.mil.controls import colour_baseline, shuffled_labels
from pathfm.mil.ensemble import Experiment, FoldPlaces, kept_or_fitted, load_member
from pathfm.mil.fit import Bags
from pathfm.mil.predict import predict
from pathfm.mil.stage import run_mil
from pathfm.store.cohort import Cohort
from pathfm.store.commit import content_digest
from pathfm.store.feature_file import open_features, write_features
from pathfm.store.record import Outcome
from pathfm.study import MilSettings

from .conftest import planted

CONTROLS = {"colour histogram", "tile count", "untrained encoder", "shuffled labels"}


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def table(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def finished(small):
    """The small study, run once with all controls."""
    report = run_mil(small.study(controls=True, ensemble=2), small.cohort, small.inputs)
    return small, report


def test_everything_of_the_folder_is_there(finished):
    small, report = finished
    folder = small.inputs.mil_dir
    assert report.statuses == {"done": 48}
    content = metrics(folder)
    assert set(content["models"]) == {"pretrained encoder", *CONTROLS}
    assert (content["primary"], content["positive"], content["n_slides"], content["n_patients"]) == (
        "pretrained encoder",
        "tumour",
        48,
        24,
    )
    assert content["flow"]["cohort"] == content["flow"]["used"] == 48
    for model in content["models"].values():
        for name in ("auroc", "balanced_accuracy"):
            assert 0 <= model[name]["low"] <= model[name]["value"] <= model[name]["high"] <= 1
    assert content["models"]["pretrained encoder"]["localisation_auroc"]["n_slides"] == 24
    assert content["models"]["shuffled labels"]["localisation_auroc"] is None
    assert len(list((folder / "attention").iterdir())) == 48
    assert sorted(json.loads((folder / "top_tiles.json").read_text())) == ["s000-0", "s001-0"]
    assert sorted(path.stem for path in (folder / "heatmaps").iterdir()) == ["s000-0", "s001-0"]
    assert {row["model"] for row in table(folder / "curves.csv")} == {
        "pretrained encoder",
        "untrained encoder",
        "shuffled labels",
    }
    assert {row["model"] for row in table(folder / "roc.csv")} == set(content["models"])


def test_attention_sums_to_one_over_all_slides_of_a_patient(finished):
    folder = finished[0].inputs.mil_dir / "attention"
    total = sum(float(row["attention"]) for number in (0, 1) for row in table(folder / f"s001-{number}.csv"))
    assert total == pytest.approx(1, abs=1e-5)
    assert {row["lesion"] for row in table(folder / "s001-0.csv")} == {"0", "1"}
    assert table(folder / "s001-0.csv")[0]["source_name"] == "s001-0_0.png"


def test_predictions_have_a_row_per_patient_from_the_fold_that_did_not_see_it(finished):
    small = finished[0]
    rows = table(small.inputs.mil_dir / "predictions.csv")
    folds = json.loads((small.inputs.mil_dir / "folds.json").read_text())["folds"]
    assert [row["patient_id"] for row in rows] == [f"p{index:03d}" for index in range(24)]
    for row in rows:
        assert row["patient_id"] in folds[int(row["fold"])]["test"]
        assert float(row["probability_normal"]) + float(row["probability_tumour"]) == pytest.approx(1)


def test_rerun_keeps_everything_and_threads_or_workers_change_nothing(finished):
    small, _ = finished
    study = small.study(controls=True, ensemble=2)
    before = content_digest(small.inputs.mil_dir)
    assert run_mil(study, small.cohort, small.inputs).did_nothing
    other = study.model_copy(update={"compute": study.compute.model_copy(update={"workers": 3, "threads": 2})})
    assert run_mil(other, small.cohort, small.into("again")).statuses == {"done": 48}
    assert content_digest(small.base / "again") == content_digest(small.inputs.mil_dir) == before


def test_unsorted_table_gives_same_result(small, finished):
    rows = list(small.cohort.rows)
    random.Random(5).shuffle(rows)
    run_mil(small.study(controls=True, ensemble=2), Cohort(tuple(rows), ("label",)), small.into("shuffled"))
    assert content_digest(small.base / "shuffled") == content_digest(small.inputs.mil_dir)


def test_test_fold_is_never_used_for_early_stopping_or_standardisation(tmp_path):
    # Other features of one fold's test patients: the networks of that fold must not change by a bit, those of others must.
    plain = planted(tmp_path / "plain", patients=18, slides_each=1, stores=False)
    run_mil(plain.study(), plain.cohort, plain.inputs)
    strange = planted(tmp_path / "strange", patients=18, slides_each=1, stores=False)
    test = json.loads((plain.inputs.mil_dir / "folds.json").read_text())["folds"][0]["test"]
    for row in strange.cohort.rows:
        if row.patient_id in test:
            path = strange.inputs.features_dirs["main"] / f"{row.slide_id}.h5"
            kept = open_features(path)
            write_features(path, kept.features * 3 + 1, kept.coords, kept.attrs)
    run_mil(strange.study(), strange.cohort, strange.inputs)
    same = [
        len({(study.inputs.mil_dir / f"models/fold-{fold}/member-0.safetensors").read_bytes() for study in (plain, strange)})
        == 1
        for fold in range(3)
    ]
    assert same == [True, False, False]


def test_test_labels_have_no_say_in_training(tmp_path):
    draw = torch.Generator().manual_seed(0)
    bags = tuple(torch.randn(5, 4, generator=draw) for _ in range(12))
    fold = FoldPlaces((0, 1, 2, 3, 4, 5), (6, 7), (8, 9, 10, 11))
    weights = []
    for number, test_labels in enumerate([(0, 1, 0, 1), (1, 1, 1, 0)]):
        labels = Bags(bags, (0, 1, 0, 1, 0, 1, 0, 1, *test_labels))
        settings = MilSettings(hidden=8, attention=4, epochs=4)
        experiment = Experiment("m", tmp_path / str(number), labels, ("digest",) * 12, settings, {"classes": ["a", "b"]}, "x")
        kept_or_fitted(experiment, fold, 0, 0)
        weights.append((tmp_path / str(number) / "fold-0" / "member-0.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_planted_signal_is_found_and_located_and_the_controls_are_not_fooled(tmp_path):
    study = planted(tmp_path, patients=100, slides_each=1, seed=3)
    run_mil(study.study(controls=True, folds=5, epochs=30, lr=3e-3), study.cohort, study.inputs)
    models = metrics(study.inputs.mil_dir)["models"]
    main = models["pretrained encoder"]
    assert main["auroc"]["value"] >= 0.9
    assert main["localisation_auroc"]["value"] >= 0.9
    for name in CONTROLS:
        assert models[name]["auroc"]["low"] < 0.5 < models[name]["auroc"]["high"] + 0.05, name


def test_slides_that_drop_out_are_counted_and_their_patients_keep_a_row(tmp_path):
    study = planted(tmp_path, patients=16, slides_each=2, stores=False)
    main = study.inputs.features_dirs["main"]
    (main / "s000-0.h5").unlink()
    (main / "s002-0.h5").write_bytes(b"damaged")
    with h5py.File(main / "s004-0.h5", "r+") as file:
        file["features"][0, 0] = np.nan
    rows = tuple(
        replace(row, labels={"label": ""}) if row.slide_id in ("s006-0", "s006-1") else row for row in study.cohort.rows
    )
    upstream = {"s008-0": Outcome("s008-0", "failed", "broken glass"), "s010-0": Outcome("s010-0", "empty", "no tissue")}
    report = run_mil(study.study(), Cohort(rows, ("label",)), replace(study.inputs, upstream=upstream))
    counts = metrics(study.inputs.mil_dir)["flow"]
    assert counts == {"cohort": 32, "no file": 1, "failed": 3, "empty": 1, "no label": 2, "used": 25}
    assert report.statuses == {"done": 25, "failed": 4, "empty": 3}
    reasons = {row["patient_id"]: row for row in table(study.inputs.mil_dir / "predictions.csv")}
    assert len(reasons) == 16
    assert reasons["p003"]["reason"] == ""
    assert reasons["p002"]["reason"].startswith("s002-0: failed, damaged feature file")
    assert reasons["p004"]["reason"].startswith("s004-0: failed, features that are not finite")
    assert reasons["p008"]["reason"] == "s008-0: failed, broken glass"
    assert (reasons["p004"]["slide_id"], reasons["p004"]["used"]) == ("s004-1", "1")
    assert (reasons["p006"]["slide_id"], reasons["p006"]["used"]) == ("s006-0;s006-1", "0")
    assert reasons["p003"]["slide_id"] == "s003-0;s003-1"


def test_features_of_different_length_or_encoder_are_refused(tmp_path):
    study = planted(tmp_path, patients=12, slides_each=1, stores=False)
    path = study.inputs.features_dirs["main"] / "s004-0.h5"
    file = open_features(path)
    attrs = {"fingerprint": "f", "recipe_encoder": "main", "recipe_weights_sha256": "main"}
    write_features(path, file.features[:, :5], file.coords, attrs)
    with pytest.raises(StoreError, match=r"different lengths \(5, 8\): s004-0"):
        run_mil(study.study(), study.cohort, study.inputs)
    write_features(path, file.features, file.coords, {**attrs, "recipe_weights_sha256": "other"})
    with pytest.raises(StoreError, match="different encoders: s004-0"):
        run_mil(study.study(), study.cohort, study.inputs)


def test_controls_must_have_the_tiles_of_the_main_features(tmp_path):
    study = planted(tmp_path, patients=12, slides_each=1, stores=False)
    (study.inputs.features_dirs["colour"] / "s004-0.h5").unlink()
    with pytest.raises(StoreError, match="no feature file"):
        run_mil(study.study(controls=True), study.cohort, study.inputs)


def test_several_slides_of_a_patient_stay_in_one_fold_at_slide_level(small):
    run_mil(small.study(level="slide"), small.cohort, small.into("slides"))
    rows = table(small.base / "slides" / "predictions.csv")
    assert len(rows) == 48
    folds = {}
    for row in rows:
        folds.setdefault(row["patient_id"], set()).add(row["fold"])
    assert all(len(found) == 1 for found in folds.values())
    # Slides of a patient are not independent, so their AUROC gets no DeLong interval.
    assert metrics(small.base / "slides")["models"]["pretrained encoder"]["auroc"]["method"] == "bootstrap over patients"


def test_three_classes_work(tmp_path):
    study = planted(tmp_path, patients=18, slides_each=1, stores=False)
    names = "abc"
    rows = tuple(replace(row, labels={"label": names[index % 3]}) for index, row in enumerate(study.cohort.rows))
    run_mil(study.study(controls=True), Cohort(rows, ("label",)), study.inputs)
    content = metrics(study.inputs.mil_dir)
    assert content["classes"] == ["a", "b", "c"]
    assert any("mean over classes" in note for note in content["notes"])


def test_fewer_folds_or_members_leave_no_old_networks(tmp_path):
    study = planted(tmp_path, patients=12, slides_each=1, stores=False)
    run_mil(study.study(folds=3, ensemble=2, epochs=1), study.cohort, study.inputs)
    run_mil(study.study(folds=2, ensemble=1, epochs=1), study.cohort, study.inputs)
    assert len(list(study.inputs.mil_dir.glob("models/*/*.safetensors"))) == 2


def test_too_few_patients_is_said_before_anything_is_trained(tmp_path):
    study = planted(tmp_path, patients=4, slides_each=1, stores=False)
    with pytest.raises(UsageError, match="normal: 2, tumour: 2"):
        run_mil(study.study(), study.cohort, study.inputs)
    assert not study.inputs.mil_dir.exists()


def test_predict_asks_all_networks_and_refuses_foreign_features(finished, tmp_path):
    small = finished[0]
    main = small.inputs.features_dirs["main"]
    rows = predict(small.inputs.mil_dir, [main / "s001-0.h5", main / "s000-1.h5"])
    assert [row.slide_id for row in rows] == ["s001-0", "s000-1"]
    for row in rows:
        assert sum(row.probability.values()) == pytest.approx(1)
        assert row.lowest <= row.probability["tumour"] <= row.highest
    with pytest.raises(StoreError, match="another encoder"):
        predict(small.inputs.mil_dir, [small.inputs.features_dirs["untrained"] / "s001-0.h5"])
    with pytest.raises(StoreError, match="6 features per tile"):
        predict(small.inputs.mil_dir, [small.inputs.features_dirs["colour"] / "s001-0.h5"])
    with pytest.raises(StoreError, match="no finished networks"):
        predict(tmp_path, [main / "s001-0.h5"])


def test_a_changed_weight_file_is_noticed(finished, tmp_path):
    copy = shutil.copytree(finished[0].inputs.mil_dir / "models", tmp_path / "models")
    path = copy / "fold-0" / "member-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match="not those that were saved"):
        load_member(path)


def test_saved_networks_name_no_machine_path(finished):
    small = finished[0]
    for path in small.inputs.mil_dir.rglob("*.json"):
        if path.name != "record.json":
            assert str(small.base) not in path.read_text()


CRASH = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from tests.mil.conftest import planted
study = planted(Path({base!r}), patients=12, slides_each=1, stores=False)
from pathfm.mil.stage import run_mil
run_mil(study.study(controls=True, ensemble=2, epochs=2), study.cohort, study.inputs)
"""


@pytest.mark.parametrize("point", ["mil.member.before_commit:4", "mil.stage.before_metrics", "store.commit.before_rename:6"])
def test_killed_run_goes_on_and_ends_the_same(tmp_path, point):
    whole = planted(tmp_path / "whole", patients=12, slides_each=1, stores=False)
    run_mil(whole.study(controls=True, ensemble=2, epochs=2), whole.cohort, whole.inputs)
    code = CRASH.format(tests=str(Path(__file__).parents[2]), base=str(tmp_path / "killed"))
    # Writing the inputs commits files too; the crash point is armed for the stage only.
    code = code.replace("from pathfm.mil.stage", f"import os; os.environ['PATHFM_CRASH_AT'] = {point!r}\nfrom pathfm.mil.stage")
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    killed = planted(tmp_path / "again", patients=12, slides_each=1, stores=False)
    folder = tmp_path / "killed" / "mil"
    assert not (folder / "metrics.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("member-*.json")}
    run_mil(killed.study(controls=True, ensemble=2, epochs=2), killed.cohort, replace(killed.inputs, mil_dir=folder))
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert content_digest(folder) == content_digest(whole.inputs.mil_dir)


def test_shuffled_labels_keep_every_fold_balanced_and_stay_with_patients():
    stratum = {f"p{index}": "ab"[index % 2] for index in range(20)}
    parts = [[f"p{index}" for index in range(start, start + 5)] for start in range(0, 20, 5)]
    shuffled = shuffled_labels(stratum, parts, 0)
    assert shuffled != stratum
    for part in parts:
        assert sorted(shuffled[patient] for patient in part) == sorted(stratum[patient] for patient in part)
    assert shuffled == shuffled_labels(stratum, [part[::-1] for part in parts], 0)


def test_colour_tile_scores_average_to_the_decision_on_the_bag():
    rng = np.random.default_rng(0)
    bags = [rng.random((5, 4)) + index % 2 for index in range(8)]
    folds = [FoldPlaces((0, 1), (2, 3), (4, 5, 6, 7)), FoldPlaces((4, 5), (6, 7), (0, 1, 2, 3))]
    for positive in (0, 1):
        found = colour_baseline(bags, [0, 1] * 4, folds, positive)
        for place, score in enumerate(found.tile_score):
            assert 1 / (1 + np.exp(-score.mean())) == pytest.approx(found.probability_BC[place, positive])
