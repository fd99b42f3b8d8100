"""The night batch without networks: what is whole, what is known, who may work, what a kill leaves, and how well it is."""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from contextlib import suppress
from types import SimpleNamespace

import pytest

from pathfm.audit import audit
from pathfm.batch import ledger as ledger_module
from pathfm.batch import runner
from pathfm.batch.health import FILE as HEALTH
from pathfm.batch.health import health, in_words
from pathfm.batch.inbox import Inbox, InboxError, content_identity, stamp_of
from pathfm.batch.ledger import Ledger
from pathfm.batch.night import _check_folders, _take, batch
from pathfm.batch.options import BatchOptions, Control
from pathfm.batch.results import Outbox, shown_decision
from pathfm.batch.runner import NoRoomError, Runner
from pathfm.batch.stop import Stop
from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.events import Events
from pathfm.log import say, status
from pathfm.store.commit import commit_dir, write_json
from pathfm.store.lease import Leases
from pathfm.store.manifest import file_digest
from pathfm.store.pseudonyms import Pseudonyms
from pathfm.store.record import Outcome
from pathfm.verification import verify


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def look(inbox, seconds=0.0):
    inbox.clock.now += seconds
    found = inbox.look()
    return [glance.slide_id for glance in found.whole], [glance.slide_id for glance in found.unsettled]


def test_a_slide_is_whole_when_two_looks_and_the_time_between_them_saw_it_unchanged(tmp_path):
    slide, inbox = tmp_path / "a.svs", Inbox(tmp_path, 30, clock=Clock())
    slide.write_bytes(b"half")
    os.utime(slide, (0, 0))  # clocks of scanners may be wrong: an old time proves nothing
    assert look(inbox) == ([], ["a"])
    assert look(inbox, 29) == ([], ["a"])
    slide.write_bytes(b"half and more")
    assert look(inbox, 2) == ([], ["a"])
    assert look(inbox, 31) == (["a"], [])
    slide.write_bytes(b"another of the same size"[:13])
    assert look(inbox, 31) == ([], ["a"])
    assert look(inbox, 31) == (["a"], [])
    slide.unlink()
    assert look(inbox) == ([], [])


def test_with_a_sentinel_only_the_sentinel_counts(tmp_path):
    (tmp_path / "a.svs").write_bytes(b"x")
    (tmp_path / "a.svs.done").touch()
    (tmp_path / "b.svs").write_bytes(b"x")
    assert look(Inbox(tmp_path, 30, ".done", Clock())) == (["a"], ["b"])


def test_content_is_known_again_under_another_name_and_not_after_a_change(tmp_path):
    plain = tmp_path / "a.svs"
    plain.write_bytes(b"bytes")
    assert content_identity(plain) == hashlib.sha256(b"bytes").hexdigest()
    for name in ("one", "two"):
        (tmp_path / f"{name}.mrxs").write_bytes(b"key")
        (tmp_path / name).mkdir()
        (tmp_path / name / "Data0000.dat").write_bytes(b"pixels")
    assert content_identity(tmp_path / "one.mrxs") == content_identity(tmp_path / "two.mrxs")
    before = stamp_of(tmp_path / "two.mrxs")
    (tmp_path / "two" / "Data0000.dat").write_bytes(b"PIXELS")
    assert content_identity(tmp_path / "one.mrxs") != content_identity(tmp_path / "two.mrxs")
    assert stamp_of(tmp_path / "two.mrxs") != before
    for name in ("one.vms", "one_map2.jpg", "one.opt"):
        (tmp_path / name).write_bytes(name.encode())
    only = content_identity(tmp_path / "one.vms")
    (tmp_path / "one_map2.jpg").write_bytes(b"other")
    assert content_identity(tmp_path / "one.vms") != only


def test_an_inbox_that_is_away_is_told_from_an_empty_one(tmp_path):
    with pytest.raises(InboxError, match="cannot be read"):
        Inbox(tmp_path / "away").look()
    assert Inbox(tmp_path).look() == ((), (), ())


