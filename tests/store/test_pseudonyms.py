"""Names of slides, patients and specimens become keyed hashes as a cohort is read."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from pathfm.chain import new_key
from pathfm.config import load_study
from pathfm.errors import UsageError
from pathfm.store import pseudonyms as module
from pathfm.store.cohort import check_labels, load_cohort
from pathfm.store.pseudonyms import Pseudonyms, refuse_named_files, write_pseudonyms
from pathfm.study import CohortSettings

TABLE = (
    "slide_id,path,patient_id,specimen_id,label\n"
    "DOE-1,doe.svs,DOE JANE,1,x\nDOE-2,doe.svs,DOE JANE,1,x\nROE-1,roe.svs,ROE RICHARD,1,y\n"
)


@pytest.fixture
def folder(tmp_path):
    for name in ("doe.svs", "roe.svs"):
        (tmp_path / name).touch()
    (tmp_path / "cohort.csv").write_text(TABLE)
    new_key(tmp_path / "key")
    return tmp_path


def hidden(folder, key="key"):
    return load_cohort(CohortSettings(table=Path("cohort.csv"), pseudonym_key=Path(key)), folder)


def test_names_become_pseudonyms(folder):
    cohort, plain = hidden(folder), load_cohort(CohortSettings(table=Path("cohort.csv")), folder)
    names = [name for row in cohort.rows for name in (row.slide_id, row.patient_id, row.specimen_id)]
    assert all(re.fullmatch("P[0-9a-f]{16}", name) for name in names)
    assert len(set(names)) == 3 + 2 + 1
    assert [(row.path, row.line, row.labels) for row in cohort.rows] == [(row.path, row.line, row.labels) for row in plain.rows]
    assert cohort.rows[0].patient_id == cohort.rows[1].patient_id != cohort.rows[2].patient_id
    assert hidden(folder) == cohort
    new_key(folder / "other")
    assert not {row.slide_id for row in hidden(folder, "other").rows} & {row.slide_id for row in cohort.rows}


def test_other_tables_and_orders_give_the_same_pseudonyms(folder):
    before = {row.path.name: row.patient_id for row in hidden(folder).rows}
    head, *lines = TABLE.splitlines()
    (folder / "cohort.csv").write_text("\n".join([head, "NEW,doe.svs,NEW,2,x", *reversed(lines)]))
    after = {row.path.name: row.patient_id for row in hidden(folder).rows[1:]}
    assert after == before


def test_slides_without_a_table(folder):
    settings = CohortSettings(slides=("x",), pseudonym_key=Path("key"))
    rows = load_cohort(settings, folder, lambda sources, tiles: [("DOE-1", folder / "doe.svs")]).rows
    assert rows[0].slide_id == hidden(folder).rows[0].slide_id
    assert rows[0].patient_id is None


def test_how_accents_are_written_does_not_count(folder):
    pseudonyms = Pseudonyms(folder / "key")
    assert pseudonyms.of("patient", "Jos\u00e9") == pseudonyms.of("patient", "Jose\u0301") != pseudonyms.of("patient", "Jose")
    assert pseudonyms.of("patient", "a") != pseudonyms.of("slide", "a")


def test_notes_and_contradictions_name_nobody(folder, capsys):
    (folder / "patients.csv").write_text("patient_id,age\nDOE JANE,50\nMOE MAX,60\n")
    settings = CohortSettings(table=Path("cohort.csv"), clinical=Path("patients.csv"), pseudonym_key=Path("key"))
    cohort = load_cohort(settings, folder)
    assert len(cohort.notes) == 2
    (folder / "cohort.csv").write_text(TABLE.replace("1,x\nROE", "1,y\nROE"))
    with pytest.raises(UsageError) as caught:
        check_labels(hidden(folder), "label", "patient")
    told = " ".join([*cohort.notes, *capsys.readouterr(), str(caught.value)])
    assert "no row in patients.csv" in told
    assert not re.search("doe|jane|roe|richard|moe", told, re.IGNORECASE)
    (folder / "names.csv").write_text("slide_id,patient_id\nDOE.svs,DOE\n")
    cohort = load_cohort(CohortSettings(table=Path("names.csv"), pseudonym_key=Path("key")), folder, needs_slides=False)
    assert cohort.notes == ("1 slide_ids are taken without folder and ending",)


def test_a_collision_is_refused(folder, monkeypatch):
    monkeypatch.setattr(module, "DIGITS", 1)
    pseudonyms = Pseudonyms(folder / "key")
    with pytest.raises(UsageError, match="two of kind slide"):
        [pseudonyms.of("slide", str(number)) for number in range(17)]


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read: No such file"), (b"short", "a key of 5 bytes")])
def test_keys_that_are_none(folder, content, said):
    (folder / "key").unlink()
    if content:
        (folder / "key").write_bytes(content)
    with pytest.raises(UsageError, match=said):
        hidden(folder)


def test_the_table_of_who_is_who(folder):
    assert write_pseudonyms(folder / "cohort.csv", folder / "key", folder / "who.csv") == 3
    assert (folder / "who.csv").stat().st_mode & 0o777 == 0o600
    with (folder / "who.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    cohort = hidden(folder)
    for row, told in zip(cohort.rows, rows, strict=True):
        assert (told["slide_id_pseudonym"], told["patient_id_pseudonym"]) == (row.slide_id, row.patient_id)
        assert told["specimen_id_pseudonym"] == row.specimen_id
    assert (rows[0]["slide_id"], rows[0]["patient_id"]) == ("DOE-1", "DOE JANE")
    with pytest.raises(UsageError, match="there already"):
        write_pseudonyms(folder / "cohort.csv", folder / "key", folder / "who.csv")


def test_a_table_of_nobody_is_refused(folder):
    (folder / "none.csv").write_text("slide_id,path,patient_id\n\n")
    with pytest.raises(UsageError, match="the table has no rows"):
        write_pseudonyms(folder / "none.csv", folder / "key", folder / "nobody.csv")
    assert not (folder / "nobody.csv").exists()


def test_files_that_go_by_names_are_refused(folder):
    refuse_named_files(load_study(None, [f"tile.coords={folder}"]))
    refuse_named_files(load_study(None, [f"cohort.pseudonym_key={folder / 'key'}"]))
    with pytest.raises(UsageError, match=r"tile\.coords"):
        refuse_named_files(load_study(None, [f"cohort.pseudonym_key={folder / 'key'}", f"tile.coords={folder}"]))
