"""What a hospital does to a night batch: drives that fill up or go away, clocks, links, slides moved at the wrong moment."""

from __future__ import annotations

import datetime
import errno
import gc
import json
import os
import shutil
import signal
import tracemalloc
from types import SimpleNamespace

import pytest

from pathfm.batch import health as health_module
from pathfm.batch import ignored, runner, tables
from pathfm.batch import inbox as inbox_module
from pathfm.batch.health import FILE as HEALTH
from pathfm.batch.health import Health, health
from pathfm.batch.inbox import Inbox, InboxError, stamp_of
from pathfm.batch.ledger import Ledger
from pathfm.batch.night import batch
from pathfm.batch.options import BatchOptions
from pathfm.batch.results import Outbox, index_rows
from pathfm.batch.rounds import Predictor, _files_of
from pathfm.chain import chain_files
from pathfm.cli_run import audit, pseudonyms
from pathfm.errors import ExitCode, MissingMppError, StoreError, UsageError
from pathfm.events import Events
from pathfm.mil.bundle import BundleError
from pathfm.mil.drift import DriftReference
from pathfm.mil.drift_cohort import cohort_flags
from pathfm.prediction import write_rows
from pathfm.report import drift_page
from pathfm.run_manifest import manifest_files
from pathfm.store.commit import write_json
from pathfm.store.manifest import file_digest
from pathfm.store.pseudonyms import Pseudonyms
from pathfm.store.record import Outcome
from pathfm.tile.scene import slide_scale
from pathfm.verification import verify
from tests.flows.test_night_batch import killed_at, night, put, reasons, results

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


def many_results(box, number, **more):
    """Results that drift was measured of; some have a column that others have not."""
    for name in (f"s{each}" for each in range(number)):
        count = int(name[1:])
        facts = {"scanner": ("A", "B", None)[count % 3], "mpp": 0.5, "tiles": count, "dropped": {}, "numbers": {}}
        said = dict.fromkeys(("identity", "outcome"), "") | {"decision": "x", "bundle": "b1", "files": {}, **more}
        said |= {"name": name, "slide_id": name, "time": f"t{count % 50}", "drift": {"facts": facts, "flags": []}}
        row = {"slide_id": name, **({"new": "1"} if count % 7 == 0 else {}), "p": ""}
        (box.results / name).mkdir(parents=True)
        (box.results / name / "result.json").write_text(json.dumps(said))
        (box.results / name / "predictions.csv").write_text(f"{','.join(row)}\n{','.join(row.values())}\n")


def test_a_table_and_a_page_of_what_was_kept_are_those_of_what_lies_there(tmp_path, monkeypatch):
    box, reference = Outbox(tmp_path / "out"), DriftReference(decisions={"x": 2})
    monkeypatch.setattr(drift_page, "DRAWN", 60)
    monkeypatch.setattr(drift_page, "LISTED", 50)
    many_results(box, 75)
    kept = tables.Tables(box, reference, "b1")
    kept.write(())
    shutil.rmtree(box.results / "s0")
    (box.results / "s1" / "predictions.csv").write_text("slide_id,p\ns1,changed\n")
    (box.results / "s2" / "result.json").write_text("{}")
    assert kept.write(["s3", "away"]) == ("away", "s2")
    made = {name: (box.folder / name).read_bytes() for name in ("predictions.csv", "drift.html")}
    found = box.read_results()[0]
    write_rows(box.index, index_rows(found))
    rows = [{**read.said, **read.said["drift"]} for read in found.values()]
    rows.sort(key=lambda row: (row["time"], row["name"]))
    page, flags = box.folder / "drift.html", cohort_flags(reference, rows)
    drift_page.write_drift_page(page, reference.record(), rows, flags.record())
    assert made == {name: (box.folder / name).read_bytes() for name in made} and len(rows) == 73


def test_of_a_result_no_more_is_kept_than_the_table_and_the_page_need(tmp_path, monkeypatch):
    box = Outbox(tmp_path / "out")
    many_results(box, 50, versions=[f"version {number}" for number in range(500)])
    monkeypatch.setattr(tables, "write_page", lambda *_: None)
    tables.Tables(box, DriftReference(), "b1").write(())
    kept = tables.Tables(box, DriftReference(), "b1")
    gc.collect()
    tracemalloc.start()
    kept.write(())
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 50 * 3000


