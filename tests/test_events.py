"""A program that watches sees whole lines, from however many processes, and nothing that must not leave."""

from __future__ import annotations

import datetime
import errno
import json
import logging
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pathfm import events as events_module
from pathfm.audit import audit
from pathfm.chain import ID_FILE, KEY_FILE, PATTERN, new_key, read_id, read_key
from pathfm.errors import PathfmError, UsageError
from pathfm.events import KINDS, Events, public_text
from pathfm.slides.reader import open_slide, slide_identity
from pathfm.store.commit import read_json
from pathfm.store.tile_store import open_tiles
from pathfm.workers import _internal


def lines(events):
    return [json.loads(line) for line in events.path.read_text(encoding="utf-8").splitlines()]


def test_events_say_when_who_and_what(tmp_path):
    with Events(tmp_path / "out") as events:
        events.write("run_started", stage="tile", versions={"pathfm": "1"}, settings="3f9c", slides=2, shard="")
        events.write("slide_done", stage="tile", slide_id="Schnitt 1 ü", seconds=1.5, counts={"kept": 3})
        events.write("progress", stage="tile", done=1, total=2, eta_s=None)
    first, second, third = lines(events)
    assert (first["kind"], first["pid"], first["settings"]) == ("run_started", os.getpid(), "3f9c")
    assert (second["slide_id"], second["counts"], third["eta_s"]) == ("Schnitt 1 ü", {"kept": 3}, None)
    assert first["run"] == third["run"]
    assert datetime.datetime.fromisoformat(first["time"]).utcoffset() == datetime.timedelta(0)


def test_a_second_run_appends(tmp_path):
    for _ in range(2):
        with Events(tmp_path) as events:
            events.write("run_ended", stage="tile", seconds=1.0, counts={})
    assert len({line["run"] for line in lines(events)}) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [ID_FILE, events.path.name]
    assert events.path.name.startswith("events-")


def test_only_known_fields_leave(tmp_path):
    with Events(tmp_path) as events:
        for kind, fields in (
            ("slide_done", {"path": "a"}),
            ("slide_done", {"patient_id": "a"}),
            ("lunch", {}),
            ("progress", {"eta_s": float("inf")}),
        ):
            with pytest.raises(ValueError):
                events.write(kind, **fields)
        with pytest.raises(TypeError):
            events.write("slide_done", slide_id=Path("a"))
        assert lines(events) == []
    assert not {name for fields in KINDS.values() for name in fields} & {"path", "patient", "patient_id", "slide"}


def test_the_page_lists_every_kind_and_field():
    page = (Path(__file__).resolve().parents[1] / "docs" / "batch.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    told = {kind: set(re.findall("`(.+?)`", row[2])) for row in rows for kind in re.findall("`(.+?)`", row[1])}
    assert {kind: told.get(kind) for kind in KINDS} == KINDS


def test_several_processes_write_whole_lines(tmp_path):
    code = (
        "import sys; from pathlib import Path; from pathfm.events import Events\n"
        "events = Events(Path(sys.argv[1])); print('ready', flush=True); input()\n"
        "for n in range(500): events.write('slide_done', slide_id=str(n), reason='x' * (n * 7 % 3000))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes) for _ in range(3)]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 3
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    assert [writer.communicate() and writer.returncode for writer in writers] == [0] * 3
    files = sorted(tmp_path.glob(PATTERN))
    assert len(files) == 3  # a chain has one end, so each process has its own
    assert {json.loads(file.read_text().partition("\n")[0])["pid"] for file in files} == {writer.pid for writer in writers}
    for file in files:
        assert [int(line["slide_id"]) for line in map(json.loads, file.read_text().splitlines())] == list(range(500))
    with Events(tmp_path) as events:  # a later process goes on with the first chain
        events.write("progress", done=1)
    assert sorted(tmp_path.glob(PATTERN)) == files
    assert {json.loads(line)["folder_id"] for file in files for line in file.read_text().splitlines()} == {read_id(tmp_path)}
    assert lines(events)[-1]["sequence"] == 501
    assert audit(tmp_path) == 0


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING), Events(tmp_path / "file" / "out") as events:
        events.write("progress", done=1)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == ["events are not written: Not a directory"]


def test_what_a_full_disk_cut_short_is_written_on_when_there_is_room_again(tmp_path, monkeypatch):
    write = os.write
    with Events(tmp_path) as events:
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:10]))
        events.write("progress", done=1)
        monkeypatch.setattr(os, "write", write)
        events.write("progress", done=2)
        events.write("progress", done=3)
    assert [line["done"] for line in lines(events)] == [1, 2, 3]
    assert audit(tmp_path) == 0