def test_the_ledger_knows_everything_again_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.use("b1", "", False)
        first = ledger.add("a.svs", "s1", "1" * 64, "a")
        assert ledger.add("copy.svs", "s2", "1" * 64, "copy") is first
        bad = ledger.add("bad.svs", "s3", "2" * 64, "bad")
        ledger.start(first, alone=False)
        ledger.done(first, "abstained", "b1")
        ledger.quarantine(bad, "broken")
    path.write_bytes(path.read_bytes() + b'{"kind": "done", "ide')
    with Ledger(path) as again:
        assert again.entries == ledger.entries and again.bundle == "b1"
        assert again.known("copy.svs", "s2").name == "a-11111111" and again.known("copy.svs", "s9") is None
        assert again.counts == {"done": 1, "abstained": 1, "quarantined": 1, "duplicates": 1}
        again.try_again(again.entries["2" * 64])
        assert again.counts["quarantined"] == 0
    assert "duplicate_of" in path.read_text()
    path.write_text(path.read_text().replace('"kind": "bundle"', '"kind": "bungle"'))
    with pytest.raises(StoreError, match="line 2 of the ledger"):
        Ledger(path)


def test_another_bundle_must_be_meant(tmp_path):
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.use("b1", "", False)
        ledger.use("b1", "", False)
        with pytest.raises(UsageError, match="--new-bundle"):
            ledger.use("b2", "", False)
        ledger.use("b2", "", True)
        assert ledger.bundle == "b2"
        with pytest.raises(UsageError, match="other names"):
            ledger.use("b2", "key", False)


def test_folders_that_lie_in_each_other_and_foreign_ones_are_refused(tmp_path):
    bundle, inbox, outbox = (tmp_path / name for name in ("bundle", "in", "out"))
    with pytest.raises(UsageError, match="no such folder"):
        _check_folders(bundle, inbox, outbox)
    inbox.mkdir()
    _check_folders(bundle, inbox, outbox)
    for wrong in (inbox, inbox / "out", tmp_path, bundle / "out"):
        with pytest.raises(UsageError, match="lies in the"):
            _check_folders(bundle, inbox, wrong)
    outbox.mkdir()
    (outbox / "predictions.csv").touch()
    with pytest.raises(UsageError, match="no outbox of a night batch"):
        _check_folders(bundle, inbox, outbox)


def test_a_second_run_is_refused_by_the_name_of_the_first(tmp_path):
    with Leases(60) as first, Leases(60) as second:
        _take(first, Outbox(tmp_path))
        with pytest.raises(UsageError, match=rf"process {os.getpid()} on ") as refused:
            _take(second, Outbox(tmp_path))
        assert refused.value.exit_code == ExitCode.USAGE
        first.close()
        _take(second, Outbox(tmp_path))


def test_a_refused_batch_leaves_no_outbox_and_a_bundle_that_cannot_be_compared_with_says_so(tmp_path, monkeypatch, capsys):
    def refused(*_):
        raise UsageError("no bundle")

    inbox, outbox, options = tmp_path / "in", tmp_path / "out", BatchOptions(settle_s=0.0)
    inbox.mkdir()
    monkeypatch.setattr("pathfm.batch.rounds.Predictor", refused)
    with pytest.raises(UsageError, match="no bundle"):
        batch(tmp_path / "bundle", inbox, outbox, options)
    assert not outbox.exists()
    monkeypatch.setattr("pathfm.batch.rounds.Predictor", lambda *_: FakePredictor())
    assert batch(tmp_path / "bundle", inbox, outbox, options) == ExitCode.DONE
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("this bundle has no drift reference")
    assert said[2:] == ["finished: 0 done, 0 quarantined, 0 duplicates, 0 waiting"]


Answer = namedtuple("Answer", "result")


class FakePredictor:
    """Says of a slide what its bytes say: good, bad, or something that breaks the run."""

    bundle, drift, study = SimpleNamespace(digest="b1"), None, None

    def __init__(self):
        self.asked = []
        self.meanwhile = lambda: None

    def predict(self, slides):
        self.asked.append(sorted(slides))
        said = {name: path.read_text() for name, path in slides.items()}
        say("of a stage")
        status(next(iter(slides)), "failed", "of a stage")
        self.meanwhile()
        if "killer" in said.values():
            raise RuntimeError("as a kill")
        outcomes = {name: Outcome(name, "done" if "good" in text else "failed", text) for name, text in said.items()}
        return Answer(SimpleNamespace(outcome=outcomes.get))


