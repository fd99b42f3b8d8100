"""kill -9 while slides are tiled: nothing is lost, nothing is doubled, and the same command again finishes the work."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from typing import NamedTuple

import pytest

from tests.flows.tile_runs import (
    digest,
    end,
    events,
    is_plain,
    leased,
    litter,
    made,
    outcomes,
    said,
    start,
    stores_of,
    tile,
    wait_until,
    workers_of,
    write_slides,
)

SLIDES, TILE_PX = 5, 32
MOMENTS = 20
VICTIMS = ("group", "parent", "group", "worker")
SHARES = [(index + share) / MOMENTS for index, share in enumerate(random.Random(20).random() for _ in range(MOMENTS))]
"""Random moments, one in each twentieth of the work."""
STALE = "store.commit.between_renames"
POINTS = (
    "tile.tile",
    "tile.tile:60",
    "tile.before_commit",
    "tile.before_commit:3",
    "store.commit.before_rename",  # the settings
    "store.commit.before_rename:2",  # a contact sheet
    "store.commit.before_rename:3",  # a store
    "store.commit.before_rename:7",  # the overlay of another slide
    "lease.created",
    "lease.taken",
    "lease.taken:3",
    "lease.before_release",
    "lease.before_release:3",
    STALE,
    f"{STALE}:3",
)


class Undisturbed(NamedTuple):
    """Slides, what a run makes of them when nothing happens, and how long it works [s]."""

    slides: object
    digest: str
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    slides = write_slides(folder / "slides", SLIDES, 2048)
    code, _, err = tile(slides, folder / "out", tile_px=TILE_PX, workers=2)
    assert (code, litter(folder / "out")) == (0, []), err
    (ended,) = (event for event in events(folder / "out") if event["kind"] == "run_ended")
    return Undisturbed(slides, digest(folder / "out"), ended["seconds"])


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Three small slides and the digest of their stores."""
    folder = tmp_path_factory.mktemp("few")
    slides = write_slides(folder / "slides", 3, 512)
    code, _, err = tile(slides, folder / "out")
    assert code == 0, err
    return slides, digest(folder / "out")


def _finish(slides, out, expected, **options):
    """The same command again; what was whole before stays as it is."""
    whole = {name: (stores_of(out) / f"{name}.zarr" / "zarr.json").stat() for name in (made(out) if expected else ())}
    code, said_out, err = tile(slides, out, **options)
    assert code == 0, err
    assert is_plain(err)
    assert litter(out) == []
    assert digest(out) == expected
    for name, before in whole.items():
        after = (stores_of(out) / f"{name}.zarr" / "zarr.json").stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), f"{name} was made twice"
    assert {status for status, _ in outcomes(out).values()} <= {"done", "kept"}
    return said_out


def _kill_in_work(undisturbed, out, seconds, victim):
    """Kills a run, or a part of it, so long after it took its first lease; how long it worked if that was too late, else 0."""
    process = start(undisturbed.slides, out, tile_px=TILE_PX, workers=2)
    assert wait_until(lambda: leased(out), process)
    began = time.monotonic()
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    worked = time.monotonic() - began
    if victim == "worker":
        for pid in (wait_until(lambda: workers_of(process), process) or [])[:1]:
            os.kill(pid, signal.SIGKILL)
    elif process.poll() is None:
        (os.killpg if victim == "group" else os.kill)(process.pid, signal.SIGKILL)
    hidden, whole = litter(out), made(out)
    code, _, err = end(process)
    assert is_plain(err) or victim == "parent"  # Python complains of a parent that died while it started a worker
    if victim == "worker":
        assert code == 0, "the slide is tried again"
        return 0 if "its worker process was killed" in err else worked
    in_work = 0 < len(whole) < SLIDES or any(name.endswith((".partial", ".lease")) for name in hidden)
    is_hit = code == -signal.SIGKILL and in_work and not (stores_of(out) / "record.json").exists()
    return 0 if is_hit else worked


@pytest.mark.long
@pytest.mark.parametrize("number", range(MOMENTS))
def test_killed_at_a_random_moment(tmp_path, undisturbed, number):
    out, seconds = tmp_path / "out", undisturbed.seconds
    for attempt in range(12):  # a run that was faster than the first, or was hit between two slides: a little earlier
        seconds = _kill_in_work(undisturbed, out, seconds * SHARES[number] * 0.95**attempt, VICTIMS[number % len(VICTIMS)])
        if not seconds:
            break
        shutil.rmtree(out)
    else:
        pytest.fail("no kill hit the work")
    _finish(undisturbed.slides, out, undisturbed.digest, tile_px=TILE_PX, workers=2)


