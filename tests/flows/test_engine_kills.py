"""kill -9 of an engine, of one of its jobs or of a worker, in every phase of a study: the same command again finishes the work.

What was finished is not made again, and what comes out is what an undisturbed run gives. Each test begins with a copy of the
finished study, less what its phase and those after it have made.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from pathfm.store.commit import content_digest
from pathfm.store.receipts import STAGES, receipt_path
from tests.flows.conftest import STUDY, pathfm, read_receipts, run
from tests.flows.tile_runs import PATIENCE_S, end, wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

needs_snakemake = pytest.mark.skipif(
    importlib.util.find_spec("snakemake") is None, reason="Snakemake is not installed (pip install 'pathfm[pipelines]')"
)
PARTS = {"tile": "tiles", "pretrain": "encoder", "extract": "features", "mil": "mil", "report": "report"}
"""What each phase makes, in the output folder."""
PHASES = tuple(PARTS)
SNAKEMAKE = ("--engine", "snakemake", "--jobs", "2")
SLIDES = 12
WHOLE = ("tiles/*/*.zarr/zarr.json", "features/*/*/*.h5", "mil/**/member-*.json", "report/index.html")
"""Files that are written last of what they belong to: where one is, its slide, network or page is finished."""


class Tried:
    """A study in a folder of its own, and what becomes of it."""

    def __init__(self, folder: Path, table: Path, options=()):
        self.file, self.out, self.options = folder / "study.yaml", folder / "out", options
        folder.mkdir(exist_ok=True)
        self.file.write_text(STUDY.format(out="out", table=table))

    def command(self, phase="report", *more):
        settings = ("--set", "compute.group_slides=4", "--set", "compute.threads=1")
        return ["run", self.file, *settings, "--until", phase, *self.options, *more]

    def content(self, phase="report"):
        """The receipts up to a phase, and digests of what they name as it is now; of the whole study, of all that there is."""
        receipts = {f"{each.stage} {each.group}": each for each in read_receipts(self.out, STAGES[: STAGES.index(phase) + 1])}
        named = {path for receipt in receipts.values() for path in receipt.all_artifacts}
        paths = sorted({*named, *(PARTS.values() if phase == "report" else ())})
        return receipts | {path: content_digest(self.out / path) for path in paths}

    def whole(self):
        """What is finished: file -> inode and time of change."""
        found = {path: path.stat() for pattern in WHOLE for path in self.out.glob(pattern) if "bundle" not in path.parts}
        return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}

    def said(self, kind):
        """Events of one kind, of all runs: how often of each slide."""
        files = [path for folder in ("tiles/*", "features/*/*") for path in self.out.glob(f"{folder}/events-*.jsonl")]
        events = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        return Counter((event["stage"], event.get("slide_id", "")) for event in events if event["kind"] == kind)

    def trainings(self):
        """How many processes have trained an encoder; each keeps a log of its own."""
        return len(list(self.out.glob("encoder/*/tensorboard/events.out.*")))

    def finish(self, phase, expected):
        """The same command again; what it said."""
        before, started = self.whole(), time.monotonic()
        code, out, err = run(*self.command(phase))
        assert code == 0, (out, err)
        self.compare(phase, expected, before)
        print(f"{phase}: {len(before)} things were finished, the rerun took {time.monotonic() - started:.1f} s")
        log = self.out / "logs" / phase / "all.log"
        return out + err + (log.read_text() if log.exists() else "")

    def compare(self, phase, expected, before):
        """Whether all is as without the kill, and nothing that was finished before has been made again."""
        after = self.whole()
        assert {path: after.get(path) for path in before} == before, "what was finished has been made again"
        assert set(self.said("slide_done").values()) == {1}, "a slide was made twice"
        content, wanted = self.content(phase), expected.content(phase)
        assert sorted(name for name in wanted | content if content.get(name) != wanted.get(name)) == []
        assert list(self.out.rglob(".*.partial")) == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cohort_table):
    study = Tried(tmp_path_factory.mktemp("undisturbed"), cohort_table)
    code, out, err = run(*study.command())
    assert code == 0, (out, err)
    assert study.said("slide_done") == dict.fromkeys(
        [(stage, f"slide-{number:02}") for stage in ("tile", "extract") for number in range(1, SLIDES + 1)], 1
    )
    return study


@pytest.fixture
def before(tmp_path, cohort_table, undisturbed):
    """Gives the study as it is before a phase."""

    def make(phase, options=()):
        study = Tried(tmp_path / "study", cohort_table, options)
        if phase == "tile":
            return study
        done = PHASES[: PHASES.index(phase)]
        for part in (*(PARTS[each] for each in done), *(f"receipts/{stage}" for stage in ("check", *done))):
            shutil.copytree(undisturbed.out / part, study.out / part)
        return study

    return make


def _is_inside(out, phase):
    """Whether work of the phase is under way."""
    if phase == "tile":
        return bool(list(out.glob("tiles/*/.*.lease")))
    if phase == "pretrain":
        return bool(list(out.glob("encoder/*/checkpoints/step-*2"))) and not list(out.glob("encoder/*/teacher"))
    if phase == "extract":
        return bool(list(out.glob("features/*/*/.*.lease")))
    if phase == "mil":
        return bool(list(out.glob("mil/models/*/member-*.json"))) and not (out / "mil" / "metrics.json").exists()
    return (out / ".report.lease").exists()


def _trains(out, phase):
    """Whether an encoder is about to take its first steps."""
    return bool(list(out.glob("encoder/.*.lease"))) and not list(out.glob("encoder/*/checkpoints/step-*"))


def _processes():
    """Number, group, parent and command line of every process that runs."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if state != "Z":
            yield int(folder.name), int(group), int(parent), command


