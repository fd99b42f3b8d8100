"""A program that watches sees whole lines, from however many processes, and nothing that must not leave."""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pathfm.events import KINDS, Events


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
    assert [path.name for path in tmp_path.iterdir()] == [events.path.name]
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
    with Events(tmp_path) as events:
        written = lines(events)
    for writer in writers:
        assert [int(line["slide_id"]) for line in written if line["pid"] == writer.pid] == list(range(500))


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING), Events(tmp_path / "file" / "out") as events:
        events.write("progress", done=1)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == ["events are not written: Not a directory"]


def test_a_full_disk_spoils_one_line_at_most(tmp_path, monkeypatch):
    write = os.write
    with Events(tmp_path) as events:
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:10]))
        events.write("progress", done=1)
        monkeypatch.setattr(os, "write", write)
        events.write("progress", done=2)
        events.write("progress", done=3)
    spoilt, *whole = events.path.read_text().splitlines()
    assert len(spoilt) == 10
    assert [json.loads(line)["done"] for line in whole] == [2, 3]
