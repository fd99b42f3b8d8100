"""What verify makes of receipts that are not there, and of what jobs have told of slides, on made-up artifacts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pathfm.errors import ExitCode
from pathfm.events import Events
from pathfm.jobs import Made, drop_old_receipts, write_receipts
from pathfm.run_manifest import RunManifest
from pathfm.store.manifest import file_digest
from pathfm.store.receipts import receipt_path
from pathfm.store.record import Outcome
from pathfm.study import Study
from pathfm.study_plan import Planned, StudyPlan
from pathfm.verification import verify


class Studied:
    """The stage extract of a study, whose files are texts."""

    def __init__(self, out):
        self.out, self.folder = out, out / "features" / "spec" / "enc"

    def file(self, slide_id):
        return self.folder / f"{slide_id}.h5"

    def make(self, slide_id, text, told=True):
        """Features of a slide; untold: not by the stage."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file(slide_id).write_text(text)
        if told:
            with Events(self.folder) as events:
                events.write("slide_done", stage="extract", slide_id=slide_id)

    def job(self, group, *slide_ids, made_of="recipe"):
        """The end of a job, as both engines have it; whatever lies there is hashed anew."""
        outcomes = {slide_id: Outcome(slide_id, "kept") for slide_id in slide_ids}
        made = Made(outcomes, lambda slide_id: (made_of, (self.file(slide_id),)))
        run = SimpleNamespace(layout=SimpleNamespace(out=self.out))
        write_receipts(run, [Planned("extract", group, "f", {}, {}, slide_ids, "forced")], made)

    def recorded(self, command="run", **study):
        with RunManifest(self.out, command, Study(out=self.out, **study)):
            pass

    def receipt(self, group):
        return receipt_path(self.out, "extract", group)


@pytest.fixture
def study(tmp_path):
    """A study of two groups, as its first run left it."""
    found = Studied(tmp_path / "out")
    for slide_id, group in (("a", "1-of-2"), ("b", "2-of-2")):
        found.make(slide_id, slide_id)
        found.job(group, slide_id)
    found.recorded()
    assert verify(found.out) == ExitCode.DONE
    return found


def verified(study, capsys):
    """Exit code of verify, its problems and its notes."""
    capsys.readouterr()
    code = verify(study.out)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    return (
        code,
        [line for line in lines if not line.startswith("note: ")],
        [line for line in lines if line.startswith("note: ")],
    )


MISSING = "receipts/extract/1-of-2.json: missing"


def test_a_receipt_that_is_gone_is_a_problem_and_no_later_command_hides_it(study, capsys):
    study.receipt("1-of-2").unlink()
    for command in ("extract", "tile"):
        code, (problem,), notes = verified(study, capsys)
        assert (code, notes) == (ExitCode.SOME_FAILED, []) and problem.startswith(f"{MISSING}, although a job told of it")
        study.recorded(command)
    study.file("a").unlink()
    code, problems, (note,) = verified(study, capsys)
    assert (code, problems) == (ExitCode.DONE, []) and note.startswith(f"note: {MISSING}, and so is all")


def test_a_receipt_that_a_killed_run_did_not_get_to_is_a_note(study, capsys):
    study.make("c", "c")
    study.job("3-of-2", "c")
    study.receipt("3-of-2").unlink()
    code, problems, (note,) = verified(study, capsys)
    assert (code, problems) == (ExitCode.DONE, []) and "3-of-2.json: missing: its run was killed" in note


def test_groups_that_are_no_more_are_told_of_before_their_receipts_go(study, capsys):
    study.job("1-of-1", "a", "b")
    drop_old_receipts(study.out, StudyPlan((Planned("extract", "1-of-1", "f", {}, {}, ("a", "b")),), ""))
    for _ in range(2):
        assert not study.receipt("1-of-2").exists() and verified(study, capsys) == (ExitCode.DONE, [], [])
        study.recorded()
    study.job("1-of-2", "a")  # as it was before
    study.recorded()
    study.receipt("1-of-2").unlink()
    assert verified(study, capsys)[0] == ExitCode.SOME_FAILED


def test_another_content_of_the_same_without_work_in_between_is_a_problem_in_whatever_group(study, capsys):
    study.make("a", "altered", told=False)
    for group, others in (("1-of-2", ()), ("1-of-1", ("b",))):
        study.job(group, "a", *others)
        study.recorded()
        code, (problem,), _ = verified(study, capsys)
        assert code == ExitCode.SOME_FAILED and problem.startswith("a: a job told of other content than the one before it")
    study.make("b", "made anew")
    study.job("1-of-1", "a", "b")
    assert [line[:3] for line in verified(study, capsys)[1]] == ["a: "], "work on one slide says nothing of another"
    study.make("a", "a", told=False)  # put back
    study.job("1-of-2", "a")
    study.job("1-of-1", "a", "b")
    assert not verified(study, capsys)[1]


def test_another_content_of_something_else_or_after_work_is_none(study, capsys):
    study.make("a", "of another recipe", told=False)
    study.job("1-of-2", "a", made_of="another recipe")
    study.make("b", "by another machine")
    study.job("2-of-2", "b")
    study.recorded()
    assert verified(study, capsys) == (ExitCode.DONE, [], [])


def test_what_was_made_again_since_its_receipt_is_a_note_until_a_job_hashes_it(study, capsys):
    study.make("a", "again")
    code, problems, (note,) = verified(study, capsys)
    assert (code, problems) == (ExitCode.DONE, [])
    assert note.startswith("note: features/spec/enc/a.h5: made again since by the stage extract; whether it was altered")
    study.make("b", "altered", told=False)
    assert verified(study, capsys)[1] == ["features/spec/enc/b.h5: differs from what was made"]
    study.file("a").unlink()
    assert verified(study, capsys)[1][0] == "features/spec/enc/a.h5: missing"


def test_a_classifier_that_was_trained_again_is_a_note_as_far_as_its_bundle_is_the_one(tmp_path, capsys):
    study = Studied(tmp_path / "out")
    table, bundle = study.out / "mil" / "predictions.csv", study.out / "mil" / "bundle" / "bundle.json"
    bundle.parent.mkdir(parents=True)

    def train(text):
        table.write_text(text)
        bundle.with_name("card").write_text(text)
        files = f'{{"card": "{file_digest(bundle.with_name("card"))}"}}'
        bundle.write_text(f'{{"format": "pathfm-bundle", "version": 1, "files": {files}}}')

    train("first")
    run = SimpleNamespace(layout=SimpleNamespace(out=study.out))
    write_receipts(run, [Planned("mil", "all", "f", {}, {}, ())], Made(whole=(table, bundle)))
    study.recorded("run")
    study.recorded("mil train")  # of the same, it makes nothing
    table.write_text("altered")
    assert verified(study, capsys)[:2] == (ExitCode.SOME_FAILED, ["mil/predictions.csv: differs from what was made"])
    train("second")
    assert len(verified(study, capsys)[1]) == 2
    study.recorded("mil train", mil={"seed": 1})
    code, problems, notes = verified(study, capsys)
    assert (code, problems, len(notes)) == (ExitCode.DONE, [], 2) and "made again since by `pathfm mil train`" in notes[0]
    train("altered")
    assert verified(study, capsys)[1] == ["mil/bundle/bundle.json: differs from what was made"]