def test_a_disk_that_stays_full_leaves_a_torn_line_that_the_next_process_closes(tmp_path, monkeypatch, caplog, capsys):
    write = os.write

    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Events(tmp_path) as events:
        events.write("progress", done=1)
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:10]))
        events.write("progress", done=2)
        monkeypatch.setattr(os, "write", full)
        events.write("progress", done=3)
        events.write("progress", done=4)
    monkeypatch.setattr(os, "write", write)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "events are not written: No space left on device"
    ]
    assert audit(tmp_path) == 0
    assert "1 torn last line" in capsys.readouterr().out
    with Events(tmp_path) as events:
        events.write("progress", done=5)
    *_, closing, last = events.path.read_bytes().splitlines()
    assert json.loads(closing) | {"kind": "recovered", "bytes": 10, "sequence": 2} == json.loads(closing)
    assert json.loads(last)["done"] == 5
    assert audit(tmp_path) == 0
    assert "1 torn line recovered" in capsys.readouterr().out


def disk_of(monkeypatch, error=errno.ENOSPC):
    """Fills and empties the disk: room(False), room(True)."""
    write = os.write

    def full(file, data):
        raise OSError(error, os.strerror(error))

    return lambda there: monkeypatch.setattr(os, "write", write if there else full)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_was_full_for_a_while_loses_nothing(tmp_path, monkeypatch, caplog, error):
    room = disk_of(monkeypatch, error)
    with Events(tmp_path) as events:
        events.write("progress", done=1)
        written = events.head
        for done in (2, 3):
            room(False)
            events.write("progress", done=done)
            events.write("progress", done=done)
            assert events.head == written  # who keeps a head must not keep one that a kill would take back
            room(True)
            events.write("progress", done=0)
            written = events.head
            assert written["sequence"] == 3 * done - 2
    assert [line["done"] for line in lines(events)] == [1, 2, 2, 0, 3, 3, 0]
    assert len(caplog.records) == 2  # once each time
    assert audit(tmp_path) == 0


def test_a_disk_that_is_full_for_long_loses_whole_events_and_the_chain_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(events_module, "MOST_UNWRITTEN", 2000)
    room = disk_of(monkeypatch)
    with Events(tmp_path) as events:
        room(False)
        for done in range(100):
            events.write("progress", done=done)
        room(True)
        events.write("progress", done=100)
        events.write("progress", done=101)
    found = [line["done"] for line in lines(events)]
    assert found == [*range(len(found) - 1), 101] and 3 < len(found) < 12
    assert audit(tmp_path) == 0


def test_other_errors_of_the_drive_end_the_events(tmp_path, monkeypatch, caplog):
    room = disk_of(monkeypatch, errno.EIO)
    with Events(tmp_path) as events:
        events.write("progress", done=1)
        room(False)
        events.write("progress", done=2)
        room(True)
        events.write("progress", done=3)
        assert events.head["sequence"] == 1
    assert [line["done"] for line in lines(events)] == [1] and len(caplog.records) == 1


def test_the_id_of_a_folder_outlives_its_file(tmp_path):
    for _ in range(2):
        with Events(tmp_path) as events:
            events.write("progress", done=1)
        (tmp_path / ID_FILE).unlink()
    (tmp_path / ID_FILE).write_text("torn")
    with Events(tmp_path) as events:
        events.write("progress", done=1)
    assert len({line["folder_id"] for line in lines(events)}) == 1
    assert audit(tmp_path) == 0