def fake_commit(box, entry, bundle, found, check):
    with commit_dir(box.results / entry.name, check) as folder:
        (folder / "predictions.csv").write_text(f"slide_id\n{entry.slide_id}\n")
        about = {"name": entry.name, "slide_id": entry.slide_id, "identity": entry.identity, "bundle": bundle, "drift": None}
        files = {"predictions.csv": file_digest(folder / "predictions.csv")}
        said = {"outcome": "predicted", "decision": "x", "time": "t", "files": files, "events": found}
        write_json(folder / "result.json", about | said)


@pytest.fixture
def night(tmp_path, monkeypatch):
    """Runs a night: night(options) -> exit code; its predictor, inbox and outbox hang on it."""
    predictor, box, inbox = FakePredictor(), Outbox(tmp_path / "out"), tmp_path / "in"
    monkeypatch.setattr(runner, "commit_result", lambda *given: fake_commit(*given[:2], predictor.bundle.digest, *given[3:]))
    monkeypatch.setattr(Runner, "_findings", lambda self, *_: self.events.head)
    inbox.mkdir()

    def run(names=None, **options):
        with Stop() as stop, Leases(60) as leases, Ledger(box.folder / "ledger.jsonl") as ledger, Events(box.folder) as events:
            ledger.use(predictor.bundle.digest, "", options.pop("new_bundle", False))
            options = BatchOptions(**{"settle_s": 0.0, "min_free_gb": 0.0, **options})
            control = Control(options, stop, _take(leases, box), names)
            return Runner(Inbox(inbox, 0.0), box, ledger, events, predictor, control).run()

    run.predictor, run.box, run.inbox = predictor, box, inbox
    return run


def put(night, **slides):
    for name, text in slides.items():
        (night.inbox / f"{name}.svs").write_text(text)


def results(night):
    return sorted(path.name.rpartition("-")[0] for path in night.box.results.glob("*"))


def reasons(night):
    return {said["slide_id"]: said["reason"] for said in (json.loads(path.read_text()) for path in night.box.records)}


def test_every_content_is_worked_on_once_and_the_inbox_stays_as_it_was(night):
    put(night, a="good a", b="good b", copy="good a", bad="broken")
    before = {path.name: path.stat() for path in night.inbox.iterdir()}
    assert night(round=2) == ExitCode.SOME_FAILED
    assert results(night) == ["a", "b"] and reasons(night) == {"bad": "broken"}
    assert night.predictor.asked == [["a", "b"], ["bad"]]
    (night.inbox / "a.svs").rename(night.inbox / "renamed.svs")
    put(night, b="good b, scanned again")
    assert night() == ExitCode.DONE  # what an earlier run has told is not told again
    assert results(night) == ["a", "b", "b"] and night.predictor.asked[2:] == [["b"]]
    said = json.loads((night.box.folder / HEALTH).read_text())
    assert said["counts"] == {"done": 3, "abstained": 0, "quarantined": 1, "duplicates": 2, "waiting": 0, "ignored": 0}
    assert len(night.box.index.read_text().splitlines()) == 4 and not (night.box.folder / ".work").exists()
    assert {path.name for path in night.inbox.iterdir()} == (before.keys() - {"a.svs"}) | {"renamed.svs"}


def test_one_line_per_slide_says_what_became_of_it_and_the_oldest_of_copies_is_the_slide(night, capsys):
    put(night, a="good", bad="broken", copy="good", z="good")
    for age, name in enumerate(("copy", "z", "a", "bad")):
        os.utime(night.inbox / f"{name}.svs", (0, 1000 + age - (name == "z")))  # copy and z are of one age
    night()
    said, (folder,) = capsys.readouterr(), night.box.results.iterdir()
    assert said.err.splitlines() == [
        "duplicate z  same content as copy",
        "duplicate a  same content as copy",
        f"done    copy  x -> results/{folder.name}",
        "quarantine bad  broken",
    ]
    assert said.out.splitlines() == [
        "finished: 1 done, 1 quarantined, 2 duplicates, 0 waiting",
        "quarantined in this run: bad",
    ]


def test_a_decision_is_shown_with_its_probability():
    values = {"normal": 0.07, "tumour": 0.93}
    assert shown_decision({"decision": "tumour", "calibrated": values}) == "tumour (0.93)"
    assert shown_decision({"decision": "abstain:uncertain", "calibrated": {}, "probability": values}) == (
        "abstain:uncertain (tumour 0.93)"
    )
    assert shown_decision({"decision": "", "probability": {"risk": 1.5}}) == "risk 1.50"
    assert shown_decision({"decision": "", "probability": {"per_base": 3.2e-7}}) == "per_base 3.2e-07"
    assert shown_decision({"decision": "abstain:no tiles", "probability": {}}) == "abstain:no tiles"