@pytest.mark.long
def test_killed_again_and_again(tmp_path, undisturbed):
    """Every rerun is killed too, until one gets through: the work still goes on."""
    out, dice = tmp_path / "out", random.Random(7)
    for _ in range(6):
        process = start(undisturbed.slides, out, tile_px=TILE_PX, workers=2)
        wait_until(lambda: leased(out), process)
        time.sleep(dice.uniform(0.1, 0.4) * undisturbed.seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        end(process)
    _finish(undisturbed.slides, out, undisturbed.digest, tile_px=TILE_PX, workers=2)
    assert set(said(out, "slide_done").values()) == {1}, "a slide that was done has been made again"


def _killed_at(slides, out, point, **options):
    """Ends at a crash point, in the parent or in a worker; whether it was the parent."""
    code, _, err = tile(slides, out, crash_at=point, **options)
    assert is_plain(err)
    if code == -signal.SIGKILL:
        return True
    # The slide was tried again, by a new worker, which may come to the same point.
    assert "its worker process was killed" in err
    reasons = [reason for status, reason in outcomes(out).values() if status == "failed"]
    assert code == (3 if reasons else 0), err
    assert all("SIGKILL" in reason for reason in reasons)
    return False


def _old_and_new(tmp_path, few):
    """An output folder whose stores are those of earlier slides of the same names."""
    slides, out = tmp_path / "slides", tmp_path / "out"
    write_slides(slides, 3, 384, first_seed=40)
    code, _, err = tile(slides, out)
    assert code == 0, err
    for slide in few[0].iterdir():
        shutil.copy(slide, slides)
    return slides, out


@pytest.mark.long
@pytest.mark.parametrize("point", [point for point in POINTS if not point.startswith(STALE)])
def test_killed_at_a_point(tmp_path, few, point):
    out = tmp_path / "out"
    if _killed_at(few[0], out, point):
        assert len(made(out)) < 3 or litter(out)
    _finish(few[0], out, few[1])


@pytest.mark.long
@pytest.mark.parametrize("point", [STALE, f"{STALE}:3", "store.commit.before_rename:3", "tile.before_commit:2"])
def test_killed_while_stores_are_replaced(tmp_path, few, point):
    slides, out = _old_and_new(tmp_path, few)
    _killed_at(slides, out, point)
    if point == STALE:  # every old store is aside and no new one in place: the moment that is hardest to repair
        assert (made(out), sum(name.endswith(".old") for name in litter(out))) == ([], 3)
    code, _, err = tile(slides, out)
    assert code == 0, err
    assert (litter(out), digest(out)) == ([], few[1])


@pytest.mark.long
def test_killed_while_a_picture_is_written(tmp_path, few):
    out = tmp_path / "out"
    _killed_at(few[0], out, "store.commit.before_rename:2")  # every worker there, and then the parent at its record
    assert any(name.startswith(f"tiles/{stores_of(out).name}/pictures/.") for name in litter(out))
    assert "nothing to do" not in _finish(few[0], out, few[1])
    assert "nothing to do" in _finish(few[0], out, few[1])


@pytest.mark.long
def test_killed_while_an_expired_lease_is_taken_over(tmp_path, few):
    out = tmp_path / "out"
    assert _killed_at(few[0], out, "lease.taken")
    assert _killed_at(few[0], out, "lease.before_takeover")
    assert any(name.endswith(".lease") for name in litter(out))
    _finish(few[0], out, few[1])


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2])
def test_killed_while_the_record_or_the_page_is_written(tmp_path, few, count):
    slides, out = shutil.copytree(few[0], tmp_path / "slides"), tmp_path / "out"
    assert tile(slides, out)[0] == 0
    (slides / "bad.svs").write_bytes(b"no slide")
    assert _killed_at(slides, out, f"store.commit.before_rename:{count}")
    for folder in (out, tmp_path / "undisturbed"):
        code, _, err = tile(slides, folder)
        assert (code, is_plain(err), litter(folder)) == (3, True, [])
        assert outcomes(folder)["bad"][0] == "failed"
    assert digest(out) == digest(tmp_path / "undisturbed")


def test_killed_after_the_last_store_and_before_the_record(tmp_path, few):
    """Everything is made, and nothing says so: the next run writes the record and the page."""
    out = tmp_path / "out"
    shutil.copytree(few[0].parent / "out", out)
    for name in ("record.json", "index.html"):
        (stores_of(out) / name).unlink()
    _finish(few[0], out, few[1])


@pytest.mark.long
def test_killed_before_the_record_of_an_earlier_run_is_replaced(tmp_path, few):
    """The record and the page still tell of a slide that failed once, and has been made since."""
    slides, out = shutil.copytree(few[0], tmp_path / "slides"), tmp_path / "out"
    (slides / "s1.svs").write_bytes(b"no slide")
    assert tile(slides, out)[0] == 3
    told = {name: (stores_of(out) / name).read_bytes() for name in ("record.json", "index.html")}
    shutil.copy(few[0] / "s1.svs", slides)
    assert tile(slides, out)[0] == 0
    for name, content in told.items():
        (stores_of(out) / name).write_bytes(content)
    _finish(slides, out, few[1])
