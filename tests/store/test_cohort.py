import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.errors import UsageError
from pathfm.store.cohort import Cohort, SlideRow, check_labels, id_problem, load_cohort
from pathfm.study import CohortSettings


@pytest.fixture
def folder(tmp_path):
    for name in ("a.svs", "b.svs", "c.svs", "mask.png"):
        (tmp_path / name).touch()
    return tmp_path


def write(folder, text, encoding="utf-8"):
    (folder / "cohort.csv").write_bytes(text.encode(encoding))
    return CohortSettings(table=Path("cohort.csv"))


def refusal(settings, folder, find=None):
    with pytest.raises(UsageError) as caught:
        load_cohort(settings, folder, find)
    return str(caught.value)


def test_a_full_table(folder):
    settings = write(
        folder,
        "slide_id,path,patient_id,mpp,site,split,lesion_mask,label,grade\n"
        f"s1,a.svs,007, 0.25 ,Bern,train,mask.png,MSI,2\n"
        f'"s 2",{folder / "b.svs"},7,,,,,"MSS, low",\n',
    )
    cohort = load_cohort(settings, folder)
    assert cohort.label_names == ("label", "grade")
    assert cohort.rows[0] == SlideRow(
        slide_id="s1",
        path=folder / "a.svs",
        line=2,
        patient_id="007",
        mpp=0.25,
        site="Bern",
        split="train",
        lesion_mask=folder / "mask.png",
        labels={"label": "MSI", "grade": "2"},
    )
    second = SlideRow("s 2", folder / "b.svs", 3, "7", labels={"label": "MSS, low", "grade": ""})
    assert cohort.rows[1] == second
    assert pickle.loads(pickle.dumps(cohort)) == cohort


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_tables_as_spreadsheets_write_them(folder, delimiter, newline, encoding):
    lines = [["slide_id", "path", "label"], ["é1", "a.svs", "x"], ["", "", ""], [], ["s2", "b.svs", "y"]]
    settings = write(folder, newline.join(delimiter.join(line) for line in lines) + newline, encoding)
    assert [(row.slide_id, row.line, row.labels["label"]) for row in load_cohort(settings, folder).rows] == [
        ("é1", 2, "x"),
        ("s2", 5, "y"),
    ]


def test_without_a_patient_column_patients_are_unknown(folder):
    assert load_cohort(write(folder, "slide_id,path\ns1,a.svs\n"), folder).rows[0].patient_id is None


def test_paths_start_at_the_folder_of_the_table_wherever_the_study_is(folder, tmp_path_factory):
    write(folder, "slide_id,path\ns1,a.svs\n")
    elsewhere = tmp_path_factory.mktemp("study")
    assert load_cohort(CohortSettings(table=folder / "cohort.csv"), elsewhere).rows[0].path == folder / "a.svs"


def test_every_problem_is_told_at_once_with_its_line(folder):
    settings = write(
        folder,
        "slide_id,path,patient_id,mpp,lesion_mask\n"
        "s1,a.svs,p1,0.5,\n"
        "s1,b.svs,p1,0.5,\n"
        ",a.svs,p1,0.5,\n"
        "s4,absent.svs,p1,0.5,\n"
        's5,a.svs,p1,"0,5",\n'
        "s6,a.svs,p1,352.8,\n"
        "s7,a.svs,,0.5,\n"
        "../s8,a.svs,p1,0.5,\n"
        "S4,a.svs,p1,nan,absent.png\n"
        "s10,a.svs,p1\n"
        "s11,,p1,0.5,,extra\n"
        "s12,,p1,0.5,\n",
    )
    message = refusal(settings, folder)
    assert message.startswith(f"{folder / 'cohort.csv'}: 13 problems\n")
    for words in [
        "line 3: slide_id 's1' is there twice",
        "and on line 2",
        "line 4: the slide_id is empty",
        f"line 5: there is no file {folder / 'absent.svs'}",
        "line 6: mpp '0,5' must be a number from 0.05 to 20.0",
        "line 7: mpp '352.8' must be",
        "line 8: the patient_id is empty",
        "line 9: slide_id '../s8' holds a slash",
        "line 10: mpp 'nan' must be",
        f"line 10: there is no lesion mask {folder / 'absent.png'}",
        "line 10: slide_id 'S4' differs from 's4' only in case",
        "line 11: 3 fields, but the header has 5 columns",
        "line 12: 6 fields, but the header has 5 columns",
        "line 13: the path is empty",
    ]:
        assert words in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slide_id,label\ns1,x\n", "there is no column 'path' (columns: slide_id, label; wanted: path, its file"),
        ("Slide_ID,path\ns1,a.svs\n", "there is no column 'slide_id', did you mean 'Slide_ID'?"),
        ("slide_id,path,label,label\ns1,a.svs,x,y\n", "column 'label' is there twice"),
        (",slide_id,path\n0,s1,a.svs\n", "column 1 has no name"),
        ("", "the table is empty"),
        ("\n\n", "the table is empty"),
        ("slide_id,path\n", "the table has no rows"),
        ('slide_id,path\ns1,"a.svs\ns2,b.svs\n', "not a valid CSV table"),
    ],
)
def test_tables_that_cannot_be_one(folder, text, words):
    message = refusal(write(folder, text), folder)
    assert words in message
    assert "\n" not in message


