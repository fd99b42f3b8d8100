"""Many slides in one folder: several runs at once, holders that die, drives that fail, slides that vanish or hang, shards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest

from pathfm.store.commit import commit_dir, recover
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

COUNT = 3
NAMES = [f"s{index}" for index in range(COUNT)]
ELSEWHERE = "othernode-abcdef-012345-1-4711-99"
"""A process of another machine, as leases name it."""


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return write_slides(tmp_path_factory.mktemp("batch") / "slides", COUNT, 512)


@pytest.fixture(scope="module")
def undisturbed(slides):
    """The output folder of a run that nothing disturbed."""
    out = slides.parent / "undisturbed"
    code, _, err = tile(slides, out)
    assert (code, litter(out)) == (0, []), err
    return out


@pytest.fixture
def some(tmp_path, slides):
    """Slides of one's own, to be destroyed."""
    return shutil.copytree(slides, tmp_path / "slides")


def _statuses(out):
    return {name: status for name, (status, _) in outcomes(out).items()}


def _count(text, status):
    """How many slides a run says ended so: ``tile: 2 done, 1 kept``."""
    words = text.replace(",", " ").replace("(", " ").replace(")", " ").split()
    return sum(int(words[index - 1]) for index, word in enumerate(words) if word == status and words[index - 1].isdigit())


# --- two runs at once


def _two_at_once(slides, out, undisturbed, delay_s=0.0, **options):
    settings = ("compute.lease_s=10",)  # the shorter, the sooner is the end of another's work seen
    first = start(slides, out, *settings, **options)
    if delay_s:
        wait_until(lambda: leased(out), first)
        time.sleep(delay_s)
    second = start(slides, out, *settings, **options)
    for process in (first, second):
        code, told, err = end(process)
        assert code == 0, err
        assert is_plain(err)
        assert _count(told, "done") + _count(told, "kept") == len(made(undisturbed))
    assert set(said(out, "slide_done").values()) == {1}
    assert sorted(said(out, "slide_done")) == made(undisturbed)
    assert set(_statuses(out)) == set(made(undisturbed))
    assert (litter(out), digest(out)) == ([], digest(undisturbed))


def test_two_runs_on_one_folder_make_every_slide_once(tmp_path, slides, undisturbed):
    _two_at_once(slides, tmp_path / "out", undisturbed)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """Slides that take a while, and their output folder."""
    folder = tmp_path_factory.mktemp("larger")
    slides = write_slides(folder / "slides", 5, 1536)
    code, _, err = tile(slides, folder / "out", tile_px=32)
    assert code == 0, err
    return slides, folder / "out"


@pytest.mark.long
@pytest.mark.parametrize(("delay_s", "workers"), [(0.0, 1), (0.4, 1), (0.0, 2), (1.0, 2)])
def test_two_runs_that_start_apart(tmp_path, larger, delay_s, workers):
    _two_at_once(larger[0], tmp_path / "out", larger[1], delay_s, tile_px=32, workers=workers)


@pytest.mark.long
def test_two_runs_over_stale_stores(tmp_path, slides, some, undisturbed):
    out = tmp_path / "out"
    write_slides(some, COUNT, 384, first_seed=70)
    assert tile(some, out)[0] == 0
    for slide in slides.iterdir():
        shutil.copy(slide, some)
    for process in [start(some, out, "compute.lease_s=10") for _ in range(2)]:
        code, _, err = end(process)
        assert code == 0, err
    assert said(out, "slide_done") == dict.fromkeys(NAMES, 2)
    assert (litter(out), digest(out)) == ([], digest(undisturbed))


@pytest.mark.long
def test_one_of_two_runs_is_killed(tmp_path, larger):
    """The other one makes what is left, without being started again."""
    out = tmp_path / "out"
    first, second = (start(larger[0], out, "compute.lease_s=3600", tile_px=32) for _ in range(2))
    wait_until(lambda: len(made(out)) >= 1, first)
    os.killpg(first.pid, signal.SIGKILL)
    assert end(first)[0] == -signal.SIGKILL
    code, _, err = end(second)
    assert code == 0, err
    assert set(_statuses(out)) == set(made(out))
    assert (litter(out), digest(out)) == ([], digest(larger[1]))


def test_a_reader_puts_the_old_folder_back_while_it_is_replaced(tmp_path, monkeypatch):
    """Whoever opens a store begins with ``recover``, also between the two renames of who replaces it."""
    target, seen = tmp_path / "store", []

    def look(point):
        if point == "store.commit.between_renames" and len(seen) < 5:
            recover(target)
            seen.append((target / "number").read_text())

    monkeypatch.setattr("pathfm.store.commit.crash_point", look)
    for number in range(2):
        with commit_dir(target) as folder:
            (folder / "number").write_text(str(number))
    assert (seen, (target / "number").read_text()) == (["0"] * 5, "1")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.long
