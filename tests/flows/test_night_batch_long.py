"""A night with 50 slides that arrive while the batch runs, some broken, some twice, and the batch killed and started again."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pathfm.audit import audit
from pathfm.batch import runner
from pathfm.batch.health import health
from pathfm.batch.night import batch
from pathfm.batch.options import BatchOptions
from pathfm.errors import ExitCode, UsageError
from pathfm.extract import sets
from pathfm.geometry import Size
from pathfm.mil.bundle import BundleError
from pathfm.prediction import mil_predict
from pathfm.slides.synthetic import SyntheticSpec, write_slide
from pathfm.verification import verify
from tests.flows.test_bundle import FAST, ROOT, places

pytestmark = pytest.mark.long
__all__ = ["places"]
GOOD, SETTLE_S = 41, 0.6
CODE = """
import sys
from pathlib import Path
from pathfm.batch.night import batch
from pathfm.batch.options import BatchOptions
bundle, inbox, outbox, watch, *settings = sys.argv[1:]
options = BatchOptions(watch=watch == "watch", settle_s=0.6, min_free_gb=0.1)
sys.exit(batch(Path(bundle), Path(inbox), Path(outbox), options, settings))
"""


_started: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def ended():
    """No run outlives its test."""
    yield
    for process in _started:
        process.kill()
        process.wait()
    _started.clear()


def start(places, folder, how="watch", crash_at=""):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATHFM_CRASH_AT": crash_at}
    command = [sys.executable, "-c", CODE, places / "bundle", folder / "in", folder / "out", how, *FAST]
    with (folder / "log.txt").open("a") as log:
        _started.append(subprocess.Popen(list(map(str, command)), env=environment, cwd=ROOT, stdout=log, stderr=log))
    return _started[-1]


def wait_for(condition, process, seconds=90.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run has ended"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def results(folder):
    return [json.loads(path.read_text()) for path in sorted((folder / "out" / "results").glob("*/result.json"))]


def counts(folder):
    file = folder / "out" / "health.json"
    return json.loads(file.read_text())["counts"] if file.is_file() else {}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rows_of(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Good slides, one more that is written slowly, and five broken ones."""
    folder = tmp_path_factory.mktemp("slides")
    for number in range(GOOD + 1):
        spec = SyntheticSpec(size_px=Size(512, 512), seed=2000 + number, lesion=number % 2 == 1)
        write_slide(folder / f"s{number:02}.tiff", spec)
    data = (folder / "s00.tiff").read_bytes()
    (folder / "bad-truncated.tiff").write_bytes(data[: len(data) // 3])
    (folder / "bad-empty.tiff").touch()
    (folder / "bad-text.svs").write_text("a letter, not a slide")
    (folder / "bad-jpeg.tiff").write_bytes(data[:4000] + random.Random(1).randbytes(len(data) - 8000) + data[-4000:])
    (folder / "bad-link.tiff").symlink_to(folder / "nothing")
    return folder


def drop(slides, inbox):
    """All slides but the last good one, in a mixed order; two of them twice."""
    files = sorted({*slides.glob("*.tiff"), *slides.glob("*.svs")} - {slides / f"s{GOOD}.tiff"})
    random.Random(2).shuffle(files)
    for path in files:
        shutil.copy(path, inbox / path.name, follow_symlinks=False)
        time.sleep(0.1)
        if path.name in {"s03.tiff", "s04.tiff"}:
            shutil.copy(path, inbox / f"twice-{path.name}")


def drip(path, data, stop):
    """Writes a slide so slowly that it is never whole before it is told to end."""
    with path.open("wb", buffering=0) as file:
        for place in range(len(data) // 2):
            file.write(data[place : place + 1])
            if stop.wait(0.2):
                break
        file.write(data[place + 1 :])


@pytest.mark.timeout(600)
def test_every_good_slide_has_one_result_and_every_bad_one_a_reason_whatever_is_killed(places, slides, tmp_path):
    inbox, stop = tmp_path / "in", threading.Event()
    inbox.mkdir()
    slow = threading.Thread(target=drip, daemon=True, args=(inbox / "slow.tiff", (slides / f"s{GOOD}.tiff").read_bytes(), stop))
    fast = threading.Thread(target=drop, args=(slides, inbox))
    first = start(places, tmp_path, crash_at="batch.result.after_commit:3")
    for thread in (slow, fast):
        thread.start()
    assert first.wait(150) == -signal.SIGKILL and len(results(tmp_path)) == 3

    second = start(places, tmp_path)
    wait_for(lambda: len(results(tmp_path)) >= 12, second)
    time.sleep(random.Random(3).uniform(0, 3))
    assert second.poll() is None
    second.kill()
    second.wait()
    assert 12 <= len(results(tmp_path)) < GOOD

    third = start(places, tmp_path)
    wait_for(lambda: counts(tmp_path).get("done") == GOOD and counts(tmp_path)["waiting"] == 1, third)
    with pytest.raises(UsageError, match=f"process {third.pid}"):
        batch(places / "bundle", inbox, tmp_path / "out")
    (inbox / "s07.tiff").rename(inbox / "renamed.tiff")
    wait_for(lambda: counts(tmp_path)["duplicates"] == 3, third)
    third.send_signal(signal.SIGTERM)
    assert third.wait(30) in {ExitCode.DONE, ExitCode.SOME_FAILED}
    stop.set()
    slow.join()
    fast.join()
    before = {path.name: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in inbox.iterdir()}
    assert start(places, tmp_path, "once").wait(150) == ExitCode.DONE
    assert {path.name: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in inbox.iterdir()} == before

    said = results(tmp_path)
    by_identity = {digest(path): path for path in slides.glob("s*.tiff")}
    assert sorted(each["identity"] for each in said) == sorted(by_identity)
    assert counts(tmp_path) == {"done": GOOD + 1, "abstained": counts(tmp_path)["abstained"], "quarantined": 5} | {
        "duplicates": 3,
        "waiting": 0,
        "ignored": 0,
    }
    records = [json.loads(path.read_text()) for path in (tmp_path / "out" / "quarantine").glob("*.json")]
    assert {name for record in records for name in record["files"]} == {path.name for path in slides.glob("bad-*")}
    assert all(record["reason"] and "killed" not in record["reason"] for record in records)
    assert health(tmp_path / "out") == ExitCode.SOME_FAILED

    check_results(places, tmp_path, said, by_identity)
    check_log(tmp_path / "out")


def check_results(places, folder, said, by_identity):
    """They are, to the byte, what ``pathfm mil predict`` says of the same slides."""
    (folder / "same").mkdir()
    for each in said:
        shutil.copy(by_identity[each["identity"]], folder / "same" / f"{each['slide_id']}.tiff")
    assert mil_predict([str(folder / "same")], folder / "predicted", places / "bundle", FAST) == ExitCode.DONE
    rows = rows_of(folder / "out" / "predictions.csv")
    names = [row.pop("result") for row in rows]
    assert names == [each["name"] for each in said]
    assert sorted(rows, key=lambda row: row["slide_id"]) == rows_of(folder / "predicted" / "predictions.csv")
    for each in said:
        place = folder / "out" / "results" / each["name"]
        assert {path.name: digest(path) for path in place.iterdir() if path.name != "result.json"} == each["files"]
        made = {"heatmap.png": "heatmaps/{}.png", "heatmap.geojson": "geojson/{}.geojson", "attention.csv": "attention/{}.csv"}
        for name, other in made.items():
            assert (place / name).read_bytes() == (folder / "predicted" / other.format(each["slide_id"])).read_bytes()


def check_log(out):
    """The chain of events is whole, every result is told of, and an altered line is found."""
    assert verify(out) == audit(out) == ExitCode.DONE
    log = next(iter(sorted(out.glob("events-*.jsonl"))))
    lines = log.read_text().splitlines(keepends=True)
    lines[len(lines) // 2] = lines[len(lines) // 2].replace('"kind": "', '"kind": "x', 1)
    log.write_text("".join(lines))
    assert audit(out) != ExitCode.DONE


POINTS = ("batch.ledger.file:2", "batch.round.started", "mil.predict.slide:2", "batch.result.before_commit")
POINTS += ("batch.result.after_commit", "batch.result.told", "batch.ledger.done", "batch.quarantine.recorded")


@pytest.mark.timeout(600)
def test_killed_at_every_point_the_next_run_ends_as_if_nothing_had_happened(places, slides, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("s00.tiff", "s01.tiff", "bad-text.svs"):
        shutil.copy(slides / name, tmp_path / "in")
    for point in POINTS:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert start(places, tmp_path, "once", point).wait(120) == -signal.SIGKILL, point
        was_recorded = list((tmp_path / "out" / "quarantine").glob("*.json"))
        assert start(places, tmp_path, "once").wait(120) == ExitCode.SOME_FAILED or was_recorded
        names = [each["name"] for each in results(tmp_path)]
        assert [name.partition("-")[0] for name in names] == ["s00", "s01"], point
        assert counts(tmp_path) == {"done": 2, "abstained": counts(tmp_path)["abstained"], "quarantined": 1} | {
            "duplicates": 0,
            "waiting": 0,
            "ignored": 0,
        }
        assert [row["result"] for row in rows_of(tmp_path / "out" / "predictions.csv")] == names
        assert not list((tmp_path / "out").rglob("*.partial")), point
        assert verify(tmp_path / "out") == audit(tmp_path / "out") == ExitCode.DONE, point


def test_a_new_bundle_must_be_meant_and_does_nothing_again(places, tmp_path, slides):
    (tmp_path / "in").mkdir()
    shutil.copy(slides / "s00.tiff", tmp_path / "in")
    options = BatchOptions(settle_s=SETTLE_S, min_free_gb=0.1)
    assert batch(places / "bundle", tmp_path / "in", tmp_path / "out", options, FAST) == ExitCode.DONE
    (before,) = results(tmp_path)
    ledger = tmp_path / "out" / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace(before["bundle"], "f" * 64))
    with pytest.raises(UsageError, match="--new-bundle"):
        batch(places / "bundle", tmp_path / "in", tmp_path / "out", options, FAST)
    options = BatchOptions(settle_s=SETTLE_S, min_free_gb=0.1, new_bundle=True)
    assert batch(places / "bundle", tmp_path / "in", tmp_path / "out", options, FAST) == ExitCode.DONE
    assert results(tmp_path) == [before]
    assert (Path(tmp_path) / "out" / "predictions.csv").is_file()


def test_a_bundle_is_loaded_once_for_all_rounds_and_given_up_when_it_is_replaced(places, tmp_path, slides, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in ("s00.tiff", "s01.tiff", "s02.tiff"):
        shutil.copy(slides / name, tmp_path / "in")
    shutil.copytree(places / "bundle", tmp_path / "bundle")
    load, commit, loaded = sets.load_encoder, runner.commit_result, []

    def committed(*given):
        commit(*given)
        if len(results(tmp_path)) == 2:
            (tmp_path / "bundle" / "metrics.json").write_text("{}")

    monkeypatch.setattr(sets, "load_encoder", lambda *given, **more: loaded.append(given[0]) or load(*given, **more))
    monkeypatch.setattr(runner, "commit_result", committed)
    options = BatchOptions(settle_s=SETTLE_S, min_free_gb=0.1, round=1)
    with pytest.raises(BundleError, match="is not the file that was locked"):
        batch(tmp_path / "bundle", tmp_path / "in", tmp_path / "out", options, FAST)
    assert len(loaded) == 1 and len(results(tmp_path)) == 2
    assert health(tmp_path / "out") == ExitCode.INTERNAL
