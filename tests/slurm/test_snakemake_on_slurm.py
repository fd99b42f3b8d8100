"""A study through Snakemake's SLURM executor on a real cluster of one node, with a broken slide and killed daemons."""

from __future__ import annotations

import importlib.util
import re
import shutil
import signal
import time
from collections import Counter

import pytest
import yaml

from pathfm.store.receipts import STAGES
from tests.flows.tile_runs import events
from tests.slurm.conftest import PATIENCE_S, PIPELINES, digests, started, steps_done, until

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("snakemake_executor_plugin_slurm") is None,
    reason="needs snakemake and snakemake-executor-plugin-slurm",
)


SQUEUE = """#!/bin/sh
# While no job ends, Snakemake's executor asks ever more seldom, by ten seconds each time. So its question, and no other, is
# answered when fewer jobs are on than at first, or none is, or twenty seconds have passed.
case "$*" in *"--format=%i|%T "*) looks=100 ;; *) looks=1 ;; esac
while
    said=$({squeue} "$@") || exit
    on=$(echo "$said" | grep -cE "PENDING|CONFIGURING|RUNNING|COMPLETING")
    looks=$((looks - 1))
    [ "$looks" -gt 0 ] && [ "$on" -gt 0 ] && [ "$on" -ge "${first:=$on}" ]
do sleep 0.2; done
echo "$said"
"""


@pytest.fixture
def environment(cluster, tmp_path):
    """Of a run on the cluster that does not sleep while there is something to do."""
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(SQUEUE.replace("{squeue}", shutil.which("squeue")))
    squeue.chmod(0o755)
    return cluster.environment | {"PATH": f"{squeue.parent}:{cluster.environment['PATH']}"}


@pytest.fixture
def profile(tmp_path):
    """The shipped profile, as a user copies it: for a node with two cores, no accounting, and without long pauses."""
    folder = shutil.copytree(PIPELINES / "profiles" / "slurm", tmp_path / "profile")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings |= {
        "set-threads": dict.fromkeys(STAGES, 1),
        "slurm-init-seconds-before-status-checks": 1,
        "latency-wait": 5,
        "retries": 0,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def _run(study, profile, environment):
    return started("run", study, "--engine", "snakemake", "--profile", profile, environment=environment)


def test_a_study_makes_what_it_makes_without_a_cluster_though_the_daemons_are_killed(
    cluster, environment, profile, study, cohort, undisturbed
):
    out = study.parent / "out"
    with _run(study, profile, environment) as run:
        until(lambda: steps_done(out) > 2 or run.poll() is not None, "pretraining at work")
        assert run.poll() is None, run.communicate()
        cluster.wait_until_saved()
        for daemon in ("slurmctld", "slurmd"):
            cluster.end(daemon)
        assert not list((out / "receipts").glob("pretrain/*.json")), "the kill came too late"
        cluster.start()
        said = "".join(run.communicate(timeout=PATIENCE_S))
    assert run.returncode == 3, said
    assert cohort[1] in said
    assert "jobs are watched by squeue, because sacct fails" in said
    assert digests(out) == undisturbed()
    done = Counter(event["slide_id"] for event in events(out) if event["kind"] == "slide_done")
    assert set(done.values()) == {1}, "a finished slide was made again"
    states = Counter(cluster.command("squeue", "--states=all", "--noheader", "--format=%T").split())
    assert states["COMPLETED"] >= 1 + 2 + 1 + 2 + 1 + 1


def test_a_job_that_cannot_start_is_seen_and_left_by_two_signals(cluster, environment, profile, study):
    settings = yaml.safe_load((profile / "config.yaml").read_text())
    settings["set-threads"]["check"] = 64
    (profile / "config.yaml").write_text(yaml.safe_dump(settings))
    with _run(study, profile, environment) as run:
        assert run.stderr is not None
        said = run.stderr.readline()
        run.send_signal(signal.SIGTERM)
        said += run.stderr.readline()
        assert run.poll() is None
        time.sleep(1.5)
        run.send_signal(signal.SIGTERM)
        said += run.communicate(timeout=PATIENCE_S)[1]
    assert run.returncode == 75, said
    number = re.match(r"submitted check all  as SLURM job (\d+)\n", said)
    assert number, said
    assert "waiting for 1 job to end" in said
    assert cluster.jobs(number[1]) == {number[1]: "PENDING"}
    cluster.command("scancel", "--name", re.search(r"stopped the run .* scancel --name (\S+)", said)[1])
    assert cluster.wait(number[1]) == {number[1]: "CANCELLED"}