def test_a_slide_that_kills_the_run_is_found_out_and_stops_nobody_else(night):
    put(night, a="good a", k="killer", z="good z")
    for asked in ([["a", "k", "z"]], [["more1"], ["a"], ["k"]], [["more2"], ["z"], ["k"]]):
        night.predictor.asked.clear()
        with pytest.raises(RuntimeError):
            night()
        assert night.predictor.asked == asked
        put(night, **{f"more{len(results(night)) // 2 + 1}": f"good {asked}"})
    assert night() == ExitCode.SOME_FAILED
    assert results(night) == ["a", "more1", "more2", "more3", "z"] and "killed 2 times" in reasons(night)["k"]
    assert night() == ExitCode.DONE


def killed_at(monkeypatch, point):
    """A run ends at this point as if it were killed."""

    def crash(name):
        if name == point:
            raise RuntimeError("as a kill")

    for module in (runner, ledger_module):
        monkeypatch.setattr(module, "crash_point", crash)


def told(box):
    """Identity -> bundle, by the events of results."""
    lines = [json.loads(line) for path in box.folder.glob("events-*.jsonl") for line in path.read_text().splitlines()]
    return {line["identity"]: line["bundle"] for line in lines if line["kind"] == "result_written"}


@pytest.mark.parametrize("point", ["batch.result.told", "batch.ledger.done", "after the commit"])
def test_a_result_that_was_committed_before_a_kill_is_told_of_and_not_made_again(night, monkeypatch, point):
    put(night, a="good a")
    with monkeypatch.context() as killed, pytest.raises(RuntimeError):
        if point == "after the commit":
            killed.setattr(runner, "file_digest", lambda _: (_ for _ in ()).throw(RuntimeError("as a kill")))
        killed_at(killed, point)
        night()
    assert results(night) == ["a"]
    night.predictor.asked.clear()
    night.predictor.bundle = SimpleNamespace(digest="b2")
    assert night(new_bundle=True) == ExitCode.DONE and not night.predictor.asked
    assert list(told(night.box).values()) == ["b1"]
    with Ledger(night.box.folder / "ledger.jsonl") as ledger:
        assert [(entry.state, entry.bundle) for entry in ledger.entries.values()] == [("done", "b1")]
    assert verify(night.box.folder) == ExitCode.DONE and audit(night.box.folder) == ExitCode.DONE


def test_a_record_does_not_outlive_success(night, monkeypatch):
    put(night, a="broken")
    with monkeypatch.context() as killed, pytest.raises(RuntimeError):
        killed_at(killed, "batch.quarantine.recorded")
        night()
    night.predictor.predict = lambda slides: Answer(SimpleNamespace(outcome=lambda name: Outcome(name, "done", "")))
    assert len(night.box.records) == 1
    assert night() == ExitCode.DONE and results(night) == ["a"] and not night.box.records
    assert health(night.box.folder) == ExitCode.DONE


def test_a_damaged_old_result_is_told_of_and_stops_nobody(night, capsys, caplog):
    put(night, a="good a", b="good b")
    night()
    first, second = sorted(night.box.results.glob("*"))
    whole = (first / "result.json").read_bytes(), (second / "predictions.csv").read_bytes()
    (first / "result.json").write_bytes(b"\0\0")
    (second / "predictions.csv").write_bytes(b"\xff\xfe")
    put(night, c="good c")
    assert night() == ExitCode.DONE and results(night) == ["a", "b", "c"]
    assert sum("restore it from a copy" in record.getMessage() for record in caplog.records) == 2
    assert [line.partition("-")[0] for line in night.box.index.read_text().splitlines()] == ["result,slide_id", "c"]
    third = next(night.box.results.glob("c-*"))
    third.rename(night.box.folder.with_name("aside"))  # moved away, and no new slide comes
    assert night() == ExitCode.DONE and not night.box.index.exists()
    assert json.loads((night.box.folder / HEALTH).read_text())["damaged"] == [first.name, second.name, third.name]
    night.box.folder.with_name("aside").rename(third)
    night()
    capsys.readouterr()
    assert health(night.box.folder) == ExitCode.SOME_FAILED
    assert f"2 results cannot be read, to be restored from a copy: {first.name}, {second.name}" in capsys.readouterr().out
    assert verify(night.box.folder) == ExitCode.SOME_FAILED
    (first / "result.json").write_bytes(whole[0])
    (second / "predictions.csv").write_bytes(whole[1])
    assert night() == ExitCode.DONE and health(night.box.folder) == ExitCode.DONE
    assert verify(night.box.folder) == ExitCode.DONE


