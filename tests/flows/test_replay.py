"""``pathfm run --replay``: a record is a promise that the same comes out again; what is not the same is named."""

from __future__ import annotations

import csv
import json
import shutil

import pytest

from pathfm.config import load_study
from pathfm.errors import ExitCode, UsageError
from pathfm.replaying import _as_recorded, replay
from pathfm.run_manifest import RunManifest, manifest_files
from pathfm.running import run_study
from pathfm.study_plan import make_plan
from pathfm.workflow import begin, open_study
from tests.flows.conftest import STUDY, run

FAST = ("compute.group_slides=4", "compute.threads=1", "compute.workers=1", "mil.controls=false")


class Studied:
    """A study with a cohort table, and slides, of its own."""

    def __init__(self, folder, slides):
        shutil.copytree(slides, folder / "slides")
        self.file, self.table, self.out = folder / "study.yaml", folder / "slides" / "cohort.csv", folder / "out"
        self.file.write_text(STUDY.format(out="out", table=self.table))
        with self.table.open(newline="") as stream:
            self.rows = list(csv.DictReader(stream))

    def write(self, rows):
        with self.table.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, self.rows[0])
            writer.writeheader()
            writer.writerows(rows)

    def opened(self):
        return load_study(self.file, FAST)

    def planned_record(self):
        """A record of a run that there was not: as planned, with nothing made."""
        study = self.opened()
        with RunManifest(study.out, "run", study):
            pass
        jobs = {
            f"{job.stage}/{job.group}": {"fingerprint": job.fingerprint, "inputs": dict(job.inputs), "content": ""}
            for job in make_plan(begin(study)).jobs
        }
        return self.changed(manifest_files(self.out)[-1], lambda record: record | {"jobs": jobs})

    @staticmethod
    def changed(record, change):
        """Another record beside a record."""
        other = record.with_name(f"changed-{record.name}")
        other.write_text(json.dumps(change(json.loads(record.read_text()))))
        return other


@pytest.fixture
def study(tmp_path, cohort_table):
    return Studied(tmp_path, cohort_table.parent)


def _refused(study, record):
    with pytest.raises(UsageError) as refused:
        replay(study.opened(), record)
    assert not study.out.with_name("out-replay").exists()
    return str(refused.value)


def test_what_would_not_be_the_same_is_refused_before_any_work(study):
    record = study.planned_record()
    study.write([study.rows[0] | {"label": "normal" if study.rows[0]["label"] == "lesion" else "lesion"}, *study.rows[1:]])
    label = _refused(study, record)
    assert "check/all: differs in cohort" in label
    assert "mil/all: differs in slide-01" in label
    assert "tile/" not in label
    study.write(study.rows[:-1])
    assert "differs in slide-12" in _refused(study, record)
    study.write(study.rows)
    shutil.copy(study.table.parent / study.rows[1]["path"], study.table.parent / study.rows[0]["path"])
    slide = _refused(study, record)
    assert "differs in slide-01" in slide
    assert "check/all" not in slide
    assert "no such record" in _refused(study, record.with_name("none.json"))
    assert "not the record of a study" in _refused(study, study.changed(record, lambda content: content | {"jobs": {}}))


def test_settings_that_are_tables_come_from_the_record_too(study):
    recorded = load_study(study.file, ["mil.options={dropout: 0.5}", "pretrain.sampling.weights={site: {a: 2}}"])
    for given in (recorded, study.opened()):
        again = _as_recorded(given, recorded.model_dump(mode="json"))
        assert (again.mil, again.pretrain) == (recorded.mil, recorded.pretrain)


def test_folders_with_any_character_stay_as_they_are(tmp_path):
    place = tmp_path / "\U0001f52c #1 \u00e4: x"
    given = load_study(None, [f"out={place / 'out'}", f"cohort.table={place / 'cohort.csv'}"])
    again = _as_recorded(given, given.model_dump(mode="json"))
    assert (again.out, again.cohort.table) == (place / "out", place / "cohort.csv")


@pytest.fixture(scope="module")
def grown(tmp_path_factory, cohort_table):
    """A study of nine slides that got three more, with a record of each run."""
    study = Studied(tmp_path_factory.mktemp("grown"), cohort_table.parent)
    for count in (9, 12):
        study.write(study.rows[:count])
        assert run_study(study.opened()) == ExitCode.DONE
    return study


@pytest.mark.long
def test_a_study_that_grew_is_replayed_with_its_list_and_its_folds(grown, tmp_path):
    record, again = manifest_files(grown.out)[-1], tmp_path / "again"
    code, out, err = run("run", grown.out, "--replay", record, "--set", f"out={again}")
    assert code == 0, (out, err)
    assert "replayed: 10 jobs, all with the same content" in out
    assert (again / "mil" / "splits.json").read_bytes() == (grown.out / "mil" / "splits.json").read_bytes()
    lists = [json.loads((out / "encoder" / "pinned.json").read_text())["slides"] for out in (again, grown.out)]
    assert lists[0] == lists[1]
    assert len(lists[0]) == 9


@pytest.mark.long
def test_what_comes_out_differently_is_named(grown):
    """A record of another content stands for work that does not come out the same twice."""
    record = manifest_files(grown.out)[-1]
    content = json.loads(record.read_text())
    content["jobs"]["extract/2-of-4"]["content"] = "0" * 64
    other = record.with_name("other.json")
    other.write_text(json.dumps(content))
    code, out, err = run("run", grown.out, "--replay", other)
    other.unlink()
    assert code == 3, (out, err)
    assert [line for line in out.splitlines() if "other content" in line] == [
        line for line in out.splitlines() if line.startswith("extract 2-of-4: other content, ")
    ]
    assert "extract 2-of-4: other content" in out
    code, _, err = run("run", grown.out, "--replay", record)
    assert code == 2
    assert "a replay needs a folder of its own" in err


@pytest.mark.long
def test_settings_come_from_the_record(grown, tmp_path):
    """Whatever the study says by now."""
    study = open_study(grown.out, ["mil.epochs=1", f"out={tmp_path / 'other'}"])
    assert replay(study.model_copy(update={"out": tmp_path / "other"}), manifest_files(grown.out)[-1]) == ExitCode.DONE