def test_tables_that_cannot_be_read(folder):
    assert "no such cohort table" in refusal(CohortSettings(table=Path("absent.csv")), folder)
    assert "it is a folder (name the file in it" in refusal(CohortSettings(table=Path()), folder)
    for encoding in ("latin-1", "utf-16", "utf-16-le"):
        message = refusal(write(folder, "slide_id,path\ncafé,a.svs\n", encoding), folder)
        assert message.endswith("is not UTF-8 text (in Excel: Save As, type `CSV UTF-8`)")


def test_a_slide_that_is_not_there_is_noted_and_all_of_them_are_refused(folder):
    cohort = load_cohort(write(folder, "slide_id,path\ns1,a.svs\ns2,gone.svs\n"), folder)
    assert [row.slide_id for row in cohort.rows] == ["s1", "s2"]
    assert cohort.notes == (f"1 of 2 slides have no file, and fail: line 3: there is no file {folder / 'gone.svs'}",)
    message = refusal(write(folder, "slide_id,path\ns1,no.svs\ns2,gone.svs\n"), folder)
    assert message.endswith("gone.svs (paths start at the folder of the table)")


def test_a_decimal_comma_counts_where_semicolons_separate(folder):
    settings = write(folder, "slide_id;path; mpp ;label\ns1;a.svs; 0,25 ;1,5\ns2;b.svs;;\ns3;b.svs;0.5;x\n")
    rows = load_cohort(settings, folder).rows
    assert [(row.mpp, row.labels["label"]) for row in rows] == [(0.25, "1,5"), (None, ""), (0.5, "x")]
    assert "mpp '0,5'" in refusal(write(folder, 'slide_id,path,mpp\ns1,a.svs,"0,5"\n'), folder)


def test_a_long_list_of_problems_is_cut(folder):
    message = refusal(write(folder, "slide_id,path\n" + "".join(f"s{i},absent.svs\n" for i in range(150))), folder)
    assert "150 problems" in message
    assert "\n  - ... and 50 more" in message


@pytest.mark.parametrize(
    "slide_id",
    [
        "",
        ".",
        "..",
        "../a",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "C:\\a",
        ".hidden",
        "a\0b",
        "a\nb",
        "a\x7f",
        "\udc80",
        " a",
        "é" * 101,
    ],
)
def test_ids_that_could_not_name_a_file_in_the_output_folder(slide_id):
    assert id_problem(slide_id)
    assert "\n" not in id_problem(slide_id)


@pytest.mark.parametrize("slide_id", ["a", "TCGA-A6-2671-01Z-00-DX1.13eff5a8", "Fall 12", "切片", "a..b", "x" * 200])
def test_ids_that_can(slide_id):
    assert id_problem(slide_id) == ""


@given(st.text())
def test_an_accepted_id_always_stays_one_file_inside_its_folder(slide_id):
    if not id_problem(slide_id):
        path = Path("out") / f"{slide_id}.zarr"
        assert path.parent == Path("out")
        assert path.stem == slide_id
        assert len(path.name.encode()) <= 255


