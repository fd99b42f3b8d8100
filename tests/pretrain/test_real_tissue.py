"""The study in ``pipelines/tissue`` on the real sets: who is left out."""

import csv
import importlib.util
from collections import Counter, defaultdict
from pathlib import Path

import pytest

PIPELINE = Path(__file__).resolve().parents[2] / "pipelines" / "tissue"

pytestmark = pytest.mark.long


def _script(name, monkeypatch, *arguments):
    spec = importlib.util.spec_from_file_location(f"tissue_{name}", PIPELINE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    return module


def _rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def prepared(shared_data, tmp_path, monkeypatch):
    _script("prepare", monkeypatch, shared_data, tmp_path / "data").main()
    return tmp_path / "data"


def test_patients_left_out_are_not_in_the_cohort_and_cases_stay_together(prepared, shared_data):
    parts = {row["patient_id"]: row for row in _rows(prepared / "parts.csv")}
    seen = {row["patient_id"] for row in _rows(prepared / "cohort.csv")}
    assert all((parts[patient]["part"] == "held-out") == (patient not in seen) for patient in parts)
    counts = Counter((row["set"], row["part"]) for row in parts.values())
    assert counts == {
        ("hpylori", "held-out"): 77,
        ("hpylori", "pretraining"): 78,
        ("lymphoma", "held-out"): 20,
        ("lymphoma", "pretraining"): 9,
    }
    slides = defaultdict(set)
    for row in _rows(shared_data / "lymphoma" / "cohort.csv"):
        slides[row["patient_id"]].add(row["slide_of_origin"])
    assert max(len(of_case) for of_case in slides.values()) == 2  # one case is two slides, and one line in parts.csv
    watched = _rows(prepared / "watched.csv")
    assert {row["group"] for row in watched} <= seen
    assert {row["group"] for row in watched if row["part"] == "train"}.isdisjoint(
        row["group"] for row in watched if row["part"] == "val"
    )
