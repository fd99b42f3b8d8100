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
from pathfm.mil.bundle import open_bundle
from pathfm.mil.controls import cross_fit, dealt_patients, tile_score
from pathfm.mil.ensemble import FoldPlaces, load_member
from pathfm.mil.feature_cache import FeatureCache
from pathfm.mil.inputs import Deploy
from pathfm.mil.predict import Ensemble, predict
from pathfm.mil.prediction_table import prediction_cells
from pathfm.mil.stage import run_mil
from pathfm.mil.tasks import make_tasks
from pathfm.mil_settings import MilSettings
from pathfm.models.cards import EncoderCard
from pathfm.models.slide_encoders import SlideEncoder, mean_vector
from pathfm.store.cohort import Cohort
from pathfm.store.commit import content_digest
from pathfm.store.feature_file import FeatureWriter, open_features, write_features
from pathfm.store.record import Outcome
from pathfm.study import ExtractSettings, TileSettings

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
    assert content["flow"]["slides"]["cohort"] == content["flow"]["slides"]["used"] == 48
    assert content["flow"]["patients"]["used"] == 24
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
    folds = json.loads((small.inputs.mil_dir / "splits.json").read_text())["folds"]
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
    test = json.loads((plain.inputs.mil_dir / "splits.json").read_text())["folds"][0]["test"]
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
    weights = []
    for name in ("plain", "turned"):
        study = planted(tmp_path / name, patients=18, slides_each=1, stores=False)
        if name == "turned":
            splits = json.loads((tmp_path / "plain" / "mil" / "splits.json").read_text())["folds"]
            test = splits[0]["test"]
            other = {"normal": "tumour", "tumour": "normal"}
            rows = tuple(
                replace(row, labels={"label": other[row.labels["label"]]}) if row.patient_id in test else row
                for row in study.cohort.rows
            )
            study.cohort = Cohort(rows, ("label",))
            shutil.copy(tmp_path / "plain" / "mil" / "splits.json", tmp_path / "splits.json")
        split = {"scheme": "file", "file": str(tmp_path / "splits.json")} if name == "turned" else {}
        run_mil(study.study(epochs=2, split=split), study.cohort, study.inputs)
        weights.append((study.inputs.mil_dir / "models" / "fold-0" / "member-0.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.long
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
    upstream |= {f"s012-{n}": Outcome(f"s012-{n}", "failed", "no such file") for n in range(2)}
    report = run_mil(study.study(), Cohort(rows, ("label",)), replace(study.inputs, upstream=upstream))
    counts = metrics(study.inputs.mil_dir)["flow"]["slides"]
    assert counts == {"cohort": 32, "no file": 1, "failed": 5, "empty": 1, "no label": 2, "used": 23}
    assert report.statuses == {"done": 23, "failed": 6, "empty": 3}
    reasons = {row["patient_id"]: row for row in table(study.inputs.mil_dir / "predictions.csv")}
    assert len(reasons) == 16
    assert reasons["p003"]["reason"] == ""
    assert reasons["p002"]["reason"].startswith("s002-0: failed, damaged feature file")
    assert reasons["p004"]["reason"].startswith("s004-0: failed, features that are not finite")
    assert reasons["p008"]["reason"] == "s008-0: failed, broken glass"
    assert (reasons["p004"]["slide_id"], reasons["p004"]["used"]) == ("s004-1", "1")
    assert (reasons["p006"]["slide_id"], reasons["p006"]["used"]) == ("s006-0;s006-1", "0")
    assert reasons["p003"]["slide_id"] == "s003-0;s003-1"
    labels = {row["patient_id"]: row["label"] for row in table(study.inputs.mil_dir / "patients.csv")}
    assert labels == {name: row["label"] for name, row in reasons.items()}
    assert labels["p008"] and labels["p012"] and not labels["p006"]


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
    with pytest.raises(StoreError, match="a control has no features"):
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
    assert metrics(small.base / "slides")["models"]["pretrained encoder"]["auroc"]["method"].startswith(
        "bootstrap over patients"
    )


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


def test_a_patient_with_anothers_features_is_refused_and_kept_on_one_side_if_asked(tmp_path):
    study = planted(tmp_path, patients=12, slides_each=1, stores=False)
    main = study.inputs.features_dirs["main"]
    file = open_features(main / "s003-0.h5")
    write_features(main / "s005-0.h5", file.features, file.coords, file.attrs)
    with pytest.raises(UsageError, match=r"same features: s003-0, s005-0 of patients p003, p005"):
        run_mil(study.study(epochs=1), study.cohort, study.inputs)
    assert not (study.inputs.mil_dir / "models").exists()
    run_mil(study.study(epochs=1, split={"leaks": "merge"}), study.cohort, study.inputs)
    for fold in json.loads((study.inputs.mil_dir / "splits.json").read_text())["folds"]:
        assert len({part for part, patients in fold.items() if {"p003", "p005"} & set(patients)}) == 1
    assert [leak["kind"] for leak in metrics(study.inputs.mil_dir)["leaks"]] == ["same features"]


def test_tiles_that_could_not_be_read_are_left_out_and_said(tmp_path):
    study = planted(tmp_path, patients=12, slides_each=1)
    path = study.inputs.features_dirs["main"] / "s003-0.h5"
    file = open_features(path)
    valid = np.ones(len(file.coords), dtype=bool)
    valid[1] = False
    with FeatureWriter(path, *file.features.shape, "float16", file.coords, file.attrs) as writer:
        writer.write(0, file.features, valid)
    run_mil(study.study(epochs=1), study.cohort, study.inputs)
    assert any(note.startswith("s003-0: 1 of ") for note in metrics(study.inputs.mil_dir)["notes"])
    rows = table(study.inputs.mil_dir / "attention" / "s003-0.csv")
    assert len(rows) == len(file.coords)
    assert [row["attention"] == "" for row in rows] == [not good for good in valid]


@pytest.mark.parametrize(
    ("mil", "columns", "metric"),
    [
        ({"label": "size", "kind": "regression"}, ["value"], "r2"),
        ({"label": "os", "time": "months", "event": "dead"}, ["risk"], "c_index"),
        ({"label": "grade", "order": ["1", "2", "3"]}, ["probability_1", "probability_2", "probability_3"], "kappa"),
        ({"label": "genes", "columns": ["braf", "kras"]}, ["probability_braf", "probability_kras"], "auroc"),
        ({"label": "label", "also": [{"label": "size", "kind": "regression"}]}, ["probability_normal", "size_value"], "auroc"),
    ],
)
def test_every_kind_of_task_goes_through_the_stage(small, mil, columns, metric):
    def labels(index):
        return {
            "label": "tumour" if index % 2 else "normal",
            "size": "" if index == 3 else f"{10 + 3 * (index % 2) + index / 10:.2f}",
            "months": str(40 - 10 * (index % 2) + index),
            "dead": str(int(index % 3 > 0)),
            "grade": str(1 + index % 3),
            "braf": str(index % 2),
            "kras": "" if index == 4 else str(index // 2 % 2),
        }

    rows = tuple(replace(row, labels=labels(int(row.patient_id[1:]))) for row in small.cohort.rows)
    cohort = Cohort(rows, tuple(labels(0)))
    deploy = Deploy(TileSettings(), ExtractSettings(encoder="timm:resnet10t.c3_in1k"), None)
    inputs = replace(small.into(f"task-{mil['label']}-{len(mil)}"), deploy=deploy)
    run_mil(small.study(controls=True, epochs=2, **mil), cohort, inputs)
    content = metrics(inputs.mil_dir)
    assert content["primary_metric"] == metric
    for model in content["models"].values():
        assert model[metric] is not None, model["notes"]
    said = table(inputs.mil_dir / "predictions.csv")
    assert all(row[column] for row in said for column in columns if row["used"] == "1")
    assert len(said) == len(table(inputs.mil_dir / "patients.csv")) == 24
    ensemble = Ensemble(open_bundle(inputs.mil_dir / "bundle"), torch.device("cpu"))
    paths = {row.slide_id: inputs.feature_file("main", row.slide_id) for row in rows[:3]}
    new = Cohort(tuple(replace(row, labels={}) for row in rows[:3]), ())
    with FeatureCache(0, small.base / "scratch") as cache:
        answers = predict(ensemble, paths, new, {row.slide_id: row.patient_id for row in rows}, cache)
    assert not answers.failed
    for verdict in answers.slides.values():
        cells = prediction_cells(ensemble, verdict)
        assert all(np.isfinite(float(cells[column])) for column in columns)
        assert cells["decision"] or ensemble.tasks.main.kind not in {"binary", "multiclass", "ordinal"}
    if "also" in mil:
        assert content["also"]["size"]["models"]["pretrained encoder"]["n_patients"] == 23


def test_a_slide_encoder_refuses_features_it_was_not_trained_on(small, monkeypatch):
    card = EncoderCard.__new__(EncoderCard)
    facts = {"name": "conchv1_5", "hub_id": "MahmoodLab/conchv1_5", "dim": 8, "tile_px": 512, "resize_px": 448, "mpp": (0.5,)}
    for name, value in facts.items():
        object.__setattr__(card, name, value)
    stand_in = SlideEncoder("titan", "titan 1", mean_vector, 8, card)
    monkeypatch.setattr("pathfm.mil.aggregators.pretrained.load_slide_encoder", lambda name, device: stand_in)
    inputs = small.into("titan")
    with pytest.raises(UsageError, match=r"titan was trained on features of conchv1_5, these are of main"):
        run_mil(small.study(aggregator="titan"), small.cohort, inputs)
    assert not (inputs.mil_dir / "models").exists()


def test_levels_above_the_bags_are_judged_too(small):
    rows = tuple(replace(row, specimen_id=f"{row.patient_id}-{row.slide_id[-1]}") for row in small.cohort.rows)
    inputs = small.into("levels")
    run_mil(small.study(level="slide", epochs=1), Cohort(rows, ("label",)), inputs)
    levels = metrics(inputs.mil_dir)["models"]["pretrained encoder"]["levels"]
    assert {name: level["n_bags"] for name, level in levels.items()} == {"patient": 24, "specimen": 48}
    assert len(table(inputs.mil_dir / "predictions.csv")) == 48
    assert len(table(inputs.mil_dir / "patients.csv")) == 24


def test_permutations_fractions_and_search_are_recorded(small):
    inputs = small.into("extras")
    numbers = {"permutations": 20, "label_fractions": [0.5], "subgroups": ["site"]}
    rows = tuple(replace(row, site="ab"[int(row.patient_id[1:]) // 2 % 2]) for row in small.cohort.rows)
    study = small.study(epochs=1, numbers=numbers, search={"lr": [1e-3, 1e-2]}, search_folds=2)
    run_mil(study, Cohort(rows, ("label",)), inputs)
    content = metrics(inputs.mil_dir)
    assert len(content["permutations"]["values"]) == 20
    assert [row["fraction"] for row in content["label_fractions"]] == [0.5, 1.0]
    assert content["label_fractions"][0]["n_patients"] < content["label_fractions"][1]["n_patients"]
    assert [(row["column"], row["value"], row["n_patients"]) for row in content["subgroups"]] == [
        ("site", "a", 12),
        ("site", "b", 12),
    ]
    assert [set(row["chosen"]) for row in content["search"]] == [{"lr"}] * 3
    assert not (inputs.mil_dir / "search").exists()


@pytest.mark.long
def test_the_hash_seed_of_python_changes_nothing(tmp_path):
    digests = []
    for seed in ("1", "2"):
        code = CRASH.format(tests=str(Path(__file__).parents[2]), base=str(tmp_path / seed))
        path = os.pathsep.join(sys.path)
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed}, check=True)
        digests.append(content_digest(tmp_path / seed / "mil"))
    assert digests[0] == digests[1]


CRASH = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from tests.mil.conftest import planted
study = planted(Path({base!r}), patients=12, slides_each=1, stores=False)
from pathfm.mil.stage import run_mil
run_mil(study.study(controls=True, ensemble=2, epochs=2), study.cohort, study.inputs)
"""


LONG = pytest.mark.long
MORE_POINTS = ("mil.stage.before_metrics", "store.commit.before_rename:6", "store.commit.before_rename:40")


@pytest.mark.parametrize("point", ["mil.member.before_commit:4", *(pytest.param(point, marks=LONG) for point in MORE_POINTS)])
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
    # Members of a fold are trained together: those of a fold that was not finished are made again.
    whole_folds = [fold for fold in folder.rglob("fold-*") if len(list(fold.glob("member-*.json"))) == 2]
    kept = {path: path.stat().st_mtime_ns for fold in whole_folds for path in fold.glob("member-*.json")}
    run_mil(killed.study(controls=True, ensemble=2, epochs=2), killed.cohort, replace(killed.inputs, mil_dir=folder))
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert content_digest(folder) == content_digest(whole.inputs.mil_dir)


def test_dealt_labels_keep_every_fold_balanced_and_stay_with_patients():
    stratum = {f"p{index}": "ab"[index % 2] for index in range(20)}
    parts = [[f"p{index}" for index in range(start, start + 5)] for start in range(0, 20, 5)]
    dealt = dealt_patients(stratum, parts, 0)
    assert any(stratum[source] != stratum[patient] for patient, source in dealt.items())
    for part in parts:
        assert sorted(dealt[patient] for patient in part) == sorted(part)
    assert dealt == dealt_patients(stratum, [part[::-1] for part in parts], 0)


def test_colour_tile_scores_average_to_the_decision_on_the_bag():
    rng = np.random.default_rng(0)
    bags = [rng.random((5, 4)) + index % 2 for index in range(8)]
    folds = [FoldPlaces((0, 1), (2, 3), (4, 5, 6, 7)), FoldPlaces((4, 5), (6, 7), (0, 1, 2, 3))]
    rows = [{"label": "ab"[index % 2]} for index in range(8)]
    for positive in ("a", "b"):
        tasks = make_tasks(MilSettings(positive=positive), rows)
        target = tasks.encode(rows)
        said, models = cross_fit(np.stack([bag.mean(axis=0) for bag in bags]), target, tasks, folds)
        for place, bag in enumerate(bags):
            model = models[0] if place >= 4 else models[1]
            score = tile_score(model, bag, tasks).mean()
            assert 1 / (1 + np.exp(-score)) == pytest.approx(said[place, tasks.main.positive])
