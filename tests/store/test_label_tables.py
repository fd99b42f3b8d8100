"""Label tables as other tools write them: everything is taken over, joined or named, nothing disappears."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from pathfm.errors import MissingExtraError, UsageError
from pathfm.store.cohort import load_cohort
from pathfm.store.interop.label_tables import Table, joined, read_table, translated, without_endings
from pathfm.study import CohortSettings


class Settings(CohortSettings):
    clinical: Path | None = None


def write(path, *lines, delimiter=",", encoding="utf-8"):
    path.write_bytes(("\n".join(delimiter.join(line.split(",")) for line in lines) + "\n").encode(encoding))
    return path


def load(table, clinical=None):
    return load_cohort(Settings(table=table, clinical=clinical), table.parent, needs_slides=False)


def facts(cohort, label="label"):
    return [(row.slide_id, row.patient_id, row.labels[label]) for row in cohort.rows]


def refusal(table, clinical=None):
    with pytest.raises(UsageError) as caught:
        load(table, clinical)
    return str(caught.value)


def test_our_own_table_needs_no_paths_without_slides(tmp_path):
    table = write(tmp_path / "t.csv", "slide_id,patient_id,path,label", "a,p1,gone/a.svs,x", "b,p2,,y")
    cohort = load(table)
    assert facts(cohort) == [("a", "p1", "x"), ("b", "p2", "y")]
    assert [row.path for row in cohort.rows] == [tmp_path / "gone/a.svs", Path("b")]
    assert cohort.notes == ()
    with pytest.raises(UsageError, match="there is no file"):
        load_cohort(Settings(table=table), tmp_path)


def test_a_dataset_table_of_clam(tmp_path):
    table = write(
        tmp_path / "dataset.csv",
        ",case_id,slide_id,label,site_code",
        "0,patient_0,slide_1.svs,tumor_tissue,7",
        "1,patient_0,slide_2.svs,tumor_tissue,7",
        "2,patient_1,slide_3,normal_tissue,8",
    )
    cohort = load(table)
    assert facts(cohort) == [
        ("slide_1", "patient_0", "tumor_tissue"),
        ("slide_2", "patient_0", "tumor_tissue"),
        ("slide_3", "patient_1", "normal_tissue"),
    ]
    assert cohort.label_names == ("label", "site_code")
    assert cohort.notes == (
        "the first column has no name and is left out",
        "patient_id is the column 'case_id'",
        "2 slide_ids are taken without folder and ending, as slide_1 for slide_1.svs",
    )


def test_a_task_of_patho_bench_with_folds_that_test_every_slide_once(tmp_path):
    table = write(
        tmp_path / "k=all.tsv",
        "case_id,slide_id,TP53_mutation,fold_1,fold_0",
        *("c1,s1,0,test,train", "c2,s2,1,train,test", "c3,s3,1,test,train"),
        delimiter="\t",
    )
    cohort = load(table)
    assert [(row.slide_id, row.split) for row in cohort.rows] == [("s1", "1"), ("s2", "0"), ("s3", "1")]
    assert cohort.label_names == ("TP53_mutation",)
    assert cohort.notes[-1] == (
        "split is the number of the fold that tests a slide, of fold_0 to fold_1: mil.split.scheme=column takes it"
    )


def test_one_fold_of_patho_bench_is_a_split_and_overlapping_ones_are_none(tmp_path):
    one = load(write(tmp_path / "a.tsv", "case_id,slide_id,y,fold_0", "c1,s1,0,train", "c2,s2,1,test", delimiter="\t"))
    assert [row.split for row in one.rows] == ["train", "test"]
    many = load(write(tmp_path / "b.csv", "case_id,slide_id,y,fold_0,fold_1", "c1,s1,0,test,test", "c2,s2,1,train,train"))
    assert [row.split for row in many.rows] == [None, None]
    assert "do not test every slide once" in many.notes[-1]
    assert many.label_names == ("y", "fold_0", "fold_1")
    own = load(write(tmp_path / "c.csv", "case_id,slide_id,y,split,fold_0", "c1,s1,0,train,test"))
    assert own.rows[0].split == "train"
    number = load(write(tmp_path / "d.csv", "case_id,slide_id,fold_1", "c1,s1,0.5"))
    assert number.label_names == ("fold_1",)


STAMP_SLIDES = ("PATIENT,FILENAME", "A,cohort/a1.h5", "B,cohort/b1.h5", "A,a2.h5", "A,a3.h5", "B,b2.h5")
STAMP_CLINI = ("PATIENT,isMSIH,AGE", "B,MSS,61", "A,MSIH,50")


def test_no_slide_is_lost_where_the_slide_table_is_not_sorted_by_patient(tmp_path):
    """STAMP 2.5 groups neighbours only: of the order A, B, A, A, B it keeps a2, a3 and b2."""
    clinical = write(tmp_path / "clini.csv", *STAMP_CLINI)
    wanted = {("a1", "A", "MSIH"), ("a2", "A", "MSIH"), ("a3", "A", "MSIH"), ("b1", "B", "MSS"), ("b2", "B", "MSS")}
    for seed in range(8):
        lines = list(STAMP_SLIDES[1:])
        random.Random(seed).shuffle(lines)
        cohort = load(write(tmp_path / "slide.csv", STAMP_SLIDES[0], *lines), clinical)
        assert set(facts(cohort, "isMSIH")) == wanted
        assert len(cohort.rows) == 5
        assert cohort.label_names == ("isMSIH", "AGE")


def test_who_is_in_one_of_two_tables_only_is_counted_and_named(tmp_path):
    """Asked for in STAMP#136: which patients were dropped."""
    slides = write(tmp_path / "slide.csv", *STAMP_SLIDES, "C,c1.h5", "C,c2.h5", "D,d1.h5")
    cohort = load(slides, write(tmp_path / "clini.csv", *STAMP_CLINI, "E,MSS,40", "F,MSS,41"))
    assert len(cohort.rows) == 8
    assert [row.labels["isMSIH"] for row in cohort.rows[5:]] == ["", "", ""]
    assert "3 slides of 2 patients have no row in clini.csv: C, D" in cohort.notes
    assert "2 patients of clini.csv have no slide: E, F" in cohort.notes