def test_a_folder_that_is_replaced_while_many_look_at_it(tmp_path):
    target, over = tmp_path / "store", threading.Event()

    def look():
        while not over.wait(0.00005):
            recover(target)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(300):
            with commit_dir(target) as folder:
                (folder / "number").write_text(str(number))
            assert (target / "number").read_text() == str(number)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


# --- leases


def _forge_lease(out, undisturbed, name="s0", ttl_s=10.0):
    """A lease of another machine, as ``Leases`` writes it."""
    path = out / "tiles" / stores_of(undisturbed).name / f".{name}.zarr.lease"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"token": "0" * 32, "process": ELSEWHERE, "ttl_s": ttl_s}) + "\n")
    return path


def test_leases_of_a_killed_run_are_taken_over_at_once(tmp_path, slides, undisturbed):
    """With so long a lease the run would otherwise hang."""
    out = tmp_path / "out"
    process = start(slides, out, "compute.lease_s=86400")
    wait_until(lambda: leased(out), process)
    os.killpg(process.pid, signal.SIGKILL)
    end(process)
    assert any(name.endswith(".lease") for name in litter(out))
    code, _, err = tile(slides, out, "compute.lease_s=86400")
    assert code == 0, err
    assert (litter(out), digest(out)) == ([], digest(undisturbed))


@pytest.mark.long
def test_a_dead_holder_on_another_machine_is_waited_for(tmp_path, slides, undisturbed):
    out = tmp_path / "out"
    lease = _forge_lease(out, undisturbed)
    written = lease.stat().st_mtime
    half = lease.with_name(f".s0.zarr.{ELSEWHERE}.partial")
    half.mkdir()
    process = start(slides, out, "compute.lease_s=10", "compute.workers=2")
    assert wait_until(lambda: len(made(out)) == 2, process)
    assert made(out) == ["s1", "s2"], "the others do not wait for it"
    store = stores_of(out) / "s0.zarr"
    assert wait_until(store.exists, process)
    # Time stamps of one drive: the store was begun after ten seconds of silence.
    assert store.stat().st_mtime - written >= 10
    code, _, err = end(process)
    assert code == 0, err
    assert (litter(out), digest(out)) == ([], digest(undisturbed))
    assert said(out, "slide_done") == dict.fromkeys(NAMES, 1)


@pytest.mark.long
def test_a_live_holder_on_another_machine_is_waited_for_and_its_store_accepted(tmp_path, slides, undisturbed):
    out, over = tmp_path / "out", threading.Event()
    lease = _forge_lease(out, undisturbed)

    def live():
        while not over.wait(0.5):
            with lease.open("ab") as file:
                file.write(b".")

    thread = threading.Thread(target=live)
    thread.start()
    process = start(slides, out, "compute.lease_s=10")
    try:
        assert wait_until(lambda: len(made(out)) == 2, process)
        # Longer than the lease would live without its holder.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(13)
        assert made(out) == ["s1", "s2"]
    finally:
        over.set()
        thread.join()
    shutil.copytree(stores_of(undisturbed) / "s0.zarr", out / "whole")
    shutil.copytree(stores_of(undisturbed) / "pictures", stores_of(out) / "pictures", dirs_exist_ok=True)
    (out / "whole").rename(stores_of(out) / "s0.zarr")
    lease.unlink()
    code, told, err = end(process)
    assert code == 0, err
    assert (_count(told, "kept"), _count(told, "done")) == (1, 2)
    assert _statuses(out) == {"s0": "kept", "s1": "done", "s2": "done"}
    assert said(out, "slide_done") == {"s1": 1, "s2": 1}
    assert (litter(out), digest(out)) == ([], digest(undisturbed))


@pytest.mark.long
def test_a_holder_that_was_asleep_commits_nothing(tmp_path, slides, undisturbed):
    """A stopped run loses its lease to another machine, which is asleep itself by the time the run wakes up."""
    out = tmp_path / "out"
    process = start(slides, out, "compute.lease_s=10")
    assert wait_until(lambda: leased(out), process)
    os.killpg(process.pid, signal.SIGSTOP)
    (lease,) = leased(out)
    name = lease.name.removeprefix(".").removesuffix(".zarr.lease")
    before = made(out)
    lease.unlink()
    _forge_lease(out, undisturbed, name)
    os.killpg(process.pid, signal.SIGCONT)
    code, _, err = end(process)
    assert code == 0, err
    assert is_plain(err)
    assert name not in before
    assert (litter(out), digest(out)) == ([], digest(undisturbed))


