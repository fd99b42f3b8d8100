"""The cluster itself: what is said where it cannot be had, and that it does not outlive the process that has started it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm import debian
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import until

OWNER = """
import sys, time
from pathlib import Path
from tests.slurm.cluster import Cluster
with Cluster(Path(sys.argv[1])) as cluster:
    job = cluster.sbatch("--wrap", "sleep 600")
    while cluster.jobs(job) != {job: "RUNNING"}:
        time.sleep(0.05)
    print("at work", flush=True)
    time.sleep(600)
"""


@pytest.mark.usefixtures("cluster")  # so that SLURM is there
def test_a_cluster_ends_with_its_process_though_that_is_killed(tmp_path):
    folder = tmp_path / "cluster"
    command = [sys.executable, "-c", OWNER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "at work\n"
        until(lambda: len(Cluster(folder).left()) >= 5, "three daemons, a step and what it runs")
        owner.kill()
    until(lambda: not Cluster(folder).left(), "the end of all")


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without SLURM, with the programs that a test puts there."""
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: which(name) if name == "apt-get" else None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(debian, "LOCK_AND_POLICY", (tmp_path / "lock", tmp_path / "policy"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def _apt_get(folder, script):
    (folder / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "apt-get").chmod(0o755)


def test_who_is_not_root_is_told_so(bare, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(debian.NoClusterError, match="SLURM is not installed, and only root can install it"):
        debian.install()


def test_packages_that_cannot_be_fetched_are_told_of(bare):
    _apt_get(bare, 'echo "E: Unable to locate package $*" >&2; exit 100')
    with pytest.raises(debian.NoClusterError, match=r"apt-get cannot install it: E: Unable to locate .* slurm-wlm munge"):
        debian.install()
    assert sorted(bare.iterdir()) == [bare / "apt-get", bare / "lock"]


def test_lists_that_cannot_be_fetched_are_no_failure(bare):
    _apt_get(bare, 'case "$*" in *update) exit 100;; *) echo "$*" >>"$0.said";; esac')
    debian.install()
    fetched, installed = (bare / "apt-get.said").read_text().splitlines()
    assert "--download-only" in fetched
    assert "--no-download" in installed