def test_patients_who_are_written_in_another_case_are_the_same_ones(tmp_path):
    cohort = load(write(tmp_path / "s.csv", "PATIENT,FILENAME", "a,1.h5", "A,2.h5"), write(tmp_path / "c.csv", *STAMP_CLINI))
    assert facts(cohort, "isMSIH") == [("1", "A", "MSIH"), ("2", "A", "MSIH")]
    assert "1 patients are written differently in c.csv, and so here: a" in cohort.notes


def test_two_tables_that_do_not_fit_are_refused(tmp_path):
    slides = write(tmp_path / "slide.csv", *STAMP_SLIDES)

    def clinical(*lines):
        return write(tmp_path / "clini.csv", *lines)

    assert "patient 'A' has different rows on line 2, 3" in refusal(slides, clinical("PATIENT,y", "A,1", "A,2"))
    assert "no patient of slide.csv is in the table" in refusal(slides, clinical("PATIENT,y", "X,1"))
    assert "no column tells the patient" in refusal(slides, clinical("who,y", "A,1"))
    assert "columns that slide.csv has too: slide_id" in refusal(slides, clinical("PATIENT,slide_id", "A,1"))
    assert "line 2: 1 fields, but the header has 2 columns" in refusal(slides, clinical("PATIENT,y", "A"))
    assert "no such cohort table" in refusal(slides, tmp_path / "absent.csv")
    assert "line 3: the patient_id is empty" in refusal(write(tmp_path / "s.csv", "PATIENT,FILENAME", "A,1", ",2"))


def test_rows_that_are_there_twice_count_once_and_are_named(tmp_path):
    cohort = load(write(tmp_path / "t.csv", "case_id,slide_id,label", "p,a.svs,x", "p,b.svs,x", "p,a.svs,x", "p,a,x"))
    assert [row.slide_id for row in cohort.rows] == ["a", "b"]
    assert cohort.notes[-1] == "2 rows of t.csv are there twice and count once: line 4, 5"
    table = write(tmp_path / "t.csv", "case_id,slide_id,label", "p,a.svs,x", "p,A.ndpi,y", "p,a.svs,y")
    message = refusal(table)
    assert "line 4: slide_id 'a' is there twice" in message
    assert "line 3: slide_id 'A' differs from 'a' only in case" in message


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("slide_id,patient_id", ()),
        ("Slide_ID,Patient ID", ("slide_id is the column 'Slide_ID'", "patient_id is the column 'Patient ID'")),
        ("slide_id,case", ("patient_id is the column 'case'",)),
        ("slide_id,cases.submitter_id", ("patient_id is the column 'cases.submitter_id'",)),
        ("FILENAME,PATIENT", ("slide_id is the column 'FILENAME'", "patient_id is the column 'PATIENT'")),
        ("wsi,submitter_id", ("slide_id is the column 'wsi'", "patient_id is the column 'submitter_id'")),
    ],
)
@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-8")])
def test_columns_of_other_tools_get_our_names_and_it_is_said(tmp_path, header, said, delimiter, encoding):
    table = write(tmp_path / "t.csv", f"{header},label", "s1,p1,x", "", "s2,p2,y", delimiter=delimiter, encoding=encoding)
    cohort = load(table)
    assert facts(cohort) == [("s1", "p1", "x"), ("s2", "p2", "y")]
    assert cohort.notes == said