def without(lines, place):
    return [*lines[:place], *lines[place + 1 :]]


LEDGER_ATTACKS = {
    "reason": lambda lines: [line.replace(b"broken", b"no tissue") for line in lines],
    "verdict": lambda lines: [line.replace(b"predicted", b"abstained") for line in lines],
    "time": lambda lines: [lines[0].replace(b"20", b"19", 1), *lines[1:]],
    "dropped": lambda lines: without(lines, 3),
    "dropped first": lambda lines: lines[1:],
    "dropped last": lambda lines: lines[:-1],
    "cut off": lambda lines: [*lines[:-2], lines[-2][:20]],
    "swapped": lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
    "copied": lambda lines: [*lines, lines[-1]],
    "inserted": lambda lines: [*lines[:2], lines[1], *lines[2:]],
    "emptied": lambda _: [],
}


def test_whatever_was_done_to_the_ledger_is_found_and_no_later_run_hides_it(night, capsys, monkeypatch):
    now = datetime.datetime.now(datetime.UTC)  # all in one second: lines that are written again are the same to the byte
    frozen = SimpleNamespace(UTC=datetime.UTC, datetime=SimpleNamespace(now=lambda _: now))
    monkeypatch.setattr(ledger_module, "datetime", frozen)
    put(night, a="good a", bad="broken")
    assert night() == ExitCode.SOME_FAILED and night() == ExitCode.DONE
    assert verify(night.box.folder) == audit(night.box.folder) == ExitCode.DONE
    assert "note" not in capsys.readouterr().out
    ledger, aside = night.box.folder / "ledger.jsonl", night.box.folder.with_name("aside")
    shutil.copytree(night.box.folder, aside)
    for attack, change in LEDGER_ATTACKS.items():
        lines = ledger.read_bytes().splitlines(keepends=True)
        ledger.write_bytes(b"".join(change(lines)))
        assert verify(night.box.folder) == ExitCode.SOME_FAILED, attack
        assert "  ledger.jsonl: " in capsys.readouterr().out, attack
        with suppress(StoreError):  # not every such ledger can be gone on with
            night()
        assert verify(night.box.folder) == ExitCode.SOME_FAILED, attack
        shutil.rmtree(night.box.folder)
        shutil.copytree(aside, night.box.folder)
    ledger.unlink()
    assert verify(night.box.folder) == ExitCode.SOME_FAILED


KILLED = """
import sys
from pathlib import Path
from pathfm.batch.ledger import Entry, Ledger
from pathfm.batch.results import Outbox
with Ledger(Path(sys.argv[1], "ledger.jsonl")) as ledger:
    Outbox(Path(sys.argv[1])).write_record(ledger.add("b.svs", "s", "2" * 64, "b"), "broken")
"""