def test_threads_share_a_chain(tmp_path):
    with Events(tmp_path) as events, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: events.write("progress", done=number), range(400)))
    assert [line["sequence"] for line in lines(events)] == list(range(1, 401))
    assert sorted(line["done"] for line in lines(events)) == list(range(400))
    assert audit(tmp_path) == 0
    assert events.head["sequence"] == 400


@pytest.mark.parametrize("cut", [1, 40, 0.5, -1])
def test_a_line_that_a_kill_has_torn_is_closed_by_the_next_process(tmp_path, cut, capsys):
    for done in (1, 2):
        with Events(tmp_path) as events:
            events.write("progress", done=done)
    first, second = events.path.read_bytes().splitlines(keepends=True)
    kept = second[: int(len(second) * cut) if isinstance(cut, float) else cut]
    events.path.write_bytes(first + kept)
    with Events(tmp_path) as events:
        events.write("progress", done=3)
    assert audit(tmp_path) == 0
    whole = cut == -1  # only the end of the line is lacking, and nothing is lost
    assert ("0 torn lines recovered" if whole else "1 torn line recovered") in capsys.readouterr().out
    readable = [json.loads(line) for line in events.path.read_bytes().splitlines() if line.endswith(b"}")]
    assert [line.get("done", line["kind"]) for line in readable] == [1, 2 if whole else "recovered", 3]


def test_several_torn_lines_on_end(tmp_path, capsys):
    """Killed while it wrote, and the one who closes that as well."""
    for _ in range(2):
        with Events(tmp_path) as events:
            events.write("progress", done=1)
        with events.path.open("ab") as file:
            file.write(b'{"time": "20')
    with Events(tmp_path):
        pass
    data = events.path.read_bytes()
    events.path.write_bytes(data[:-20])
    with Events(tmp_path) as events:
        events.write("progress", done=2)
    assert audit(tmp_path) == 0, capsys.readouterr().out
    assert "2 torn lines recovered" in capsys.readouterr().out  # the second closes what the one before it left, too


def test_a_file_of_lines_from_before_the_chain_goes_on_as_a_chain(tmp_path, capsys):
    with Events(tmp_path) as events:
        pass
    old = b'{"time": "2025", "kind": "run_started", "run": "a"}\n{"time": "2025", "kind": "run_ended", "run": "a"}\n'
    events.path.write_bytes(old)
    assert audit(tmp_path) == 0
    with Events(tmp_path) as events:
        events.write("progress", done=1)
    assert [line["kind"] for line in lines(events)] == ["run_started", "run_ended", "chain_started", "progress"]
    assert audit(tmp_path) == 0
    assert "2 lines from before the chain" in capsys.readouterr().out
    events.path.write_bytes(events.path.read_bytes().replace(b"2025", b"2024", 1))
    assert audit(tmp_path) == 3


def test_a_process_that_is_killed_while_it_writes_leaves_a_chain_that_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "key"))
    new_key(tmp_path / "key")
    code = (
        "import sys; from pathlib import Path; from pathfm.events import Events\n"
        "events = Events(Path(sys.argv[1])); n = 0\n"
        "while True:\n    events.write('slide_done', slide_id=str(n), reason='x' * 9000); n += 1"
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")])
        before = sum(path.stat().st_size for path in (tmp_path / "out").glob("*"))
        while sum(path.stat().st_size for path in (tmp_path / "out").glob("*")) < before + 300_000:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.wait()
    with Events(tmp_path / "out") as events:
        events.write("progress", done=1)
    assert len(list((tmp_path / "out").glob(PATTERN))) == 1
    assert len({json.loads(line)["run"] for line in events.path.read_bytes().splitlines() if line.endswith(b"}")}) == 4
    assert audit(tmp_path / "out") == 0, capsys.readouterr().out


def test_a_key_that_is_named_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "key"))
    with pytest.raises(UsageError, match="the key cannot be read: No such file"):
        Events(tmp_path / "out")
    (tmp_path / "key").write_bytes(b"x" * 31)
    with pytest.raises(UsageError, match="a key of 31 bytes, and 32 are needed"):
        Events(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="there already"):
        new_key(tmp_path / "key")
    key = new_key(tmp_path / "key2")
    assert (tmp_path / "key2").stat().st_mode & 0o777 == 0o600
    assert key.secret.hex() not in repr(key)
    assert read_key(tmp_path / "key2") == key


