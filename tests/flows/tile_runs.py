"""Runs of ``pathfm tile`` as processes of their own, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from pathfm.geometry import Size
from pathfm.slides.synthetic import SyntheticSpec, write_slide
from pathfm.store.commit import content_digest

PATIENCE_S = 90.0
"""A run that takes longer hangs."""


def write_slides(folder, count, side_px, first_seed=0):
    """Slides ``s0.svs``, ``s1.svs`` ..., without the masks that would count as slides."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        spec = SyntheticSpec(size_px=Size(side_px, side_px), seed=first_seed + index)
        write_slide(folder / f"s{index}.svs", spec, folder.parent / "lesion.png")
    return folder


def leased(out):
    """The leases that are held: a run that has one is at work."""
    return sorted(out.glob("tiles/*/.*.lease"))


def start(source, out, *settings, tile_px=64, workers=1, options=(), crash_at="", **more):
    """Starts the command in a process group of its own."""
    command = [sys.executable, "-m", "pathfm", "tile", str(source), "--out", str(out), "--tile-px", str(tile_px), *options]
    for setting in (f"compute.workers={workers}", "compute.threads=1", *settings):
        command += ["--set", setting]
    environment = {**os.environ, "PATHFM_CRASH_AT": crash_at, "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def end(process):
    """Waits for the end: exit code, standard output, standard error."""
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    except BaseException:
        with process:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def tile(source, out, *settings, **options):
    """Runs the command to its end."""
    return end(start(source, out, *settings, **options))


def stores_of(out):
    """The folder of stores of the only way in which an output folder was tiled."""
    (folder,) = (out / "tiles").iterdir()
    return folder


def made(out):
    """Names of the slides whose stores are there."""
    return sorted(path.stem for path in out.glob("tiles/*/*.zarr"))


def litter(out):
    """Leases, half-written files and folders, and stores put aside."""
    return sorted(path.relative_to(out).as_posix() for path in out.rglob(".*") if path.name != ".chain-id")


def digest(out):
    return content_digest(stores_of(out))


def said(out, kind):
    """Events of one kind, of all runs, as a count of slides."""
    return Counter(event["slide_id"] for event in events(out) if event["kind"] == kind)


def events(out):
    return [json.loads(line) for file in sorted(out.glob("tiles/*/events-*.jsonl")) for line in file.read_text().splitlines()]


def outcomes(out, record="record.json"):
    """Status and reason of every slide in a record."""
    rows = json.loads((stores_of(out) / record).read_text())["outcomes"]
    assert len({row["slide_id"] for row in rows}) == len(rows)
    return {row["slide_id"]: (row["status"], row["reason"]) for row in rows}


def wait_until(condition, process):
    """Waits for something that happens while a process runs; what it was, or nothing if the process ended without it."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        if process.poll() is not None:
            return condition()
        if time.monotonic() >= deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"it never happened: {end(process)}")
        time.sleep(0.002)
    return found


def workers_of(process):
    """Process numbers of the workers of a run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == process.pid and b"spawn_main" in command:
            found.append(int(folder.name))
    return found


def is_plain(err):
    """Whether what a run said on standard error is for users: no traceback, no defect."""
    return "Traceback" not in err and "internal error" not in err