def killed_really(folder, point):
    """A process that is killed there, at its work on the ledger."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)], env={**os.environ, "PATHFM_CRASH_AT": point}, check=False
    )
    assert done.returncode == -signal.SIGKILL


def test_a_line_of_the_ledger_that_a_kill_left_untold_is_told_by_the_next_run(night, capsys):
    put(night, a="good a")
    night()
    folder, path = night.box.folder, night.box.folder / "ledger.jsonl"
    before = path.read_bytes()
    killed_really(folder, "batch.ledger.file")
    assert path.read_bytes().count(b"\n") == before.count(b"\n") + 1
    assert verify(folder) == audit(folder) == ExitCode.DONE
    assert "note: ledger.jsonl: no event tells of 1 line behind line 5: a run was killed just then" in capsys.readouterr().out
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines(keepends=True)[-1])  # one more than a kill can leave
    assert verify(folder) == ExitCode.SOME_FAILED
    path.write_bytes(whole + b'{"torn')
    assert verify(folder) == night() == verify(folder) == audit(folder) == ExitCode.DONE
    assert "note: ledger" not in capsys.readouterr().out.rpartition("finished")[2]
    path.write_bytes(before)
    assert verify(folder) == ExitCode.SOME_FAILED


def test_a_quarantine_record_that_a_kill_prevented_is_written_by_the_next_run(night):
    put(night, a="good a")
    night()
    killed_really(night.box.folder, "batch.quarantine.told")
    assert not night.box.records
    assert verify(night.box.folder) == night() == verify(night.box.folder) == audit(night.box.folder) == ExitCode.DONE


def test_quarantine_records_that_were_altered_made_up_or_removed(night, capsys):
    put(night, bad="broken")
    night()
    (path,) = night.box.records
    whole = path.read_bytes()
    assert verify(night.box.folder) == ExitCode.DONE and "note" not in capsys.readouterr().out
    changes = {b"broken": b"no tissue", b'"since": "2': b'"since": "1', b'"identity": "': b'"identity": "0', whole[40:]: b""}
    for before, after in changes.items():
        path.write_bytes(whole.replace(before, after))
        assert verify(night.box.folder) == ExitCode.SOME_FAILED
        assert f"  quarantine/{path.name}: " in capsys.readouterr().out
    path.write_bytes(whole)
    path.with_name("more.json").write_bytes(whole.replace(b'"slide_id": "bad"', b'"slide_id": "other"'))
    assert verify(night.box.folder) == ExitCode.SOME_FAILED
    path.with_name("more.json").unlink()
    path.unlink()  # that is how another attempt is asked for
    capsys.readouterr()
    assert verify(night.box.folder) == ExitCode.DONE
    assert "was removed: the next run tries that slide again" in capsys.readouterr().out
    night()
    assert verify(night.box.folder) == ExitCode.DONE and "note" not in capsys.readouterr().out


def test_an_outbox_of_an_earlier_version_is_pinned_by_the_first_run_of_this_one(night, capsys):
    put(night, bad="broken")
    night()
    for path in night.box.folder.glob("events-*.jsonl"):  # as its events were: of slides only
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "ledger_" not in line and "quarantine_w" not in line))
    assert verify(night.box.folder) == ExitCode.DONE
    said = capsys.readouterr().out
    assert "note: ledger.jsonl: no event tells of it" in said and "of an earlier version of pathfm" in said
    night()
    ledger = night.box.folder / "ledger.jsonl"
    assert verify(night.box.folder) == ExitCode.DONE and "ledger.jsonl" not in capsys.readouterr().out
    ledger.write_bytes(ledger.read_bytes().replace(b"broken", b"no tissue"))
    assert verify(night.box.folder) == ExitCode.SOME_FAILED


@pytest.mark.parametrize("cut", [0, 10])
def test_a_full_disk_leaves_no_half_line_in_the_ledger(tmp_path, cut):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.add("a.svs", "s1", "1" * 64, "a")
        real = ledger._stream

        class Full:
            """Takes a few bytes of a line, and then none; whether what it took can be taken back is the question."""

            room = cut

            def __getattr__(self, name):
                return getattr(real, name)

            def write(self, data):
                taken, self.room = data[: self.room], 0
                if not taken:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real.write(taken)

        ledger._stream = Full()
        with pytest.raises(StoreError, match="the disk is full"):
            ledger.add("b.svs", "s2", "2" * 64, "b")
        assert path.read_bytes().endswith(b"}\n")
        ledger._stream = real
        real.write(b"what could not be taken back")
        ledger.add("c.svs", "s3", "3" * 64, "c")
    with Ledger(path) as again:
        assert [entry.slide_id for entry in again.entries.values()] == ["a", "c"]


def test_a_slide_that_changes_or_goes_while_it_is_worked_on_is_left_for_later(night):
    put(night, a="good a", b="broken b")

    def meanwhile():
        put(night, a="good but other")
        (night.inbox / "b.svs").unlink(missing_ok=True)
        night.predictor.meanwhile = lambda: None

    night.predictor.meanwhile = meanwhile
    assert night() == ExitCode.DONE
    assert results(night) == [] and reasons(night) == {}
    assert night() == ExitCode.DONE
    (result,) = night.box.results.glob("*")
    assert result.name.endswith(hashlib.sha256(b"good but other").hexdigest()[:8])


def test_a_removed_record_asks_for_another_attempt(night):
    put(night, bad="broken")
    night()
    shutil.rmtree(night.box.quarantine)
    assert night() == ExitCode.SOME_FAILED and len(night.predictor.asked) == 2 and reasons(night) == {"bad": "broken"}


def test_names_that_cannot_name_a_folder_and_files_that_cannot_be_read_have_reasons(night, monkeypatch):
    put(night, **{"a\nb": "good a", "c": "good c", "away": "good"})
    real = runner.content_identity

    def identity(path):
        if path.stem == "away":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(runner, "content_identity", identity)
    assert night() == ExitCode.SOME_FAILED
    found = reasons(night)
    assert results(night) == ["c"] and "control character" in found.pop("'a\\nb'")
    assert found == {"away": "the file cannot be read: Permission denied"}
    monkeypatch.setattr(runner, "content_identity", real)
    assert night() == ExitCode.DONE and results(night) == ["away", "c"] and len(reasons(night)) == 1


def test_pseudonyms_are_all_that_leaves_the_inbox(night, tmp_path, capfd):
    (tmp_path / "key").write_bytes(bytes(range(64)))
    put(night, miller="good", miller_bad="broken", miller_copy="good")
    assert night(Pseudonyms(tmp_path / "key")) == ExitCode.SOME_FAILED
    (name,) = results(night)
    assert re.fullmatch("P[0-9a-f]{16}", name) and len(reasons(night)) == 1
    written = [str(path) + path.read_text() for path in night.box.folder.rglob("*") if path.is_file()]
    assert "miller" not in "".join([*written, *capfd.readouterr()])


def test_a_full_drive_is_no_slides_fault(night):
    put(night, a="the disk is full (make room)")
    with pytest.raises(NoRoomError):
        night()
    with pytest.raises(NoRoomError, match="are free for the outbox"):
        night(min_free_gb=1e9)
    assert reasons(night) == {} and health(night.box.folder) == ExitCode.INTERNAL
    put(night, a="good a")
    assert night() == ExitCode.DONE and health(night.box.folder) == ExitCode.DONE


def test_told_to_stop_it_ends_without_loss_and_blames_no_slide(night):
    put(night, a="good a", b="good b")
    night.predictor.meanwhile = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert night() == ExitCode.INTERRUPTED
    assert night(watch=True) == ExitCode.DONE
    assert results(night) == [] and json.loads((night.box.folder / HEALTH).read_text())["state"] == "stopped"
    night.predictor.meanwhile = lambda: None
    assert night() == ExitCode.DONE and night.predictor.asked == [["a", "b"]] * 3 and results(night) == ["a", "b"]


def test_a_round_that_is_stopped_midway_leaves_a_table_of_what_is_there(night, monkeypatch):
    put(night, a="good a", b="good b")
    commit = runner.commit_result

    def stopped(*given):
        commit(*given)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner, "commit_result", stopped)
    assert night() == ExitCode.INTERRUPTED and results(night) == ["a"]
    assert len(night.box.index.read_text().splitlines()) == 2
    assert verify(night.box.folder) == audit(night.box.folder) == ExitCode.DONE


def test_health_tells_a_well_batch_from_a_sick_one(night, tmp_path, capsys):
    with pytest.raises(UsageError):
        health(tmp_path / "absent")
    assert health(night.inbox) == ExitCode.INTERNAL
    put(night, a="good a")
    night()
    capsys.readouterr()
    assert health(night.box.folder) == ExitCode.DONE
    assert capsys.readouterr().out == "well; finished: 1 done, 0 quarantined, 0 duplicates, 0 waiting\n"
    file = night.box.folder / HEALTH
    said = json.loads(file.read_text())
    counts = {"done": 4, "abstained": 2, "quarantined": 1, "duplicates": 1, "waiting": 0}
    assert in_words(counts) == "4 done (2 abstained), 1 quarantined, 1 duplicate, 0 waiting"
    sick = {
        "more than 60 s ago": {"last_look": (datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)).isoformat()},
        "waiting for disk": {"state": "waiting for disk"},
        "has ended without saying so": {"state": "working", "process": said["process"].rpartition("-")[0] + "-1"},
        "ended with an error (last error: oh)": {"last_error": "oh"},
    }
    for words, facts in sick.items():
        write_json(file, {**said, **facts})
        assert health(night.box.folder, 60) == ExitCode.INTERNAL and words in capsys.readouterr().out
    write_json(file, said)
    write_json(night.box.quarantine / "x.json", {"since": "2031-01-01"})
    assert health(night.box.folder, 60) == ExitCode.SOME_FAILED
    assert "1 slide in quarantine since 2031-01-01" in capsys.readouterr().out