def test_columns_that_could_both_be_ours_are_refused_unless_they_agree(tmp_path):
    table = write(tmp_path / "t.csv", "slide_id,case_id,submitter_id,label", "s1,u1,p1,x", "s2,p2,p2,x")
    assert "'case_id' and 'submitter_id' could both be patient_id, and differ on line 2" in refusal(table)
    same = load(write(tmp_path / "t.csv", "slide_id,case_id,submitter_id,label", "s1,p1,p1,x", "s2,p2,p2,x"))
    assert [row.patient_id for row in same.rows] == ["p1", "p2"]
    own = load(write(tmp_path / "t.csv", "slide_id,case_id,patient_id,label", "s1,u1,p1,x"))
    assert (own.rows[0].patient_id, own.rows[0].labels["case_id"]) == ("p1", "u1")
    assert "there is no column 'slide_id'" in refusal(write(tmp_path / "t.csv", "which,label", "s1,x"))


@pytest.mark.parametrize(
    ("name", "slide_id"),
    [
        ("a.svs", "a"),
        ("a.SVS", "a"),
        ("a.ome.tiff", "a"),
        ("a.svs.h5", "a"),
        ("x/y/a.h5", "a"),
        ("x\\a.pt", "a"),
        ("TCGA-A6-2671-01Z-00-DX1.13eff5a8-1f2d.svs", "TCGA-A6-2671-01Z-00-DX1.13eff5a8-1f2d"),
        ("a.b", "a.b"),
        (".svs", ".svs"),
        ("", ""),
        ("a.zarr/", "a"),
    ],
)
def test_slide_ids_have_neither_folders_nor_endings(name, slide_id):
    assert without_endings(name) == slide_id
    assert without_endings(slide_id) == slide_id


def test_an_order_of_rows_changes_nothing_but_the_order(tmp_path):
    lines = [f"p{n % 5},s{n}.svs,{n % 2}" for n in range(20)]
    wanted = sorted(facts(load(write(tmp_path / "t.csv", "PATIENT,FILENAME,label", *lines))))
    for seed in range(5):
        random.Random(seed).shuffle(lines)
        assert sorted(facts(load(write(tmp_path / "t.csv", "PATIENT,FILENAME,label", *lines)))) == wanted


def test_a_table_without_openpyxl_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "t.xlsx").write_bytes(b"")
    with pytest.raises(MissingExtraError, match="pip install openpyxl, or save the table as CSV"):
        load(tmp_path / "t.xlsx")
    assert "no such cohort table" in refusal(tmp_path / "absent.xlsx")


def test_a_sheet_is_read_like_a_table(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["PATIENT", "isMSIH", "AGE", None], ["A", " MSIH", 50], [], ["B", "MSS", None, None], ["B", "MSS"]):
        book.active.append(row)
    book.save(tmp_path / "clini.xlsx")
    cohort = load(write(tmp_path / "slide.csv", *STAMP_SLIDES), tmp_path / "clini.xlsx")
    assert [(row.labels["isMSIH"], row.labels["AGE"]) for row in cohort.rows[:2]] == [("MSIH", "50"), ("MSS", "")]
    (tmp_path / "broken.xlsx").write_bytes(b"PK\x03\x04 nothing")
    assert "not an xlsx table" in refusal(tmp_path / "broken.xlsx")


def test_a_table_of_patients_also_serves_a_study_with_slides(tmp_path):
    (tmp_path / "a.svs").touch()
    table = write(tmp_path / "t.csv", "slide_id,path,patient_id", "a.svs,a.svs,A")
    clinical = write(tmp_path / "c.csv", *STAMP_CLINI)
    cohort = load_cohort(Settings(table=table, clinical=clinical), tmp_path)
    assert facts(cohort, "isMSIH") == [("a.svs", "A", "MSIH")]


def test_a_join_keeps_the_tables_as_they_were(tmp_path):
    slides = translated(read_table(write(tmp_path / "s.csv", *STAMP_SLIDES)))
    clinical = translated(read_table(write(tmp_path / "c.csv", *STAMP_CLINI)), ("patient_id",))
    both = joined(slides, clinical)
    assert both.names == ("patient_id", "slide_id", "isMSIH", "AGE")
    assert [line for line, _ in both.rows] == [2, 3, 4, 5, 6]
    assert isinstance(slides, Table) and slides.names == ("patient_id", "slide_id")
