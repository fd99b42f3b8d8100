"""A classifier from features and a label table alone, whichever tools wrote them (asked for in torchmil#17 and torchmil#18)."""

from __future__ import annotations

import csv
import itertools

import h5py
import numpy as np
import pytest

from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.mil.foreign_inputs import ForeignFolder
from pathfm.mil.stage import MilInputs, run_mil
from pathfm.models.pt_files import write_pt
from pathfm.store.cohort import load_cohort
from pathfm.store.commit import read_json
from pathfm.study import Study
from tests.flows.conftest import run
from tests.foreign_features import LAYOUTS, samples, write_layout


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return samples(tmp_path_factory.mktemp("own"))


def write_csv(path, header, rows, delimiter=","):
    path.write_text("\n".join(delimiter.join(row) for row in [header, *rows]) + "\n")
    return path


SMALL = {"folds": 2, "ensemble": 1, "hidden": 8, "attention": 4, "epochs": 2, "controls": False, "seed": 3}


def study_of(folder, table, out, cohort=(), **mil):
    return Study.model_validate(
        {
            "out": str(out),
            "cohort": {"table": str(table), **dict(cohort)},
            "mil": {"features": str(folder), **SMALL, **mil, "numbers": {"bootstrap": 20}},
            "compute": {"device": "cpu", "workers": 1, "threads": 1},
        }
    )


def train(folder, table, out, cohort=(), **mil):
    """The stage alone: its report, predictions by slide_id, and metrics."""
    study = study_of(folder, table, out, cohort, **mil)
    rows = load_cohort(study.cohort, out, needs_slides=False)
    inputs = MilInputs({"main": folder}, out / "tiles", out / "mil", {}, "features", "f", foreign=ForeignFolder(folder))
    report = run_mil(study, rows, inputs)
    return report, predictions(out), read_json(out / "mil/metrics.json")


def predictions(out):
    with (out / "mil/predictions.csv").open(newline="") as stream:
        return sorted(csv.DictReader(stream), key=lambda row: row["slide_id"])


def probabilities(rows):
    """Slide -> what is predicted."""
    names = [name for name in rows[0] if name.startswith(("p_", "probability"))]
    assert names
    return np.array([[float(row[name]) for name in names] for row in rows])


@pytest.fixture(scope="module")
def plain(slides, tmp_path_factory):
    """Predictions from pathfm's own files and table."""
    folder = tmp_path_factory.mktemp("plain")
    table = write_csv(
        folder / "t.csv", ("slide_id", "patient_id", "label"), [(s.slide_id, s.patient_id, s.label) for s in slides]
    )
    return train(write_layout("pathfm", folder / "features", slides), table, folder / "out")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "pathfm"])
def test_the_same_features_give_the_same_predictions_in_every_layout(layout, slides, plain, tmp_path):
    folder = write_layout(layout, tmp_path / "features", slides)
    rows = [(s.patient_id, f"{s.slide_id}.svs", s.label) for s in slides]
    report, found, metrics = train(
        folder, write_csv(tmp_path / "t.csv", ("case_id", "slide_id", "label"), rows), tmp_path / "out"
    )
    assert report.statuses == {"done": len(slides)}
    assert len(found) == len(plain[1])
    assert [(row["slide_id"], row["patient_id"], row["fold"]) for row in found] == [
        (row["slide_id"], row["patient_id"], row["fold"]) for row in plain[1]
    ]
    np.testing.assert_allclose(probabilities(found), probabilities(plain[1]), atol=1e-6)
    assert any("patient_id is the column 'case_id'" in note for note in metrics["notes"])
    assert any("encoder" in note and "unknown" in note for note in metrics["notes"]) == layout.startswith("clam")


def clam_table(folder, slides):
    rows = [(slide.patient_id, slide.slide_id, slide.label) for slide in slides]
    return write_csv(folder / "t.csv", ("case_id", "slide_id", "label"), rows)


@pytest.mark.long
def test_one_command_goes_from_a_table_and_features_to_a_report(slides, tmp_path):
    folder, table = write_layout("clam", tmp_path / "features", slides), clam_table(tmp_path, slides)
    small = [option for name, value in SMALL.items() for option in ("--set", f"mil.{name}={str(value).lower()}")]
    command = ("mil", "train", table, "--features", folder, "--out", tmp_path / "out", *small)
    code, said, complaints = run(*command, "--set", "mil.numbers.bootstrap=20", "--set", "compute.device=cpu")
    assert (code, complaints.count("Traceback")) == (0, 0), complaints
    assert f"mil: {len(slides)} done" in said
    assert "patient_id is the column 'case_id'" in complaints
    assert list((tmp_path / "out/report").glob("*.html"))
    notes = read_json(tmp_path / "out/mil/metrics.json")["notes"]
    assert not any("pretrained" in note and "transductive" in note for note in notes)
    again, said, _ = run("mil", "train", tmp_path / "out")
    assert (again, "nothing to do" in said) == (0, True), said


