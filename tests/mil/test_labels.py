"""Whose a label is, and how it is written beside the answers: of patients, specimens and slides, whatever they are called."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pathfm.classification import check_for_mil
from pathfm.errors import UsageError
from pathfm.mil.roster import Absence, has_label, labelled_slides, make_units, patient_ids, said_label, said_labels
from pathfm.mil.stage import run_mil
from pathfm.mil_settings import MilSettings, TaskSettings
from pathfm.report.mil_predictions import risks
from pathfm.report.results import read_mil
from pathfm.store.cohort import Cohort
from pathfm.study import CohortSettings

from .conftest import planted

SMALL = {"folds": 2, "epochs": 1}


@pytest.fixture(scope="module")
def two_each(tmp_path_factory):
    """14 patients with two slides each; features only."""
    return planted(tmp_path_factory.mktemp("labels"), patients=14, stores=False)


def relabelled(study, change):
    """The cohort with other rows."""
    rows = tuple(change(place, row) for place, row in enumerate(study.cohort.rows))
    return Cohort(rows, tuple(rows[0].labels))


def first_slides_only(study):
    """The label in the row of each patient's first slide, as a table with merged cells gives it."""
    return relabelled(study, lambda place, row: replace(row, labels={"label": "" if place % 2 else row.labels["label"]}))


def table(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def metrics(inputs):
    return json.loads((inputs.mil_dir / "metrics.json").read_text())


def test_a_label_that_one_slide_has_is_that_of_the_patient(two_each):
    whole, once = two_each.into("whole"), two_each.into("once")
    run_mil(two_each.study(**SMALL), two_each.cohort, whole)
    run_mil(two_each.study(**SMALL), first_slides_only(two_each), once)
    for name in ("predictions.csv", "patients.csv", "splits.json"):
        assert (once.mil_dir / name).read_bytes() == (whole.mil_dir / name).read_bytes()
    assert metrics(once)["flow"] == metrics(whole)["flow"]


def test_a_label_in_one_row_hides_no_group_of_slides_from_the_search_for_leaks(tmp_path):
    study, said = planted(tmp_path, patients=24, stores=False), []

    def shared(place, row):  # the second slides of six patients of a class come from one block
        return replace(
            row, labels={**row.labels, "source": f"{row.labels['label']}{place // 24}" if place % 2 else f"own{place}"}
        )

    whole = Cohort(tuple(shared(place, row) for place, row in enumerate(study.cohort.rows)), ("label", "source"))
    for name, change in (("whole", {}), ("once", {"label": ""})):
        rows = (replace(row, labels={**row.labels, **change}) if place % 2 else row for place, row in enumerate(whole.rows))
        with pytest.raises(UsageError, match="same source") as refused:
            run_mil(study.study(**SMALL), Cohort(tuple(rows), whole.label_names), study.into(name))
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_what_survival_needs_may_stand_in_two_rows_of_a_patient(two_each):
    def split(place, row):
        return replace(
            row, labels={"months": "", "dead": str(place % 4 // 2)} if place % 2 else {"months": str(place + 1), "dead": ""}
        )

    table, settings = relabelled(two_each, split), MilSettings(label="os", time="months", event="dead")
    run = SimpleNamespace(cohort=table, study=two_each.study().model_copy(update={"mil": settings}))
    check_for_mil(run)
    assert len(labelled_slides(table, patient_ids(table, CohortSettings()), settings)) == 28


def test_slide_by_slide_a_slide_without_label_takes_no_part(two_each):
    inputs = two_each.into("slides")
    run_mil(two_each.study(**SMALL, level="slide"), first_slides_only(two_each), inputs)
    counts = metrics(inputs)["flow"]["slides"]
    assert counts == {"cohort": 28, "no file": 0, "failed": 0, "empty": 0, "no label": 14, "used": 14}


def test_the_label_stays_with_the_patient_when_the_slide_that_has_it_is_lost(two_each):
    table, settings = first_slides_only(two_each), MilSettings()
    patients = patient_ids(table, CohortSettings())
    absent = {row.slide_id: Absence("failed", "") for row in table.rows if row.slide_id.endswith("-0")}
    units = make_units(table, patients, absent, settings)
    assert [unit.slide_ids for unit in units[:2]] == [("s000-1",), ("s001-1",)]
    assert [unit.labels["label"] for unit in units[:2]] == ["normal", "tumour"]
    assert len(labelled_slides(table, patients, settings)) == 28
    assert len(labelled_slides(table, patients, MilSettings(level="slide"))) == 14


def test_half_of_what_survival_needs_is_no_label():
    settings = MilSettings(label="os", time="months", event="dead")
    assert has_label({"months": "3", "dead": "0"}, settings) and not has_label({"months": "3", "dead": ""}, settings)


def test_names_with_a_stroke_are_not_taken_apart(two_each):
    def named(place, row):
        patient, is_second = divmod(place // 2, 2)
        name, specimen = (f"2019 / {patient} / B", "C") if is_second else (f"2019 / {patient}", "B / C")
        return replace(row, patient_id=name, specimen_id=specimen)

    inputs = two_each.into("strokes")
    run_mil(two_each.study(**SMALL, level="slide"), relabelled(two_each, named), inputs)
    levels = metrics(inputs)["models"]["pretrained encoder"]["levels"]
    for level in ("specimen", "patient"):
        assert (levels[level]["n_bags"], levels[level]["n_patients"]) == (14, 14)


def test_a_task_may_be_called_like_one_of_its_columns(two_each):
    def survival(place, row):
        patient = place // 2
        months, age = str(5 + patient) if patient > 1 else "", str(50 + patient) if patient else ""
        return replace(row, labels={"months": months, "os": str(patient % 2), "age": age})

    inputs = two_each.into("os")
    also = [{"label": "age", "kind": "regression"}]
    study = two_each.study(**SMALL, label="os", time="months", event="os", kind="discrete", intervals=2, also=also)
    run_mil(study, relabelled(two_each, survival), inputs)
    rows = {row["patient_id"]: row for row in table(inputs.mil_dir / "predictions.csv")}
    said = {name: row["label"] for name, row in rows.items()}
    assert [(rows[name]["used"], said[name]) for name in ("p000", "p001", "p002")] == [
        ("0", "os=0"),
        ("1", "os=1"),
        ("1", "months=7 os=0"),
    ]
    assert said == {row["patient_id"]: row["label"] for row in table(inputs.mil_dir / "patients.csv")}
    result = read_mil(inputs.mil_dir)
    assert result is not None and len(risks(result, "months", "os").risk_N) == 12


def test_labels_are_those_of_the_task_in_the_order_of_its_columns(two_each):
    genes = TaskSettings(label="a", columns=("b", "a"))
    assert said_label(genes, {"a": "1", "b": "0", "c": "1"}) == "b=0 a=1"
    assert said_label(TaskSettings(label="a", columns=("a",)), {"a": "1"}) == "a=1"
    assert said_label(TaskSettings(label="c"), {"a": "1", "c": "x"}) == "x"
    rows = [replace(two_each.cohort.rows[0], labels=labels) for labels in ({"a": "1"}, {"b": "0"}, {})]
    assert said_labels(genes, rows) == "b=0 a=1" and said_labels(genes, rows[2:]) == ""
    torn = [*rows, replace(rows[0], labels={"a": "0"})]
    assert said_labels(genes, torn) == "a=0 | a=1 | b=0"
