"""Tables that say themselves that rows are not independent: columns and names that group slides of different "patients"."""

import csv
import random
from pathlib import Path

import pytest

from pathfm.errors import UsageError
from pathfm.mil.groupings import find_groupings
from pathfm.mil.leaks import check_leaks, together
from pathfm.mil.splits import make_splits, patient_facts
from pathfm.mil_settings import MilSettings
from pathfm.store.cohort import SlideRow


def fields(column="slide_of_origin", names="f{:03d}", patient=False, count=60):
    """Rows of six fields each; two thirds of the groups have one class, a third the other."""
    return [
        SlideRow(
            names.format(number, number // 6),
            Path("x"),
            patient_id=f"p{number // 6}" if patient else None,
            labels={"label": "ab"[number // 6 % 3 == 0], **({column: f"origin {number // 6}"} if column else {})},
        )
        for number in range(count)
    ]


def own(rows):
    return {row.slide_id: row.patient_id or row.slide_id for row in rows}


@pytest.mark.parametrize(
    "column", ["patient", "Patient_ID", "case_id", "case_submitter_id", "donor", "slide_of_origin", "slide", "source", "wsi_id"]
)
def test_a_column_that_names_a_patient_makes_leaks(column):
    rows = fields(column)
    leaks, notes = find_groupings(rows, own(rows), ["label"])
    assert len(leaks) == 10 and all(leak.kind == f"same {column}" and len(leak.patients) == 6 for leak in leaks)
    assert any("patients of their own" in note for note in notes)
    assert find_groupings(rows[::-1], own(rows), ["label"]) == (leaks, notes)


def test_with_true_patients_there_is_nothing_to_say():
    rows = fields(patient=True)
    assert find_groupings(rows, own(rows), ["label"]) == ([], [])


@pytest.mark.parametrize("column", ["grade", "panel", "batch"])
def test_any_other_column_that_tells_the_label_is_marked(column):
    rows = fields(column)
    leaks, notes = find_groupings(rows, own(rows), ["label"])
    assert leaks == [] and any(
        f"values of column {column} group slides" in note and "give patient_id" in note for note in notes
    )


def column_of(values):
    rows = fields(None, patient=True)
    with_value = [
        SlideRow(row.slide_id, row.path, patient_id=row.slide_id, labels={**row.labels, "slide_type": value})
        for row, value in zip(rows, values, strict=True)
    ]
    return find_groupings(with_value, own(with_value), ["label"])


def test_columns_that_describe_slides_do_not_group_patients():
    rng = random.Random(0)
    assert column_of([rng.choice(["biopsy", "resection"]) for _ in range(60)]) == ([], [])
    assert column_of([str(rng.randrange(40, 80)) for _ in range(60)]) == ([], [])  # age
    assert column_of(["n/a"] * 60) == ([], [])
    assert column_of([f"type {n // 6 % 3 == 0}" for n in range(60)]) == ([], [])  # the label once more


@pytest.mark.parametrize("names", ["c{1:02d}_{0:03d}", "sj-{1}-x {0}", "TCGA-AA-{1:04d}-01A-{0}"])
def test_names_that_start_alike_are_marked(names):
    rows = fields(None, names)
    leaks, notes = find_groupings(rows, own(rows), ["label"])
    assert leaks == [] and any("starts of the slides' names" in note and "10 groups" in note for note in notes)


@pytest.mark.parametrize("names", ["slide_{0:03d}", "B22-{0}", "{0}", "2021_{0}-x"])
def test_names_that_are_only_numbered_are_not(names):
    rows = fields(None, names)
    assert len(find_groupings(rows, own(rows), ["label"]).notes) == 1  # that nobody gave patients


def lymphoma(folder, columns):
    with (folder / "lymphoma" / "cohort.csv").open() as stream:
        table = list(csv.DictReader(stream))
    return [
        SlideRow(
            row["slide_id"],
            Path(row["path"]),
            patient_id=row["patient_id"] if "patient_id" in columns else None,
            split=random.Random(row["slide_id"]).choice(["train", "test"]),
            labels={name: row[name] for name in columns if name != "patient_id"},
        )
        for row in table
    ]


def test_fields_of_one_slide_on_both_sides_of_a_real_cohort_are_refused_or_marked(shared_data):
    """A split of the lymphoma fields at random looks like 0.8, by slide it is 0.5."""
    settings = MilSettings()
    rows = lymphoma(shared_data, ["label", "slide_of_origin"])
    stratum_of = {row.slide_id: row.labels["label"] for row in rows}
    leaks, notes = find_groupings(rows, own(rows), ["label"])
    folds = make_splits(stratum_of, patient_facts(rows, own(rows)), (), settings).folds
    with pytest.raises(UsageError, match=r"(?s)30 problems.*same slide_of_origin: .*leaks=merge"):
        check_leaks(leaks, folds, "refuse")
    merged = make_splits(stratum_of, patient_facts(rows, own(rows)), together(leaks), settings).folds
    assert len(check_leaks(leaks, merged, "merge")) == 30
    leaks, notes = find_groupings(lymphoma(shared_data, ["label"]), own(rows), ["label"])
    assert leaks == [] and len(notes) == 2 and "starts of the slides' names" in notes[1]


def test_the_split_by_patient_is_the_default_of_a_real_cohort(shared_data):
    rows = lymphoma(shared_data, ["patient_id", "label"])
    stratum_of = {row.patient_id: row.labels["label"] for row in rows}
    facts = patient_facts(rows, own(rows))
    assert find_groupings(rows, own(rows), ["label"]) == ([], [])
    assert len(stratum_of) == 29 and len(make_splits(stratum_of, facts, (), MilSettings()).folds) == 5
    with pytest.raises(UsageError, match=r"2\d patients are on two sides of the split"):
        make_splits(stratum_of, facts, (), MilSettings.model_validate({"split": {"scheme": "column"}}))
