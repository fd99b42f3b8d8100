"""kill -9 while features are extracted: what is there is whole, and the same command again makes the same files."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from typing import NamedTuple

import pytest

from pathfm.store.commit import content_digest
from tests.flows.conftest import pathfm, run
from tests.flows.tile_runs import tile, wait_until, write_slides

pytestmark = pytest.mark.long

SLIDES, MOMENTS = 4, 20
SHARES = [(index + share) / MOMENTS for index, share in enumerate(random.Random(5).random() for _ in range(MOMENTS))]
"""Random moments, one in each twentieth of the work."""
SETTINGS = ("--encoder", "untrained:vit_tiny_patch16_224", "--set", "extract.input_px=64", "--set", "extract.precision=fp32")
POINTS = (
    "extract.rows",
    "extract.rows:30",
    "extract.slide",
    "extract.slide:3",
    "store.commit.before_rename",  # the features of a slide
    "store.commit.before_rename:2",  # its control
    "store.commit.before_rename:5",
    "lease.taken",
    "lease.taken:3",
    "lease.before_release",
    "lease.before_release:2",
)


class Undisturbed(NamedTuple):
    """A folder with tiles, the features that a run makes of them when nothing happens, and how long it works [s]."""

    tiled: object
    features: dict[str, str]
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    slides = write_slides(folder / "slides", SLIDES, 2560)
    code, _, err = tile(slides, folder / "tiled", workers=2)
    assert code == 0, err
    out = shutil.copytree(folder / "tiled", folder / "out")
    code, _, err = run("extract", out, *SETTINGS)
    assert code == 0, err
    assert litter(out) == []
    assert len(features(out)) == 2 * SLIDES
    ended = [json.loads(line) for path in out.glob("features/*/*/events-*.jsonl") for line in path.read_text().splitlines()]
    return Undisturbed(folder / "tiled", features(out), next(e["seconds"] for e in ended if e["kind"] == "run_ended"))


def features(out):
    return {path.relative_to(out).as_posix(): content_digest(path) for path in out.glob("features/*/*/*.h5")}


def litter(out):
    found = [path for path in out.glob("features/*/*/.*") if path.name != ".chain-id"]
    return sorted(path.relative_to(out).as_posix() for path in found)


def leased(out):
    return list(out.glob("features/*/*/.*.lease"))


def finish(out, expected):
    """The same command again: it does what is left, and nothing twice."""
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("features/*/*/*.h5")}
    assert all(expected[path.relative_to(out).as_posix()] == content_digest(path) for path in before)
    code, said, err = run("extract", out, *SETTINGS)
    assert code == 0, err
    assert "Traceback" not in err
    assert (features(out), litter(out)) == (expected, [])
    assert all((path.stat().st_ino, path.stat().st_mtime_ns) == kept for path, kept in before.items()), "a file was made twice"
    return said


def kill_in_work(undisturbed, out, seconds):
    """Kills a run so long after it took its first lease; how long it worked if that was too late, else 0."""
    shutil.copytree(undisturbed.tiled, out)
    process = pathfm("extract", out, *SETTINGS)
    assert wait_until(lambda: leased(out), process)
    began = time.monotonic()
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    worked = time.monotonic() - began
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    is_hit = process.returncode == -signal.SIGKILL and leased(out) and len(features(out)) < 2 * SLIDES
    return 0 if is_hit else worked


@pytest.mark.parametrize("number", range(MOMENTS))
def test_killed_at_a_random_moment(tmp_path, undisturbed, number):
    seconds = undisturbed.seconds
    for attempt in range(12):  # a run that was faster than the first: a little earlier
        seconds = kill_in_work(undisturbed, tmp_path / f"out{attempt}", seconds * SHARES[number] * 0.9**attempt)
        if not seconds:
            break
    else:
        pytest.fail("no kill hit the work")
    finish(tmp_path / f"out{attempt}", undisturbed.features)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(tmp_path, undisturbed, point):
    out = shutil.copytree(undisturbed.tiled, tmp_path / "out")
    code, _, err = run("extract", out, *SETTINGS, crash_at=point)
    assert code == -signal.SIGKILL, err
    assert len(features(out)) < 2 * SLIDES or litter(out)
    finish(out, undisturbed.features)


def test_two_processes_divide_the_slides_and_a_killed_one_leaves_its_own_to_the_other(tmp_path, undisturbed):
    out = shutil.copytree(undisturbed.tiled, tmp_path / "out")
    processes = [pathfm("extract", out, *SETTINGS, "--set", "compute.lease_s=10") for _ in range(2)]
    assert wait_until(lambda: len(leased(out)) > 1, processes[0])
    os.killpg(processes[0].pid, signal.SIGKILL)
    processes[0].communicate()
    _, err = processes[1].communicate(timeout=120)
    assert processes[1].returncode == 0, err
    finish(out, undisturbed.features)


def test_shards_and_devices_make_the_same_files(tmp_path, undisturbed):
    parts, devices = (shutil.copytree(undisturbed.tiled, tmp_path / name) for name in ("parts", "devices"))
    for shard in ("1/3", "2/3", "3/3"):
        code, _, err = run("extract", parts, *SETTINGS, "--shard", shard)
        assert code == 0, err
    code, _, err = run("extract", devices, *SETTINGS, "--set", "compute.devices=2", "--set", "compute.device=cpu")
    assert code == 0, err
    assert features(parts) == features(devices) == undisturbed.features
    assert litter(parts) == litter(devices) == []