def test_what_cannot_be_used_is_a_row_and_the_others_go_on(slides, tmp_path):
    folder = write_layout("stamp", tmp_path / "features", slides)
    places = ForeignFolder(folder)
    gone, cut, bad, empty = (places.find(slide.slide_id) for slide in slides[:4])
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:500])
    with h5py.File(bad, "a") as file:
        file["feats"][1, 2] = np.nan
    with h5py.File(empty, "a") as file:
        for name, width in (("feats", 8), ("coords", 2)):
            del file[name]
            file[name] = np.zeros((0, width), np.float16)
    report, _, metrics = train(folder, clam_table(tmp_path, slides), tmp_path / "out")
    found = {outcome.slide_id: (outcome.status, outcome.reason) for outcome in report.outcomes}
    assert found[slides[0].slide_id] == ("failed", "there is no feature file")
    assert found[slides[1].slide_id][0] == "failed"
    assert found[slides[2].slide_id][0] == "failed" and "not finite: 1 of" in found[slides[2].slide_id][1]
    assert found[slides[3].slide_id] == ("empty", "no tiles")
    assert report.exit_code == ExitCode.SOME_FAILED
    assert metrics["flow"]["slides"]["used"] == len(slides) - 4


def test_features_of_several_encoders_are_refused(slides, tmp_path):
    folder = write_layout("clam-pt", tmp_path / "features", slides)
    write_pt(folder / "pt_files" / f"{slides[3].slide_id}.pt", np.zeros((4, 16), np.float32))
    with pytest.raises(StoreError, match=rf"different lengths \(8, 16\): {slides[3].slide_id} differs from most"):
        train(folder, clam_table(tmp_path, slides), tmp_path / "out")
    both = write_layout("trident", tmp_path / "both", slides)
    with h5py.File(next(both.rglob(f"{slides[2].slide_id}.h5")), "a") as file:
        file["features"].attrs["encoder"] = "conch"
    with pytest.raises(StoreError, match=f"different encoders: {slides[2].slide_id} differs from most"):
        train(both, clam_table(tmp_path, slides), tmp_path / "out")


def test_a_slide_in_two_places_is_refused(slides, tmp_path):
    folder = write_layout("trident", tmp_path / "features", slides)
    write_layout("stamp", folder, slides[:1])
    with pytest.raises(UsageError, match="has 2 feature files"):
        train(folder, clam_table(tmp_path, slides), tmp_path / "out")


def test_split_tables_of_clam_decide_who_is_tested(slides, tmp_path):
    folder = write_layout("clam", tmp_path / "features", slides)
    patients = sorted({slide.patient_id for slide in slides})
    (tmp_path / "splits").mkdir()
    parts = {}
    for number in (0, 1):
        turned = patients[4 * number :] + patients[: 4 * number]
        part_of = dict(zip(turned, ["test"] * 4 + ["val"] * 4 + ["train"] * 4, strict=True))
        columns = [[s.slide_id for s in slides if part_of[s.patient_id] == part] for part in ("train", "val", "test")]
        rows = [(str(row), *values) for row, values in enumerate(itertools.zip_longest(*columns, fillvalue=""))]
        write_csv(tmp_path / f"splits/splits_{number}.csv", ("", "train", "val", "test"), rows)
        parts[number] = {patient for patient, part in part_of.items() if part == "test"}
    split = {"scheme": "file", "file": str(tmp_path / "splits")}
    _, found, metrics = train(folder, clam_table(tmp_path, slides), tmp_path / "out", split=split)
    assert {number: {row["patient_id"] for row in found if row["fold"] == str(number)} for number in (0, 1)} == parts
    assert metrics["splits"]["scheme"] == "file"
    with pytest.raises(UsageError, match="take no part here"):
        train(folder, clam_table(tmp_path, slides[:-1]), tmp_path / "other", split=split)


def test_folds_of_patho_bench_decide_who_is_tested(slides, tmp_path):
    folder = write_layout("trident", tmp_path / "features", slides)
    fold_of = {slide.patient_id: int(slide.patient_id[1:]) // 2 % 3 for slide in slides}
    names = [f"fold_{number}" for number in range(3)]
    sides = {slide.slide_id: ["test" if fold_of[slide.patient_id] == n else "train" for n in range(3)] for slide in slides}
    rows = [(slide.patient_id, slide.slide_id, slide.label, *sides[slide.slide_id]) for slide in slides]
    table = write_csv(tmp_path / "k=all.tsv", ("case_id", "slide_id", "grade", *names), rows, "\t")
    _, found, _ = train(folder, table, tmp_path / "out", label="grade", split={"scheme": "column"})
    assert all(row["fold"] == str(fold_of[row["patient_id"]]) for row in found)
    assert len(found) == len(fold_of)


def test_stamp_keeps_patients_and_slides_in_two_tables(slides, plain, tmp_path):
    folder = write_layout("stamp", tmp_path / "features", slides)
    shuffled = [slides[row] for row in np.random.default_rng(1).permutation(len(slides))]
    rows = [(slide.patient_id, f"uni-1c0ffee5/{slide.label}/{slide.slide_id}.h5") for slide in shuffled]
    table = write_csv(tmp_path / "slide.csv", ("PATIENT", "FILENAME"), rows)
    patients = [*{slide.patient_id: (slide.patient_id, slide.label) for slide in shuffled}.values(), ("p99", "tumour")]
    clini = write_csv(tmp_path / "clini.csv", ("PATIENT", "label"), patients, ";")
    _, found, metrics = train(folder, table, tmp_path / "out", {"clinical": str(clini)})
    np.testing.assert_allclose(probabilities(found), probabilities(plain[1]), atol=1e-6)
    assert sum(int(row["n_tiles"]) for row in found) == sum(len(slide.file.coords) for slide in slides)
    assert "1 patients of clini.csv have no slide: p99" in metrics["notes"]
