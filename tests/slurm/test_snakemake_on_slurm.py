"""A study through Snakemake's SLURM executor on a real cluster of one node, with a broken slide and killed daemons."""

from __future__ import annotations

import importlib.util
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import yaml

from pathfm.store.receipts import STAGES
from tests.flows.tile_runs import events
from tests.slurm.cluster import SAVED_S
from tests.slurm.conftest import PIPELINES, digests, steps_done, until

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("snakemake_executor_plugin_slurm") is None,
    reason="needs snakemake and snakemake-executor-plugin-slurm",
)


@pytest.fixture
def profile(tmp_path):
    """The shipped profile, as a user copies it: for a node with two cores, no accounting, and without long pauses."""
    folder = shutil.copytree(PIPELINES / "profiles" / "slurm", tmp_path / "profile")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings |= {
        "set-threads": dict.fromkeys(STAGES, 1),
        "slurm-init-seconds-before-status-checks": 2,
        "latency-wait": 5,
        "retries": 0,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def _command(study, profile, *more):
    words = ("run", study, "--engine", "snakemake", "--profile", profile, *more)
    return [sys.executable, "-m", "pathfm", *map(str, words)]


def test_a_study_makes_what_it_makes_without_a_cluster_though_the_daemons_are_killed(
    cluster, profile, study, cohort, undisturbed
):
    out = study.parent / "out"
    with subprocess.Popen(
        _command(study, profile), env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        until(lambda: steps_done(out) > 2 or run.poll() is not None, "pretraining at work")
        assert run.poll() is None, run.communicate()
        time.sleep(SAVED_S)
        for daemon in ("slurmctld", "slurmd"):
            cluster.end(daemon)
        assert not list((out / "receipts").glob("pretrain/*.json")), "the kill came too late"
        cluster.start()
        said = "".join(run.communicate(timeout=200))
    assert run.returncode == 3, said
    assert cohort[1] in said
    assert "jobs are watched by squeue, because sacct fails" in said
    assert digests(out) == digests(undisturbed)
    done = Counter(event["slide_id"] for event in events(out) if event["kind"] == "slide_done")
    assert set(done.values()) == {1}, "a finished slide was made again"
    states = Counter(cluster.command("squeue", "--states=all", "--noheader", "--format=%T").split())
    assert states["COMPLETED"] >= 1 + 3 + 1 + 3 + 1 + 1


def test_a_job_that_cannot_start_is_seen_and_left_by_two_signals(cluster, profile, study):
    settings = yaml.safe_load((profile / "config.yaml").read_text())
    settings["set-threads"]["check"] = 64
    (profile / "config.yaml").write_text(yaml.safe_dump(settings))
    with subprocess.Popen(_command(study, profile), env=cluster.environment, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        said = run.stderr.readline()
        run.send_signal(signal.SIGTERM)
        said += run.stderr.readline()
        assert run.poll() is None
        time.sleep(1.5)
        run.send_signal(signal.SIGTERM)
        said += run.communicate(timeout=30)[1]
    assert run.returncode == 75, said
    number = re.match(r"submitted check all  as SLURM job (\d+)\n", said)
    assert number, said
    assert "waiting for 1 job to end" in said
    assert cluster.jobs(number[1]) == {number[1]: "PENDING"}
    cluster.command("scancel", "--name", re.search(r"stopped the run .* scancel --name (\S+)", said)[1])
    assert cluster.wait(number[1]) == {number[1]: "CANCELLED"}