def test_a_round_does_not_look_for_events_among_results_and_the_audit_does(night):
    put(night, a="good a")
    assert night() == ExitCode.DONE
    with Events(next(night.box.results.iterdir()) / "results"):
        pass
    put(night, b="good b")
    with Events(night.box.folder / "by-hand" / "results"):
        pass
    assert night() == ExitCode.DONE
    heads = [head["file"] for head in json.loads(manifest_files(night.box.folder)[-1].read_text())["chains"]]
    assert any(file.startswith("by-hand/results/") for file in heads) and not any(file.startswith("results/") for file in heads)
    assert any(path.is_relative_to(night.box.results) for path in chain_files(night.box.folder))


def test_of_many_files_that_are_no_slides_each_is_told_of_once(night, monkeypatch, capsys):
    monkeypatch.setattr(ignored, "REMEMBERED", 20)
    for number in range(30):
        (night.inbox / f"s{number:04}.isyntax").touch()
    (night.inbox / "a.xml").touch()
    for told, code in ((30, ExitCode.SOME_FAILED), (0, ExitCode.DONE)):
        put(night, **{f"good{told}": f"good {told}"})  # and another look
        assert night() == code
        assert sum(line.startswith("ignored") for line in capsys.readouterr().err.splitlines()) == told
    said = json.loads((night.box.folder / HEALTH).read_text())
    assert len(said["ignored"]) == 20 and said["strange"] == 30 and said["counts"]["ignored"] == 31
    for name in ("0.vsi", "z.vsi"):  # which of all these names are new is not known any more, but how many
        (night.inbox / name).touch()
    assert night() == ExitCode.SOME_FAILED
    assert capsys.readouterr().err.startswith("ignored 2 more files  of no kind that can be read")
    assert night() == ExitCode.DONE


def test_a_folder_of_many_dicom_series_is_read_once_per_look_and_its_files_once(tmp_path, monkeypatch):
    opened, listed, real = [], [], inbox_module.dicom_files

    def series(path):
        opened.append(path.name)
        return None if path.stem == "bad" else path.name[:2]

    monkeypatch.setattr("pathfm.slides.openslide_reader.dicom_series", series)
    monkeypatch.setattr(inbox_module, "dicom_files", lambda folder: listed.append(folder) or real(folder))
    for name in ("s1a", "s1b", "s2a", "s2b", "s3a", "s3b"):
        (tmp_path / f"{name}.dcm").write_text(name)
    (tmp_path / "away.dcm").symlink_to("nowhere")
    inbox = Inbox(tmp_path, 0.0)
    inbox.look()
    assert [glance.file for glance in inbox.look().whole if glance.changed_ns] == ["s1a.dcm", "s2a.dcm", "s3a.dcm"]
    assert len(opened) == 6 and len(listed) == 2
    (tmp_path / "s3b.dcm").write_text("longer")
    (tmp_path / "s1b.dcm").unlink()
    (tmp_path / "bad.dcm").touch()
    assert [glance.file for glance in inbox.look().whole] == ["away.dcm", "s2a.dcm"]
    assert opened.count("s3b.dcm") == 2 and len([name for name in opened if name != "bad.dcm"]) == 7
    kept = sorted(path.name for path in inbox_module._UIDS if path.parent == tmp_path)
    assert kept == ["s1a.dcm", "s2a.dcm", "s2b.dcm", "s3a.dcm", "s3b.dcm"]


def test_a_run_that_begins_while_the_inbox_is_away_waits_for_it_if_it_was_there_once(night, tmp_path, monkeypatch, capsys):
    def begin(**options):
        return batch(tmp_path / "bundle", night.inbox, night.box.folder, BatchOptions(settle_s=0.0, min_free_gb=0.0, **options))

    def slept(_):
        states.append(json.loads((night.box.folder / HEALTH).read_text())["state"])
        if len(states) == 2:
            put_back()
        if results(night) == ["a", "b"]:
            os.kill(os.getpid(), signal.SIGTERM)
        assert len(states) < 20

    def put_back():
        night.inbox.with_name("away").rename(night.inbox)
        put(night, b="good b")

    states = []
    monkeypatch.setattr("pathfm.batch.rounds.Predictor", lambda *_: night.predictor)
    put(night, a="good a")
    night.inbox.rename(night.inbox.with_name("away"))
    with pytest.raises(UsageError, match="there is no such folder"):
        begin()
    night.inbox.with_name("away").rename(night.inbox)
    assert begin() == ExitCode.DONE
    night.inbox.rename(night.inbox.with_name("away"))
    with pytest.raises(InboxError) as away:
        begin()
    assert away.value.exit_code == ExitCode.INTERNAL and health(night.box.folder) == ExitCode.INTERNAL
    monkeypatch.setattr(runner.time, "sleep", slept)
    assert begin(watch=True) == ExitCode.DONE and results(night) == ["a", "b"]
    assert states[:2] == ["waiting for the inbox"] * 2 and "waiting for the inbox: " in capsys.readouterr().out


