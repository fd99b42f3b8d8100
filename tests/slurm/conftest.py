"""One cluster for all tests of this folder, and a small study with a broken slide, run once without a cluster."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from pathfm.geometry import Size
from pathfm.slides.synthetic import SyntheticSpec, write_cohort
from pathfm.store.commit import RECORDS, content_digest
from tests.flows.conftest import STUDY
from tests.slurm.cluster import Cluster
from tests.slurm.debian import NoClusterError, install

PIPELINES = Path(__file__).parents[2] / "pipelines"
SETTINGS = STUDY.replace("steps: 6, checkpoint_every: 2", "steps: 40, checkpoint_every: 30") + (
    "compute: {{device: cpu, workers: 1, threads: 1, group_slides: 6}}\n"
)
"""Pretraining takes long enough to be stopped in the middle, far from a checkpoint; the slides are two groups."""
COMPARED = ("tiles", "encoder", "features", "mil", "report", "receipts")
"""Folders of a study's output that must be the same, however it was run."""
BROKEN = 4
"""Which slide of the cohort is none."""
PATIENCE_S = 300.0
"""A run that takes longer hangs, also on a machine that is busy with other things."""
NODE_HAS = {"array=1-": 2, "cpus-per-task=": 1, "gpus-per-node=": 1, "ntasks-per-node=": 1}
"""The only lines of the batch scripts that are changed here, as everybody has to."""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    try:
        install()
    except NoClusterError as error:
        pytest.skip(str(error))
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    # `pathfm` of jobs, and on one thread: two jobs run at a time.
    path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    cluster.environment |= {"PATH": path, "OMP_NUM_THREADS": "1"}
    with cluster:
        yield cluster
        cluster.stop()
        assert cluster.left() == []


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """The table of twelve slides, and the one that is broken."""
    table = write_cohort(tmp_path_factory.mktemp("slides"), 12, 3, SyntheticSpec(size_px=Size(512, 512)))
    slide_id, path = table.read_text().splitlines()[BROKEN].split(",")[:2]
    (table.parent / path).write_bytes(b"no slide")
    return table, slide_id


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, cluster, cohort):
    """What the study makes without any cluster, while jobs run on it: a function that waits for it, and gives digests."""
    study = write_study(tmp_path_factory.mktemp("undisturbed"), cohort)
    with started("run", study, environment=cluster.environment) as run:

        @cache
        def digests_of_run():
            said = run.communicate()[1]
            assert run.returncode == 3, said
            return digests(study.parent / "out")

        yield digests_of_run


@pytest.fixture
def study(tmp_path, cohort):
    return write_study(tmp_path, cohort)


@pytest.fixture
def scripts(tmp_path):
    """The batch scripts, for a node as small as this one."""
    folder = shutil.copytree(PIPELINES / "slurm", tmp_path / "scripts")
    for script in folder.glob("*.sh"):
        text = script.read_text()
        for asked, there_is in NODE_HAS.items():
            text = re.sub(rf"(?m)^(#SBATCH --{asked})\d+$", rf"\g<1>{there_is}", text)
        script.write_text(text)
    return folder


def write_study(folder, cohort):
    """The study file."""
    path = folder / "study.yaml"
    path.write_text(SETTINGS.format(out="out", table=cohort[0]))
    return path


@contextmanager
def started(*words, environment):
    """``pathfm`` as a process that does not outlive the block."""
    command = [sys.executable, "-m", "pathfm", *map(str, words)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        try:
            yield run
        finally:
            run.kill()


def digests(out, names=COMPARED):
    """Content of folders of an output folder, file by file. Records, times, checkpoints and what is hidden are no content."""
    files = sorted(path for name in names for path in (out / name).rglob("*") if path.is_file())
    return {file.relative_to(out).as_posix(): content_digest(file) for file in files if _counts(file.relative_to(out))}


def _counts(file):
    if any(part.startswith(".") or part == "checkpoints" for part in file.parts):
        return False
    return not any(fnmatch(file.name, pattern) for pattern in RECORDS)


def until(condition, what, patience_s=PATIENCE_S):
    """Waits for something; what it was."""
    deadline = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"it never happened: {what}"
        time.sleep(0.05)
    return found


def steps_done(out):
    """Rows of the table of the pretraining that is under way."""
    (table,) = list((out / "encoder").glob("*/metrics.csv")) or (None,)
    return len(table.read_text().splitlines()) - 1 if table else 0


def logs(folder):
    """What jobs said, for the message of a test that failed."""
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in sorted(folder.glob("*.log")))