def _jobs_at(out, phase, group=None):
    """Process numbers of a study's jobs of a phase, by the group of processes."""
    found = [(pid, place) for pid, place, _, command in _processes() if f"\0job\0{phase}\0".encode() in command]
    here = [pid for pid, place in found if group in (None, place) and _folder_of(pid) == out]
    return sorted(here)


def _folder_of(pid):
    try:
        return Path(f"/proc/{pid}/cwd").readlink()
    except OSError:
        return None


def _snakemake_of(process):
    """The group of processes of a run's Snakemake and its jobs."""
    found = [pid for pid, _, parent, command in _processes() if parent == process.pid and b"-m\0snakemake\0" in command]
    return found[0] if found else 0


def _pause(process, group, is_inside):
    """Stops a group of processes at a moment that is surely inside."""
    while True:
        assert wait_until(is_inside, process), process.communicate()
        os.killpg(group, signal.SIGSTOP)
        time.sleep(0.05)
        if is_inside():
            return
        os.killpg(group, signal.SIGCONT)


def _wait_for_the_end(group):
    deadline = time.monotonic() + PATIENCE_S
    while any(group == other for _, other, _, _ in _processes()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


LOCAL_POINTS = {
    "tile": "lease.taken:6",
    "pretrain": "pretrain.step:4",
    "extract": "extract.slide:5",
    "mil": "mil.member.before_commit:3",
    "report": "job.before_receipts:5",  # each phase before it writes receipts, too
}
JOB_POINTS = {**LOCAL_POINTS, "report": "job.before_receipts"}
"""At ``extract.slide:5`` only the job of the one group of five slides is killed."""


@pytest.mark.parametrize("phase", PHASES)
def test_the_engine_in_this_process(before, undisturbed, phase):
    study = before(phase, ("--set", "compute.workers=2"))
    code, _, err = run(*study.command(phase), crash_at=LOCAL_POINTS[phase])
    assert code == -signal.SIGKILL, err
    assert not receipt_path(study.out, phase, "all").exists()
    said = study.finish(phase, undisturbed)
    assert phase != "pretrain" or "resumed at step 2" in said


def _workers_in(group, phase):
    """Process numbers of the workers of a run in this process."""
    found = [pid for pid, place, _, command in _processes() if place == group and b"spawn_main" in command]
    return found if phase != "pretrain" else [pid for pid, place, _, _ in _processes() if place == group and _is_loader(pid)]


def _is_loader(pid):
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("pt_data_worker")
    except OSError:
        return False


@pytest.mark.parametrize("phase", ["tile", "pretrain", "extract"])
def test_a_worker_of_the_engine_in_this_process(before, undisturbed, phase):
    """The phases that have worker processes; extraction has one per device."""
    devices = ("--set", "compute.devices=2", "--set", "compute.device=cpu") if phase == "extract" else ()
    study = before(phase, ("--set", "compute.workers=2", *devices))
    process = pathfm(*study.command(phase))
    # Later, the workers of pretraining have made all batches of so short a run.
    is_inside = _trains if phase == "pretrain" else _is_inside
    _pause(process, process.pid, lambda: is_inside(study.out, phase) and _workers_in(process.pid, phase))
    os.kill(_workers_in(process.pid, phase)[0], signal.SIGKILL)
    os.killpg(process.pid, signal.SIGCONT)
    _, out, err = end(process)
    assert "Traceback" not in err
    # A slide, a training or a device: one is tried again, a run that cannot go on ends, and other devices take over.
    assert process.returncode == {"tile": 0, "pretrain": 1, "extract": 0}[phase], (out, err)
    assert ("SIGKILL" if phase == "extract" else "was killed") in err
    study.finish(phase, undisturbed)


@needs_snakemake
def test_both_engines_make_the_same(before, undisturbed):
    study = before("tile", SNAKEMAKE)
    code, out, err = run(*study.command())
    assert code == 0, (out, err)
    study.compare("report", undisturbed, {})


@needs_snakemake
@pytest.mark.parametrize("phase", PHASES)
def test_a_job_of_snakemake(before, undisturbed, phase):
    """A job is killed, for its memory for example: what does not depend on it goes on, and is kept."""
    study = before(phase, SNAKEMAKE)
    process = pathfm(*study.command(phase), crash_at="" if phase == "tile" else JOB_POINTS[phase])
    if phase == "tile":
        assert wait_until(lambda: _snakemake_of(process), process)
        group = _snakemake_of(process)
        _pause(process, group, lambda: _is_inside(study.out, phase))
        os.kill(_jobs_at(study.out, phase, group)[0], signal.SIGKILL)
        os.killpg(group, signal.SIGCONT)
    _, out, err = end(process)
    assert (process.returncode, "it was killed" in err, "Traceback" in err) == (1, True, False), (out, err)
    receipts = {path: path.stat().st_ino for path in study.out.glob(f"receipts/{phase}/*.json")}
    assert len(receipts) == (2 if phase in {"tile", "extract"} else 0)
    said = study.finish(phase, undisturbed)
    assert {path: path.stat().st_ino for path in receipts} == receipts
    assert phase != "pretrain" or "resumed at step 2" in said


@needs_snakemake
@pytest.mark.parametrize("phase", PHASES)
def test_the_engine_above_snakemake(before, undisturbed, phase):
    """Its jobs go on without it: a rerun shares the slides with them, or waits for them, and nothing is made twice."""
    study = before(phase, SNAKEMAKE)
    process = pathfm(*study.command(phase))
    assert wait_until(lambda: _snakemake_of(process), process)
    orphans = _snakemake_of(process)
    _pause(process, orphans, lambda: _is_inside(study.out, phase))
    process.kill()
    process.communicate()
    assert _jobs_at(study.out, phase, orphans)
    finished, started = study.whole(), study.said("run_started")
    rerun = pathfm(*study.command(phase))
    try:
        assert wait_until(lambda: _jobs_at(study.out, phase, _snakemake_of(rerun)), rerun), rerun.communicate()
        _see_it_wait(study, phase, rerun, started)
    finally:
        os.killpg(orphans, signal.SIGCONT)
    _, out, err = end(rerun)
    assert rerun.returncode == 0, (out, err)
    _wait_for_the_end(orphans)
    study.compare(phase, undisturbed, finished)
    assert study.trainings() == (phase != "tile")


def _see_it_wait(study, phase, rerun, started):
    """A rerun does what it can while the jobs of the killed engine are stopped."""
    log = study.out / "logs" / phase / "all.log"
    if phase in {"tile", "extract"}:
        assert wait_until(lambda: study.said("run_started") != started, rerun)
    else:
        assert wait_until(lambda: "waiting" in log.read_text(), rerun)
        assert "\0" not in log.read_text()