@pytest.mark.parametrize(("first", "second"), [("Slide", "sLIDE"), ("caf\u00e9", "cafe\u0301"), ("straße", "STRASSE")])
def test_ids_that_some_file_systems_take_for_the_same(folder, first, second):
    message = refusal(write(folder, f"slide_id,path\n{first},a.svs\n{second},b.svs\n"), folder)
    assert "only in case" in message
    assert "a.svs" in message
    assert "b.svs" in message


def test_without_a_table_slides_are_found_and_sorted(folder):
    asked = []

    def find(sources, folder_of_tiles):
        asked.append((tuple(sources), folder_of_tiles))
        return [("b", folder / "b.svs"), ("a", folder / "a.svs")]

    cohort = load_cohort(CohortSettings(slides=("slides", "/data/*.svs"), folder_of_tiles=True), folder, find)
    assert asked == [((str(folder / "slides"), "/data/*.svs"), True)]
    assert cohort == Cohort((SlideRow("a", folder / "a.svs"), SlideRow("b", folder / "b.svs")))


def test_found_slides_must_have_usable_and_different_ids(folder):
    settings = CohortSettings(slides=("slides",))
    message = refusal(settings, folder, lambda *_: [("a", folder / "a.svs"), ("A", folder / "b.svs")])
    assert f"{folder / 'a.svs'}, and {folder / 'b.svs'}" in message
    assert "only in case" in message
    assert "holds a slash" in refusal(settings, folder, lambda *_: [("x/a", folder / "a.svs")])
    assert "no slides were found" in refusal(settings, folder, lambda *_: [])


def test_a_cohort_is_a_table_or_slides(folder):
    assert "no slides are given" in refusal(CohortSettings(), folder)
    assert "both a table and slides" in refusal(CohortSettings(table=Path("t.csv"), slides=("a",)), folder)


def labelled(*rows):
    return Cohort(
        tuple(SlideRow(f"s{n}", Path("a"), n, patient, labels={"label": label}) for n, (patient, label) in enumerate(rows, 2)),
        ("label",),
    )


def test_labels_of_a_patient_may_not_contradict_each_other():
    cohort = labelled(("p1", "MSI"), ("p1", "MSS"), ("p1", "MSI"), ("p2", "MSI"), ("p2", ""), (None, "MSS"), (None, "MSI"))
    check_labels(cohort, "label", "slide")
    with pytest.raises(UsageError, match="patient 'p1' is 'MSI' on line 2, 4 and 'MSS' on line 3"):
        check_labels(cohort, "label", "patient")
    check_labels(labelled(("p1", "MSI"), ("p1", ""), ("p2", "MSS")), "label", "patient")


def test_specimens_are_told_apart_however_they_and_their_patients_are_called():
    slides = [("A B", "C", "MSI"), ("A", "B C", "MSS"), ("A", "1", "MSI"), ("D", "1", "MSS")]
    rows = (SlideRow(f"s{n}", Path("a"), n, *whose, labels={"label": said}) for n, (*whose, said) in enumerate(slides))
    cohort = Cohort(tuple(rows), ("label",))
    check_labels(cohort, "label", "specimen")
    with pytest.raises(UsageError, match="patient 'A' is"):
        check_labels(cohort, "label", "patient")


def test_a_label_column_must_exist_and_hold_something():
    unlabelled = Cohort((SlideRow("s1", Path("a")),))
    with pytest.raises(UsageError, match=r"--set cohort.table=TABLE.csv with columns slide_id,path,patient_id,label gives"):
        check_labels(unlabelled, "label", "slide")
    with pytest.raises(UsageError, match=r"label columns: label; choose with --set mil.label=label"):
        check_labels(labelled(("p1", "MSI")), "Label", "slide")
    with pytest.raises(UsageError, match=r"no such label column, did you mean 'label'\?.*label columns: label"):
        check_labels(labelled(("p1", "MSI")), "labl", "slide")
    with pytest.raises(UsageError, match="no slide has this label"):
        check_labels(labelled(("p1", "")), "label", "slide")