# --- drives


@contextmanager
def _drive(folder, size):
    """A drive in memory."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a drive in memory cannot be mounted here (needs root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _remount(folder, option):
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def _bytes(out):
    return sum(path.stat().st_blocks * 512 for path in out.rglob("*"))


def _fills(tmp_path, source, undisturbed, share, **options):
    """A run on a drive that is too small, and again after room was made."""
    with _drive(tmp_path / "drive", f"{max(1, int(_bytes(undisturbed) * share / 1024))}k") as drive:
        out = drive / "out"
        code, told, err = tile(source, out, **options)
        assert code == 3, (told, err)
        assert is_plain(err)
        assert "the disk is full" in told + err
        assert [name for name in litter(out) if not name.endswith(".lease")] == []
        _remount(drive, "size=64m")
        whole = made(out)
        code, told, err = tile(source, out, **options)
        assert code == 0, (told, err)
        assert is_plain(err)
        assert _count(told, "kept") == len(whole)
        assert (litter(out), digest(out)) == ([], digest(undisturbed))


@pytest.mark.long
@pytest.mark.parametrize("share", [0.0, 0.05, 0.25, 0.6, 0.95])
def test_a_disk_that_is_full_at_any_moment(tmp_path, larger, share):
    _fills(tmp_path, larger[0], larger[1], share, tile_px=32, workers=2)


@pytest.mark.parametrize("is_begun", [False, pytest.param(True, marks=pytest.mark.long)], ids=["empty", "begun"])
def test_an_output_folder_that_cannot_be_written(tmp_path, slides, undisturbed, is_begun):
    with _drive(tmp_path / "drive", "64m") as drive:
        out = drive / "out"
        if is_begun:
            shutil.copytree(undisturbed, out)
            shutil.rmtree(stores_of(out) / "s1.zarr")
        _remount(drive, "ro")
        code, _, err = tile(slides, out)
        assert code in {2, 3}
        assert is_plain(err)
        lines = [line for line in err.splitlines() if "read-only" in line.lower()]
        assert lines, err
        assert len(err.splitlines()) <= 3
        _remount(drive, "rw")
        code, _, err = tile(slides, out)
        assert code == 0, err
        assert (litter(out), digest(out)) == ([], digest(undisturbed))


@pytest.mark.long
def test_finished_work_on_a_drive_that_cannot_be_written(tmp_path, slides):
    with _drive(tmp_path / "drive", "64m") as drive:
        assert tile(slides, drive / "out")[0] == 0
        _remount(drive, "ro")
        code, told, err = tile(slides, drive / "out")
        assert code == 0, err
        assert is_plain(err)
        assert "this run is not recorded" in err
        assert "nothing to do" in told


# --- slides


def _while_the_first_is_made(some, out, change, **options):
    """Runs with something happening to the slides as soon as the first store is there."""
    process = start(some, out, **options)
    assert wait_until(lambda: leased(out), process)
    change()
    code, _, err = end(process)
    assert is_plain(err)
    return code


@pytest.mark.long
def test_a_slide_that_vanishes_is_a_failed_row(tmp_path, some, undisturbed):
    out, away = tmp_path / "out", tmp_path / "away.svs"
    assert _while_the_first_is_made(some, out, lambda: (some / "s2.svs").rename(away)) == 3
    rows = outcomes(out)
    assert _statuses(out) == {"s0": "done", "s1": "done", "s2": "failed"}
    assert rows["s2"][1]
    assert str(some) not in rows["s2"][1]
    away.rename(some / "s2.svs")
    code, _, err = tile(some, out)
    assert code == 0, err
    assert (litter(out), digest(out)) == ([], digest(undisturbed))


def test_a_slide_that_is_replaced_while_it_waits_is_never_taken_for_the_old_one(tmp_path, slides, some, undisturbed):
    out, other = tmp_path / "out", tmp_path / "other"
    write_slides(other, 1, 384, first_seed=90)
    assert _while_the_first_is_made(some, out, lambda: (other / "s0.svs").rename(some / "s2.svs")) == 3
    assert _statuses(out) == {"s0": "done", "s1": "done", "s2": "failed"}
    assert "changed" in outcomes(out)["s2"][1]
    assert made(out) == ["s0", "s1"]
    shutil.copy(slides / "s2.svs", some / "s2.svs")
    code, _, err = tile(some, out)
    assert code == 0, err
    assert (litter(out), digest(out)) == ([], digest(undisturbed))


@pytest.fixture(scope="module")
def two_large(tmp_path_factory):
    """Two slides that take long enough to be destroyed meanwhile, and the digest of their stores."""
    folder = tmp_path_factory.mktemp("large")
    slides = write_slides(folder / "slides", 2, 2560)
    assert tile(slides, folder / "out", tile_px=32)[0] == 0
    return slides, digest(folder / "out")


@pytest.mark.long
@pytest.mark.parametrize("how", ["truncated", "overwritten", "deleted"])
def test_a_slide_that_is_destroyed_while_it_is_read(tmp_path, two_large, how):
    slides, out = shutil.copytree(two_large[0], tmp_path / "slides"), tmp_path / "out"
    victim = slides / "s1.svs"

    def destroy():
        if how == "truncated":
            os.truncate(victim, victim.stat().st_size // 2)
        elif how == "overwritten":
            with victim.open("r+b") as file:
                file.seek(victim.stat().st_size // 3)
                file.write(b"\0" * (victim.stat().st_size // 3))
        else:
            victim.unlink()

    process = start(slides, out, tile_px=32)
    assert wait_until(lambda: list(out.glob("tiles/*/.s1.zarr.*.partial/tiles")), process)
    destroy()
    code, _, err = end(process)
    assert is_plain(err)
    rows = outcomes(out)
    assert rows["s0"][0] == "done"
    assert (code, rows["s1"][0], made(out)) == (3, "failed", ["s0"])
    shutil.copy(two_large[0] / "s1.svs", victim)
    code, _, err = tile(slides, out, tile_px=32)
    assert code == 0, err
    assert (litter(out), digest(out)) == ([], two_large[1])


@pytest.mark.long
def test_a_worker_that_hangs_is_ended_and_the_others_go_on(tmp_path, slides, undisturbed):
    out = tmp_path / "out"
    process = start(slides, out, "compute.slide_timeout_s=4", workers=1)
    assert wait_until(lambda: list(out.glob("tiles/*/.s*.partial")), process)
    (worker,) = workers_of(process)
    os.kill(worker, signal.SIGSTOP)
    code, _, err = end(process)
    assert code == 3
    assert is_plain(err)
    failed = [name for name, status in _statuses(out).items() if status == "failed"]
    assert len(failed) == 1
    assert "no result after 4 s" in outcomes(out)[failed[0]][1]
    assert made(out) == [name for name in NAMES if name not in failed]
    code, _, err = tile(slides, out)
    assert code == 0, err
    assert (litter(out), digest(out)) == ([], digest(undisturbed))


@pytest.mark.long
def test_a_pipe_among_the_slides_does_not_hang_the_run(tmp_path, some, undisturbed):
    os.mkfifo(some / "pipe.svs")
    table = tmp_path / "cohort.csv"
    table.write_text("slide_id,path\n" + "".join(f"{path.stem},{path}\n" for path in sorted(some.iterdir())))
    out = tmp_path / "out"
    code, _, err = tile(table, out, "compute.slide_timeout_s=5")
    assert code == 3
    assert is_plain(err)
    assert _statuses(out) == {"pipe": "failed", **dict.fromkeys(NAMES, "done")}
    for name in NAMES:
        assert (stores_of(out) / f"{name}.zarr").is_dir()


# --- shards, workers, caches


@pytest.mark.long
@pytest.mark.parametrize("shards", [2, 3, 5])
def test_all_shards_together_make_what_one_run_makes(tmp_path, slides, undisturbed, shards):
    out = tmp_path / "out"
    processes = [start(slides, out, options=("--shard", f"{index}/{shards}")) for index in range(1, shards + 1)]
    for process in processes:
        code, _, err = end(process)
        assert code == 0, err
        assert is_plain(err)
    assert said(out, "slide_done") == dict.fromkeys(NAMES, 1)
    rows = [outcomes(out, f"record-{index}-of-{shards}.json") for index in range(1, shards + 1)]
    assert sorted(name for row in rows for name in row) == NAMES
    assert not (stores_of(out) / "record.json").exists()
    # A last run without a shard finds everything made, and tells of all slides together.
    code, told, err = tile(slides, out)
    assert (code, _count(told, "kept")) == (0, COUNT), err
    assert _statuses(out) == dict.fromkeys(NAMES, "kept")
    assert (litter(out), digest(out)) == ([], digest(undisturbed))


@pytest.mark.long
def test_a_shard_makes_its_own_slides_only(tmp_path, slides):
    out = tmp_path / "out"
    code, _, err = tile(slides, out, options=("--shard", "2/2"))
    assert code == 0, err
    assert (made(out), set(outcomes(out, "record-2-of-2.json"))) == (["s1"], {"s1"})
    (started,) = (event for event in events(out) if event["kind"] == "run_started")
    assert (started["shard"], started["slides"]) == ("2/2", 1)


@pytest.mark.long
@pytest.mark.parametrize("text", ["0/2", "3/2", "1/0", "half", "-1/2"])
def test_a_wrong_shard_is_refused(tmp_path, slides, text):
    code, _, err = tile(slides, tmp_path / "out", options=(f"--shard={text}",))
    assert (code, len(err.splitlines())) == (2, 1), err
    assert "shard" in err
    assert made(tmp_path / "out") == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "environment"),
    [
        (("compute.workers=2",), {}),
        (("compute.workers=3", "compute.threads=3"), {}),
        (("compute.workers=0", "compute.threads=0"), {"PYTHONHASHSEED": "0"}),
        ((), {"PYTHONHASHSEED": "4242"}),
        (("compute.lease_s=10",), {"LC_ALL": "C", "TZ": "Asia/Tokyo", "OMP_NUM_THREADS": "4"}),
    ],
)
def test_nothing_depends_on_how_the_work_is_done(tmp_path, slides, undisturbed, settings, environment):
    code, _, err = tile(slides, tmp_path / "out", *settings, **environment)
    assert code == 0, err
    assert (litter(tmp_path / "out"), digest(tmp_path / "out")) == ([], digest(undisturbed))


@pytest.mark.long
@pytest.mark.parametrize("gigabytes", [50, 0.0004, 0.0000001], ids=["all", "few", "none"])
def test_a_cache_changes_nothing_and_leaves_nothing(tmp_path, slides, undisturbed, gigabytes):
    out, cache = tmp_path / "out", tmp_path / "cache"
    options = ("--cache-dir", str(cache))
    code, _, err = tile(slides, out, f"compute.cache_gb={gigabytes}", workers=2, options=options)
    assert code == 0, err
    assert is_plain(err)
    assert list(cache.iterdir()) == []
    assert (litter(out), digest(out)) == ([], digest(undisturbed))


@pytest.mark.long
def test_copies_of_a_killed_run_are_removed_by_the_next(tmp_path, larger):
    out, cache = tmp_path / "out", tmp_path / "cache"
    process = start(larger[0], out, tile_px=32, options=("--cache-dir", str(cache)))
    assert wait_until(lambda: made(out), process)
    os.killpg(process.pid, signal.SIGKILL)
    end(process)
    assert list(cache.rglob("*.svs"))
    code, _, err = tile(larger[0], out, tile_px=32, options=("--cache-dir", str(cache)))
    assert code == 0, err
    assert list(cache.iterdir()) == []
    assert (litter(out), digest(out)) == ([], digest(larger[1]))


@pytest.mark.long
def test_a_slide_that_changes_before_it_is_copied_is_not_taken_for_the_old_one(tmp_path, slides, some, undisturbed):
    out, other = tmp_path / "out", tmp_path / "other"
    write_slides(other, 1, 384, first_seed=90)
    options = ("--cache-dir", str(tmp_path / "cache"))
    settings = ("compute.cache_gb=0.0002",)  # one at a time
    process = start(some, out, *settings, options=options)
    assert wait_until(lambda: leased(out), process)
    (other / "s0.svs").rename(some / "s2.svs")
    code, _, err = end(process)
    assert is_plain(err)
    rows = outcomes(out)
    assert code == (3 if rows["s2"][0] == "failed" else 0)  # it may have been copied before
    shutil.copy(slides / "s2.svs", some / "s2.svs")
    code, _, err = tile(some, out)
    assert code == 0, err
    assert (litter(out), digest(out)) == ([], digest(undisturbed))


@pytest.mark.long
def test_a_store_with_a_damaged_attribute_is_made_again(slides, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    for name, damage in {"s0": ("codec", None), "s1": ("counts", 5)}.items():
        file = stores_of(out) / f"{name}.zarr" / "zarr.json"
        content = json.loads(file.read_text())
        content["attributes"]["pathfm"] |= [damage]
        file.write_text(json.dumps(content))
    code, _, err = tile(slides, out)
    assert (code, is_plain(err)) == (0, True), err
    assert {name: fate for name, (fate, _) in outcomes(out).items()} == {"s0": "done", "s1": "done", "s2": "kept"}
    assert digest(out) == digest(undisturbed)