def test_a_log_that_is_kept_with_a_key_says_when_none_is_given(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "key"))
    new_key(tmp_path / "key")
    with Events(tmp_path / "out") as events:
        events.write("progress", done=1)
    monkeypatch.delenv(KEY_FILE)
    with Events(tmp_path / "out") as events:
        events.write("progress", done=2)
    assert [record.getMessage().partition(": ")[2].partition(",")[0] for record in caplog.records] == [
        "this log is kept with a key"
    ]
    assert [line["key"] is None for line in lines(events)] == [False, True]


ROOT = Path("/data/study out")
TEXTS = {
    "'/data/Anna Müller/slide 1.svs' cannot be opened: bad": "'slide 1.svs' cannot be opened: bad",
    "/data/x y/s.svs cannot be opened": "s.svs cannot be opened",
    "[Errno 2] No such file or directory: '/data/study out/tiles/a.zarr'": (
        "[Errno 2] No such file or directory: 'tiles/a.zarr'"
    ),
    "no /data/study out/tiles/a.zarr: 3/4 of tiles": "no tiles/a.zarr: 3/4 of tiles",
    "make room in /data/study out": "make room in .",
    "/data/study outer/a.svs": "a.svs",
    "https://user:pass@host/a/b.svs?sig=1 is lost": "b.svs is lost",
    "see https:/host/a/b.svs": "see b.svs",
    'FileNotFoundError: [Errno 2] x: "/home/O\'Neil/s.svs"': 'FileNotFoundError: [Errno 2] x: "s.svs"',
    "Reading:/data/Anna M/s.svs": "Reading:s.svs",
    "name one of /data/Doe, Jane/x, /b/y": "name one of y",
    "unclosed '/data/Jane/s.svs": "unclosed 's.svs",
    "~/Jane/y.svs and ../Jane/s.svs": "s.svs",
    "local-dir:/home/jane/enc": "local-dir:enc",
    "tiles are 3/4 and/or 1 / 2 image/jpeg of </tag>": "tiles are 3/4 and/or 1 / 2 image/jpeg of </tag>",
}


@pytest.mark.parametrize("text", TEXTS)
def test_texts_lose_machine_paths(text):
    assert public_text(text, ROOT) == TEXTS[text]


def test_reasons_of_errors_that_occur_lose_machine_paths(tmp_path):
    """Errors as the drive, the readers, the stores and the workers raise them for a slide in a patient's folder."""
    out, patient = tmp_path / "my out", tmp_path / "Doe, Jane 1948" / "Fall O'Neil"
    patient.mkdir(parents=True)
    out.mkdir()
    (out / "study.yaml").touch()
    (patient / "s.svs").write_bytes(b"II*\0" + b"x" * 99)
    (patient / "s.png").write_bytes(b"\x89PNG" + b"x" * 99)
    errors = []
    for broken in (
        lambda: open_slide(patient / "s.svs"),
        lambda: open_slide(patient / "s.png"),
        lambda: open_slide(patient / "none.svs"),
        lambda: slide_identity(patient / "none.svs"),
        lambda: open_tiles(out / "tiles" / "a.zarr"),
        lambda: read_json(patient / "s.png"),
    ):
        with pytest.raises(PathfmError) as caught:
            broken()
        errors += [caught.value.reason, str(caught.value)]
    for broken in (
        lambda: (patient / "none").read_bytes(),
        lambda: (patient / "s.svs").mkdir(),
    ):
        with pytest.raises(OSError) as failed:
            broken()
        errors += [_internal(failed.value).reason, f"cannot be read: {failed.value}"]
    with Events(out / "tiles" / "spec") as events:
        for error in errors:
            events.write("slide_failed", slide_id="s", reason=error)
    told = events.path.read_text()
    assert "Doe" in " ".join(errors)
    assert not [word for word in ("Doe", "Jane", "1948", "Fall", "Neil", str(tmp_path)) if word in told], told
    assert "tiles/a.zarr" in told
