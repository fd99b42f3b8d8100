"""Who takes part: refusals that name rows, and slides that do not get lost."""

from pathlib import Path

import pytest

from pathfm.errors import UsageError
from pathfm.mil.roster import Absence, check_cohort, flow, make_roster, patient_ids
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.study import CohortSettings, MilSettings


def cohort(*rows):
    return Cohort(
        tuple(
            SlideRow(slide, Path(slide), line, patient_id=patient, labels={"label": label})
            for line, (slide, patient, label) in enumerate(rows, 2)
        ),
        ("label",),
    )


def test_mil_refuses_to_split_without_patients():
    table = cohort(("a1", None, "x"), ("b1", "b", "y"))
    with pytest.raises(UsageError, match=r"line 2.*refuses to split until patient_id.*--patient-is-slide"):
        patient_ids(table, CohortSettings())
    assert patient_ids(table, CohortSettings(patient_is_slide=True)) == {"a1": "a1", "b1": "b"}


def test_contradicting_labels_of_a_patient_are_listed_with_their_lines():
    table = cohort(("a1", "a", "x"), ("b1", "b", "y"), ("a2", "a", "y"))
    with pytest.raises(UsageError, match=r"'a' is 'x' on line 2 and 'y' on line 4"):
        check_cohort(table, MilSettings())
    check_cohort(table, MilSettings(level="slide"))


def test_slides_of_a_patient_scattered_over_an_unsorted_table_all_stay():
    table = cohort(("a1", "a", "x"), ("b1", "b", "y"), ("a2", "a", "x"), ("a3", "a", "x"), ("b2", "b", "y"))
    roster = make_roster(table, patient_ids(table, CohortSettings()), {}, MilSettings())
    assert [unit.slide_ids for unit in roster.units] == [("a1", "a2", "a3"), ("b1", "b2")]


def test_slide_level_keeps_slides_of_a_patient_in_one_stratum():
    table = cohort(("a1", "a", "x"), ("a2", "a", "y"), ("b1", "b", "x"), ("c1", "c", "x"), ("d1", "d", "y"))
    roster = make_roster(table, patient_ids(table, CohortSettings()), {}, MilSettings(level="slide"))
    assert [unit.unit_id for unit in roster.units] == ["a1", "a2", "b1", "c1", "d1"]
    assert roster.stratum_of == {"a": "y", "b": "x", "c": "x", "d": "y"}


def test_positive_class_is_the_last_or_the_chosen_one():
    table = cohort(("a1", "a", "x"), ("b1", "b", "y"))
    patients = patient_ids(table, CohortSettings())
    assert make_roster(table, patients, {}, MilSettings()).positive == "y"
    assert make_roster(table, patients, {}, MilSettings(positive="x")).positive == "x"
    with pytest.raises(UsageError, match=r"'z'.*labels: x, y"):
        make_roster(table, patients, {}, MilSettings(positive="z"))


def test_one_class_left_is_refused_with_the_fate_of_the_others():
    table = cohort(("a1", "a", "x"), ("b1", "b", "y"))
    absent = {"b1": Absence("failed", "broken")}
    with pytest.raises(UsageError, match=r"x: 1.*failed: 1"):
        make_roster(table, patient_ids(table, CohortSettings()), absent, MilSettings())


def test_flow_adds_up():
    table = cohort(*[(f"s{index}", f"p{index}", "x") for index in range(5)])
    counts = flow(table, {"s1": Absence("failed", "."), "s2": Absence("no file", "."), "s3": Absence("no label", ".")})
    assert counts == {"cohort": 5, "no file": 1, "failed": 1, "empty": 0, "no label": 1, "used": 2}
