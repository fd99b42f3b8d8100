"""Who takes part: refusals that name rows, and slides that do not get lost."""

from pathlib import Path

import pytest

from pathfm.errors import UsageError
from pathfm.mil.roster import Absence, check_cohort, flow, make_units, patient_flow, patient_ids, stratum_of
from pathfm.mil_settings import MilSettings
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.study import CohortSettings


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


def units_of(table, **mil):
    return make_units(table, patient_ids(table, CohortSettings()), {}, MilSettings(**mil))


def test_slides_of_a_patient_scattered_over_an_unsorted_table_all_stay():
    table = cohort(("a1", "a", "x"), ("b1", "b", "y"), ("a2", "a", "x"), ("a3", "a", "x"), ("b2", "b", "y"))
    assert [unit.slide_ids for unit in units_of(table)] == [("a1", "a2", "a3"), ("b1", "b2")]


def test_slide_level_keeps_slides_of_a_patient_in_one_stratum():
    table = cohort(("a1", "a", "x"), ("a2", "a", "y"), ("b1", "b", "x"), ("c1", "c", "x"), ("d1", "d", "y"))
    units = units_of(table, level="slide")
    assert [unit.unit_id for unit in units] == ["a1", "a2", "b1", "c1", "d1"]
    assert stratum_of(units, [unit.labels["label"] for unit in units]) == {"a": "y", "b": "x", "c": "x", "d": "y"}


def test_a_specimen_is_the_slides_of_a_patient_that_name_it():
    rows = [("a1", "a", "s1"), ("a2", "a", "s2"), ("a3", "a", "s1"), ("b1", "b", "s1")]
    table = Cohort(
        tuple(
            SlideRow(slide, Path(slide), line, patient_id=patient, specimen_id=specimen, labels={"label": patient})
            for line, (slide, patient, specimen) in enumerate(rows, 2)
        ),
        ("label",),
    )
    assert [(unit.unit_id, unit.patient_id, unit.slide_ids) for unit in units_of(table, level="specimen")] == [
        ("s1", "a", ("a1", "a3")),
        ("s1", "b", ("b1",)),
        ("s2", "a", ("a2",)),
    ]
    unnamed = cohort(("a1", "a", "x"), ("b1", "b", "y"))
    with pytest.raises(UsageError, match=r"2 of 2 slides have no specimen_id"):
        check_cohort(unnamed, MilSettings(level="specimen"))


def test_flow_adds_up():
    table = cohort(*[(f"s{index}", f"p{index // 2}", "x") for index in range(6)])
    absent = {"s1": Absence("failed", "."), "s2": Absence("no file", "."), "s3": Absence("no label", ".")}
    assert flow(table, absent) == {"cohort": 6, "no file": 1, "failed": 1, "empty": 0, "no label": 1, "used": 3}
    counts = patient_flow(table, patient_ids(table, CohortSettings()), absent)
    assert counts == {"cohort": 3, "no file": 1, "failed": 0, "empty": 0, "no label": 0, "used": 2}
