"""External validation judges what a bundle says of labelled slides, and changes nothing about the bundle."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pathfm.mil.bundle import open_bundle, write_bundle
from pathfm.mil.feature_cache import FeatureCache
from pathfm.mil.judging import judge
from pathfm.mil.predict import Ensemble, predict
from pathfm.mil.prediction_table import Known, Result, flow
from pathfm.mil.seen import Seen
from pathfm.mil.validation import MODEL, headline, validation_metrics
from pathfm.mil_settings import MilSettings, NumberSettings
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.store.record import Outcome

from .bundles import SETTINGS, facts_in
from .test_predict import feature_file

NUMBERS = NumberSettings(bootstrap=30)


def answered(folder, level="patient", label_of=lambda patient, slide: "tumour" if patient % 2 else "normal"):
    """Six patients with two slides each, asked about."""
    settings = MilSettings(**{**SETTINGS.model_dump(), "level": level, "numbers": NUMBERS.model_dump()})
    write_bundle(folder / "bundle", facts_in(folder, settings))
    ensemble = Ensemble(open_bundle(folder / "bundle"), torch.device("cpu"))
    rows, paths, patients = [], {}, {}
    for patient in range(6):
        for slide in range(2):
            slide_id = f"s{patient}{slide}"
            labels = {"label": label_of(patient, slide)}
            rows.append(SlideRow(slide_id, folder / slide_id, patient_id=f"n{patient}", labels=labels))
            paths[slide_id], patients[slide_id] = feature_file(folder, slide_id, count=12), f"n{patient}"
    with FeatureCache(1 << 20, folder / "scratch") as cache:
        return ensemble, predict(ensemble, paths, Cohort(tuple(rows), ("label",)), patients, cache)


def test_numbers_are_those_of_the_predictions(tmp_path):
    ensemble, answers = answered(tmp_path)
    metrics = validation_metrics(ensemble, answers, ())
    prediction_BP = np.stack([verdict.prediction_P for verdict in answers.units])
    target_BT = np.array([[float(number % 2)] for number in range(6)])
    wanted = judge(ensemble.tasks.main, prediction_BP, target_BT, [f"n{number}" for number in range(6)], NUMBERS, 0)
    assert metrics["models"][MODEL] == wanted
    assert (metrics["n_patients"], metrics["n_slides"], metrics["kind"], metrics["positive"]) == (6, 12, "binary", "tumour")
    assert headline(metrics).startswith("auroc ")


def test_thresholds_are_locked_and_counted_on_patients(tmp_path):
    ensemble, answers = answered(tmp_path)
    before = ensemble.bundle.digest
    trust = validation_metrics(ensemble, answers, ())["trust"]
    locked = ensemble.bundle.facts["trust"]["label"]
    assert trust["operating_points"][0]["threshold"] == locked["points"][0]["threshold"]
    assert trust["operating_points"][0]["sensitivity"]["count"] == 3
    called = [v.prediction_P[1] >= locked["points"][0]["threshold"] for u, v in zip(answers.order, answers.units, strict=True)]
    hits = sum(is_called for is_called, unit in zip(called, answers.order, strict=True) if unit.labels["label"] == "tumour")
    assert trust["operating_points"][0]["sensitivity"]["hits"] == hits
    assert trust["conformal"]["coverage"]["count"] == 6
    assert open_bundle(ensemble.bundle.folder).digest == before
    json.dumps(validation_metrics(ensemble, answers, ()), allow_nan=False)


def test_patients_who_are_left_out_or_have_no_label_are_not_counted(tmp_path):
    ensemble, answers = answered(tmp_path, label_of=lambda patient, slide: ["normal", "tumour", ""][patient % 3])
    assert validation_metrics(ensemble, answers, ())["n_patients"] == 4
    assert validation_metrics(ensemble, answers, {"n0"})["models"][MODEL]["n_patients"] == 3


def test_late_fusion_counts_slides_but_trusts_patients(tmp_path):
    ensemble, answers = answered(tmp_path, level="slide")
    metrics = validation_metrics(ensemble, answers, ())
    assert (metrics["models"][MODEL]["n_bags"], metrics["models"][MODEL]["n_patients"]) == (12, 6)
    assert metrics["trust"]["unit"] == "patient" and metrics["trust"]["conformal"]["coverage"]["count"] == 6
    assert metrics["models"][MODEL]["levels"]["patient"]["n_bags"] == 6
    torn = answered(tmp_path / "torn", "slide", lambda patient, slide: "tumour" if slide else "normal")
    torn_metrics = validation_metrics(*torn, ())
    assert torn_metrics["trust"]["unit"] == "bag" and "refused" in torn_metrics["models"][MODEL]["levels"]["patient"]


def test_what_is_said_of_a_patient_rests_on_all_slides_whichever_has_the_label(tmp_path):
    def once(patient, slide):
        return "" if slide else "tumour" if patient % 2 else "normal"

    whole, late = answered(tmp_path / "whole", "slide"), answered(tmp_path / "late", "slide", once)
    wanted, found = validation_metrics(*whole, ()), validation_metrics(*late, ())
    assert found["trust"] == wanted["trust"] and found["trust"]["unit"] == "patient"
    assert found["models"][MODEL]["levels"] == wanted["models"][MODEL]["levels"]
    assert (found["models"][MODEL]["n_bags"], found["n_slides"], found["n_patients"]) == (6, 6, 6)
    said = late[1].of_patients(late[0])
    target = [float(name == "tumour") for name in (once(number, 0) for number in range(6))]
    brier = np.mean([(said[f"n{number}"].prediction_P[1] - target[number]) ** 2 for number in range(6)])
    assert found["models"][MODEL]["levels"]["patient"]["brier"]["value"] == pytest.approx(brier)


@pytest.mark.parametrize(("level", "used"), [("patient", 12), ("slide", 6)])
def test_the_flow_counts_the_slides_that_the_numbers_rest_on(tmp_path, level, used):
    ensemble, answers = answered(tmp_path, level, lambda patient, slide: "" if slide else "normal")
    patients = {slide_id: f"n{slide_id[1]}" for slide_id in answers.slides}
    label_of = {slide_id: "normal" if slide_id.endswith("0") else "" for slide_id in patients}
    rows = [SlideRow(name, tmp_path / name, patient_id=patients[name], labels={"label": label_of[name]}) for name in patients]
    known = Known(patients, dict.fromkeys(patients, "hash"), {}, has_labels=True)
    done = {name: Outcome(name, "done") for name in patients}
    result = Result(Cohort(tuple(rows)), tmp_path, ensemble, known, Seen("mark", False, patients), answers, done)
    counts = flow(result, ())
    assert counts["slides"]["used"] == used == validation_metrics(ensemble, answers, ())["n_slides"]
    assert counts["slides"]["no label"] == 12 - used and counts["patients"]["used"] == 6


@pytest.mark.parametrize("label", ["normal", ""])
def test_one_class_or_none_is_said_and_not_invented(tmp_path, label):
    ensemble, answers = answered(tmp_path, label_of=lambda patient, slide: label)
    metrics = validation_metrics(ensemble, answers, ())
    said = metrics["models"].get(MODEL, {}).get("auroc") or {"value": None}
    assert said["value"] is None
    assert "not known" in headline(metrics)