def test_a_copy_whose_name_another_slide_has_does_not_hold_up_the_slide(night, capsys):
    (night.inbox / "A").mkdir()
    (night.inbox / "A" / "B.svs").write_text("good 1")
    put(night, e="good 1", A__B="good 2")
    for file in ("A/B.svs", "A__B.svs"):
        os.utime(night.inbox / file, (2e9, 2e9))
    assert night() == ExitCode.SOME_FAILED and results(night) == ["e"]
    (record,) = night.box.records
    assert json.loads(record.read_text())["files"] == ["A__B.svs"]
    assert capsys.readouterr().out.splitlines()[-1] == "quarantined in this run: A__B.svs"
    assert night() == ExitCode.DONE and verify(night.box.folder) == ExitCode.DONE


def test_a_copy_with_a_good_name_is_worked_on_for_one_whose_name_cannot_be(night):
    (night.inbox / "A").mkdir()
    for file in ("A/B.svs", "A__B.svs", " c.svs"):
        (night.inbox / file).write_text("good c" if "c" in file else "good, twice")
    assert night() == ExitCode.SOME_FAILED and results(night) == []
    (night.inbox / "A__B.svs").rename(night.inbox / "D.svs")
    put(night, c="good c")
    assert night() == ExitCode.DONE and results(night) == ["D", "c"] and not night.box.records
    assert night() == ExitCode.DONE and night.predictor.asked == [["D", "c"]]
    assert json.loads((night.box.folder / HEALTH).read_text())["counts"]["duplicates"] == 2
    assert verify(night.box.folder) == ExitCode.DONE


def test_a_slide_that_is_renamed_and_back_is_called_as_it_is(night):
    put(night, a="broken")
    for before, after in (("a", "z"), ("z", "a"), ("a", "z")):
        assert night() == ExitCode.SOME_FAILED and reasons(night) == {before: "broken"}
        (night.inbox / f"{before}.svs").rename(night.inbox / f"{after}.svs")
    put(night, y="broken, but not like the other")
    (night.inbox / "z.svs").rename(night.inbox / "a.svs")
    assert night() == ExitCode.SOME_FAILED and reasons(night).keys() == {"a", "y"}
    assert night() == ExitCode.DONE and verify(night.box.folder) == ExitCode.DONE


def test_a_slide_that_kills_the_run_is_not_tried_again_under_another_name(night):
    put(night, k="killer")
    for _ in range(2):
        with pytest.raises(RuntimeError):
            night()
    assert night() == ExitCode.SOME_FAILED
    (night.inbox / "k.svs").rename(night.inbox / "other.svs")
    asked = len(night.predictor.asked)
    assert night() == ExitCode.SOME_FAILED and len(night.predictor.asked) == asked
    assert "killed 2 times" in reasons(night)["other"] and len(night.box.records) == 1
    night.box.records[0].unlink()  # somebody has looked at it
    with pytest.raises(RuntimeError):
        night()


def test_a_kill_in_the_middle_of_a_renaming_loses_nothing(night, monkeypatch):
    put(night, **{" a": "good a"})
    night()
    (night.inbox / " a.svs").rename(night.inbox / "a.svs")
    with monkeypatch.context() as killed, pytest.raises(RuntimeError):
        killed.setattr(Ledger, "add", lambda *_: (_ for _ in ()).throw(RuntimeError("as a kill")))
        night()
    assert not night.box.records
    with monkeypatch.context() as killed, pytest.raises(RuntimeError):
        killed_at(killed, "batch.ledger.file")
        night()
    assert verify(night.box.folder) == ExitCode.DONE
    assert night() == ExitCode.DONE and results(night) == ["a"]
    assert verify(night.box.folder) == ExitCode.DONE


def test_who_is_who_can_be_asked_of_an_inbox_with_two_slides_of_one_name(night, tmp_path):
    (tmp_path / "key").write_bytes(bytes(range(64)))
    (night.inbox / "A").mkdir()
    (night.inbox / "A" / "B.svs").touch()
    put(night, A__B="", c="")
    pseudonyms(night.inbox, tmp_path / "key", tmp_path / "who.csv")
    assert [line.partition(",")[0] for line in (tmp_path / "who.csv").read_text().splitlines()] == ["slide_id", "A__B.svs", "c"]
