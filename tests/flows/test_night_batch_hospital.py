"""What a hospital does to a night batch: drives that fill up or go away, clocks, links, slides moved at the wrong moment."""

from __future__ import annotations

import datetime
import errno
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest

from pathfm.batch import health as health_module
from pathfm.batch import inbox as inbox_module
from pathfm.batch import runner, tables
from pathfm.batch.health import FILE as HEALTH
from pathfm.batch.health import Health, health
from pathfm.batch.inbox import Inbox, InboxError, stamp_of
from pathfm.batch.ledger import Ledger
from pathfm.batch.rounds import Predictor, _files_of
from pathfm.cli_run import audit, pseudonyms
from pathfm.errors import ExitCode, MissingMppError, StoreError
from pathfm.mil.bundle import BundleError
from pathfm.store.commit import write_json
from pathfm.store.manifest import file_digest
from pathfm.store.pseudonyms import Pseudonyms
from pathfm.store.record import Outcome
from pathfm.tile.scene import slide_scale
from pathfm.verification import verify
from tests.flows.test_night_batch import night, put, reasons, results

__all__ = ["night"]


def test_what_is_loaded_goes_on_only_while_the_same_bundle_lies_there(tmp_path, monkeypatch):
    def opened(folder):
        if not (folder / "bundle.json").is_file():
            raise BundleError("there is no bundle here")
        return SimpleNamespace(folder=folder, digest=file_digest(folder / "bundle.json"))

    monkeypatch.setattr("pathfm.mil.bundle.open_bundle", opened)
    file = tmp_path / "bundle.json"
    file.write_text("first")
    predictor = object.__new__(Predictor)
    predictor.bundle, predictor._files = opened(tmp_path), _files_of(tmp_path)
    predictor._check_bundle()
    shutil.copy(file, tmp_path / "copy")
    (tmp_path / "copy").replace(file)  # the same bytes once more
    predictor._check_bundle()
    file.write_text("other")
    with pytest.raises(BundleError, match="another bundle lies here than when this run began") as refused:
        predictor._check_bundle()
    assert refused.value.exit_code == ExitCode.USAGE
    file.unlink()
    with pytest.raises(BundleError, match="no bundle here"):
        predictor._check_bundle()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_whatever_a_drive_says_that_is_away_is_waited_for(tmp_path, monkeypatch, number):
    def away(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(inbox_module.Path, "is_dir", away)
    with pytest.raises(InboxError, match=os.strerror(number)):
        Inbox(tmp_path).look()


def test_pictures_of_results_are_no_slides_though_a_link_leads_to_them(tmp_path):
    inbox, outbox = tmp_path / "in", tmp_path / "out"
    (outbox / "results" / "a-12345678").mkdir(parents=True)
    (outbox / "results" / "a-12345678" / "heatmap.png").touch()
    inbox.mkdir()
    (inbox / "link").symlink_to(tmp_path)
    (inbox / "a.svs").touch()
    assert [glance.file for glance in Inbox(inbox, outbox=outbox).look().unsettled] == ["a.svs"]


def test_a_slide_that_is_moved_away_between_look_and_hash_is_nothing_to_be_told_of(night, monkeypatch):
    put(night, a="good a", b="good b")
    real = runner.content_identity

    def identity(path):
        (night.inbox / "b.svs").unlink(missing_ok=True)
        return real(path)

    monkeypatch.setattr(runner, "content_identity", identity)
    (night.inbox / "nothing.svs").symlink_to("nowhere")  # this one does not change
    assert night() == ExitCode.SOME_FAILED
    assert results(night) == ["a"] and reasons(night).keys() == {"nothing"}


def test_a_watch_waits_for_a_full_drive_and_goes_on_with_what_was_broken_off(night, monkeypatch, capsys):
    put(night, a="good a", b="good b")
    append, looks, full = Ledger._append, [], []

    def appended(self, line):
        if full or (b'"done"' in line and len(looks) < 3):
            full.append(True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, line)

    def slept(_):
        looks.append(json.loads((night.box.folder / HEALTH).read_text())["state"])
        if len(looks) == 3:
            full.clear()
        if results(night) == ["a", "b"] and len(looks) > 5:
            os.kill(os.getpid(), signal.SIGTERM)
        assert len(looks) < 20

    monkeypatch.setattr(Ledger, "_append", appended)
    monkeypatch.setattr(runner.time, "sleep", slept)
    assert night(watch=True) == ExitCode.DONE
    assert results(night) == ["a", "b"] and "waiting for disk" in looks and looks[-1] == "idle"
    assert night.predictor.asked == [["a", "b"], ["b"]]  # the result that no ledger could take stays
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("waiting for disk: the disk is full") and len(said) == 2
    assert verify(night.box.folder) == ExitCode.DONE and not reasons(night)


def test_a_drive_that_is_no_full_one_ends_a_watch(night, monkeypatch):
    put(night, a="good a")

    def broken(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(runner.shutil, "disk_usage", broken)
    with pytest.raises(StoreError, match="read-only"):
        night(watch=True)


def test_whoever_asks_twice_to_stop_blames_no_slide(night, monkeypatch):
    put(night, a="good a")
    tell = Health.tell

    def told(self, state, current=()):
        tell(self, state, current)
        if state in {"working", "stopped"}:
            os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(3):
        with monkeypatch.context() as asked:
            asked.setattr(Health, "tell", told)
            assert night() == ExitCode.INTERRUPTED
    assert night() == ExitCode.DONE and results(night) == ["a"]
    assert "crashed" not in (night.box.folder / "ledger.jsonl").read_text()


def test_what_is_still_being_written_is_named(night, monkeypatch, capsys):
    put(night, a="good a", **{f"s{number}": "half" for number in range(7)})
    real = Inbox._is_whole
    monkeypatch.setattr(Inbox, "_is_whole", lambda self, glance, before: glance.file == "a.svs" and real(self, glance, before))
    assert night() == ExitCode.DONE
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("7 slides are still being written, and left for the next run: s") and said.endswith(", ...")


def test_health_is_not_fooled_by_a_clock_that_was_set_back_or_by_a_drive_that_takes_no_health_file(night, monkeypatch, capsys):
    night()
    file = night.box.folder / HEALTH
    said = json.loads(file.read_text())
    ahead = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    write_json(file, {**said, "last_look": ahead.isoformat()})
    assert health(night.box.folder) == ExitCode.INTERNAL and "the clock was set back" in capsys.readouterr().out
    write_json(file, {**said, "state": "idle"})
    assert health(night.box.folder) == ExitCode.DONE
    monkeypatch.setattr(health_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    assert health(night.box.folder) == ExitCode.INTERNAL and "the outbox is full" in capsys.readouterr().out
    write_json(file, said)
    assert health(night.box.folder) == ExitCode.DONE  # what has ended need not write


def test_the_files_of_a_folder_of_dicom_series_are_opened_once_until_they_change(tmp_path, monkeypatch):
    opened = []

    def series(path):
        opened.append(path.name)
        return path.name[0]

    monkeypatch.setattr("pathfm.slides.openslide_reader.dicom_series", series)
    names = ["a1.dcm", "a2.dcm", "b1.dcm", "b2.dcm"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    first = [stamp_of(tmp_path / name) for name in names]
    assert first == [stamp_of(tmp_path / name) for name in names] and sorted(opened) == names
    (tmp_path / "b2.dcm").write_bytes(b"longer than before")
    second = [stamp_of(tmp_path / name) for name in names]
    assert [one == other for one, other in zip(first, second, strict=True)] == [True, True, False, False]
    assert sorted(opened) == sorted([*names, "b2.dcm"])


def test_a_slide_that_is_renamed_while_it_is_worked_on_has_one_result_in_the_next_run(night):
    put(night, a="good a")

    def renamed():
        (night.inbox / "a.svs").rename(night.inbox / "z.svs")
        night.predictor.meanwhile = lambda: None

    night.predictor.meanwhile = renamed
    assert night() == ExitCode.DONE and results(night) == []
    assert night() == ExitCode.DONE and results(night) == ["z"] and not reasons(night)
    put(night, a="good, and another one")  # a name may be used again
    assert night() == ExitCode.DONE and results(night) == ["a", "z"]


def test_slides_of_kinds_that_cannot_be_read_are_never_passed_over_in_silence(night, capsys):
    for name in ("A.isyntax", "noext", "S.tiff.gz", "E.vsi", "Thumbs.db", "a.xml", ".hidden", "a.svs.done"):
        (night.inbox / name).touch()
    assert night() == ExitCode.SOME_FAILED
    said = capsys.readouterr()
    assert [line.split()[:2] for line in said.err.splitlines()] == [
        ["ignored", name] for name in ("A.isyntax", "E.vsi", "S.tiff.gz", "noext")
    ]
    assert said.out.splitlines() == [
        "finished: 0 done, 0 quarantined, 0 duplicates, 0 waiting, 7 ignored",
        "ignored in this run, of no kind that can be read: A.isyntax, E.vsi, S.tiff.gz, noext",
    ]
    assert night() == ExitCode.DONE and "ignored in this run" not in capsys.readouterr().out  # each is told of once
    assert health(night.box.folder) == ExitCode.SOME_FAILED
    said = capsys.readouterr().out
    assert said.startswith(
        "4 files in the inbox are of no kind that can be read, to be converted or taken out: A.isyntax, E.vsi,"
    )
    for name in ("A.isyntax", "noext", "S.tiff.gz", "E.vsi"):
        (night.inbox / name).unlink()
    night()
    capsys.readouterr()
    assert health(night.box.folder) == ExitCode.DONE
    assert capsys.readouterr().out == (
        "well; finished: 0 done, 0 quarantined, 0 duplicates, 0 waiting, 3 ignored (Thumbs.db, a.svs.done, a.xml)\n"
    )
    assert Inbox(night.inbox, sentinel=".done").look().ignored == ("Thumbs.db", "a.xml")


def test_a_copy_of_what_cannot_be_used_has_a_record_of_its_own_until_there_is_a_result(night, monkeypatch, capsys):
    put(night, empty="")
    assert night() == ExitCode.SOME_FAILED
    put(night, q="")
    capsys.readouterr()
    assert night() == ExitCode.SOME_FAILED and reasons(night) == {"empty": "", "q": "as empty: "}
    said = capsys.readouterr()
    assert said.err.splitlines() == ["quarantine q  as empty: "]
    assert said.out.splitlines()[0] == "finished: 0 done, 2 quarantined, 0 duplicates, 0 waiting"
    assert night() == ExitCode.DONE
    next(night.box.quarantine.glob("q-*")).unlink()
    assert night() == ExitCode.SOME_FAILED and reasons(night).keys() == {"empty", "q"}
    assert verify(night.box.folder) == ExitCode.DONE
    next(night.box.quarantine.glob("empty-*")).unlink()
    done = SimpleNamespace(result=SimpleNamespace(outcome=lambda name: Outcome(name, "done", "")))
    monkeypatch.setattr(night.predictor, "predict", lambda _: done)
    assert night() == ExitCode.DONE and results(night) == ["empty"] and not night.box.records


def test_what_is_advised_about_a_slide_without_mpp_can_be_followed(night):
    facts, settings = SimpleNamespace(notes=(), mpp=None, mpp_source=""), SimpleNamespace(assume_mpp=None, mpp=0.5)
    with pytest.raises(MissingMppError) as refused:
        slide_scale(facts, SimpleNamespace(mpp=None), settings)
    put(night, a=refused.value.reason)
    assert night() == ExitCode.SOME_FAILED
    assert reasons(night)["a"].startswith("no mpp in the file (predict it by hand: `pathfm mil predict --bundle ")


def test_an_inbox_can_be_asked_who_is_who_with_a_new_key(night, tmp_path, capsys):
    audit(new_key=tmp_path / "key")
    said = capsys.readouterr().out
    assert f"export PATHFM_AUDIT_KEY={tmp_path}/key" in said and f"--pseudonym-key {tmp_path}/key" in said
    put(night, miller="good")
    night(Pseudonyms(tmp_path / "key"))
    pseudonyms(night.inbox, tmp_path / "key", tmp_path / "who.csv")
    _, row = (tmp_path / "who.csv").read_text().splitlines()
    assert row.startswith("miller,") and row.rpartition(",")[2] == results(night)[0]


def test_two_slides_of_one_name_stop_nobody_and_are_tried_when_one_is_renamed(night):
    (night.inbox / "A").mkdir()
    (night.inbox / "A" / "B.svs").write_text("good 1")
    put(night, A__B="good 2", c="good 3")
    assert night() == ExitCode.SOME_FAILED
    assert results(night) == ["c"] and night.predictor.asked == [["c"]]
    assert reasons(night).keys() == {"A__B.svs"} and len(night.box.records) == 2
    assert "rename one of them" in reasons(night)["A__B.svs"]
    (night.inbox / "A__B.svs").rename(night.inbox / "D.svs")
    assert night() == ExitCode.DONE and results(night) == ["D", "c"]
    (record,) = night.box.records  # the other is asked for by removing its record, as after any mending
    record.unlink()
    assert night() == ExitCode.DONE and len(results(night)) == 3
    assert night.predictor.asked[1:] == [["D"], ["A__B.svs"]]
    assert verify(night.box.folder) == ExitCode.DONE


def test_a_name_that_cannot_be_is_mended_by_another_name(night, capsys):
    put(night, **{" a": "good a", "b": "good b"})
    assert night() == ExitCode.SOME_FAILED and results(night) == ["b"]
    (night.inbox / " a.svs").rename(night.inbox / "a.svs")
    capsys.readouterr()
    assert night() == ExitCode.DONE and results(night) == ["a", "b"] and not reasons(night)
    assert "renamed a  was  a, which had no result yet" in capsys.readouterr().err
    counts = json.loads((night.box.folder / HEALTH).read_text())["counts"]
    assert counts["done"] == 2 and counts["duplicates"] == counts["quarantined"] == 0
    assert verify(night.box.folder) == ExitCode.DONE


def test_a_broken_slide_that_is_renamed_has_one_record_and_a_copy_beside_it_has_its_own(night):
    put(night, a="broken", copy="broken")
    night()
    assert sorted(reasons(night)) == ["a", "copy"]
    for name in ("a", "copy"):
        (night.inbox / f"{name}.svs").unlink()
    put(night, z="broken")
    assert night() == ExitCode.SOME_FAILED and reasons(night) == {"z": "broken"}
    assert night() == ExitCode.DONE and len(night.predictor.asked) == 2
    assert verify(night.box.folder) == ExitCode.DONE


def test_a_round_reads_only_the_results_that_are_new(night, monkeypatch):
    read, real = [], tables.read_result

    def counted(file):
        read.append(file.parent.name.rpartition("-")[0])
        return real(file)

    monkeypatch.setattr(tables, "read_result", counted)
    put(night, **{name: f"good {name}" for name in "abcd"})
    night(round=1)
    assert read == ["a", "b", "c", "d"]
    assert len(night.box.index.read_text().splitlines()) == 5
