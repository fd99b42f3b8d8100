"""Studies by plain batch scripts (pipelines/slurm), on a real cluster of one node."""

from __future__ import annotations

import json
import re
import time

from tests.flows.tile_runs import digest, leased, made, said, tile, write_slides
from tests.slurm.conftest import digests, logs, steps_done, until

SLIDES = 20
"""Enough that killing twice hits the work. To save time, they are names of a few files."""
BOOT_S = 8.0
"""A node that is back at once is not asked whether its jobs have survived [s]."""


def _submit(cluster, scripts, study, *stages):
    """Job numbers by stage."""
    said = cluster.command("env", "-C", study.parent, "bash", scripts / "submit.sh", study, *stages)
    return dict(line.split() for line in said.splitlines())


def _restarts(cluster, job):
    return int(re.search(r"Restarts=(\d+)", cluster.command("scontrol", "show", "job", job)).group(1))


def test_a_chain_with_a_broken_slide_and_a_preempted_pretraining(cluster, scripts, study, cohort, undisturbed):
    out = study.parent / "out"
    jobs = _submit(cluster, scripts, study)
    assert list(jobs) == ["tile", "pretrain", "extract", "mil"]
    assert set(cluster.wait(jobs["tile"]).values()) == {"COMPLETED"}, logs(study.parent)
    assert len(cluster.jobs(jobs["tile"])) == 2
    _each_array_task_has_a_record(out, cohort[1])

    until(lambda: steps_done(out) > 4, "pretraining at work")
    cluster.command("scancel", "--signal=USR1", jobs["pretrain"])
    assert set(cluster.wait(jobs["pretrain"]).values()) == {"COMPLETED"}, logs(study.parent)
    said = (study.parent / f"pathfm-pretrain-{jobs['pretrain']}.log").read_text()
    assert _restarts(cluster, jobs["pretrain"]) == 1
    assert "stopped by SIGUSR1" in said
    saved, resumed = (int(re.search(f"{word} step (\\d+)", said).group(1)) for word in ("at", "resumed at"))
    assert 0 < saved == resumed < 30, said

    assert set(cluster.wait(jobs["extract"]).values()) == {"COMPLETED"}, logs(study.parent)
    assert cluster.wait(jobs["mil"]) == {jobs["mil"]: "COMPLETED"}, logs(study.parent)
    assert digests(out) == undisturbed()


def _each_array_task_has_a_record(out, broken):
    records = [json.loads(path.read_text()) for path in sorted(out.glob("tiles/*/record-*.json"))]
    fates = {row["slide_id"]: row["status"] for record in records for row in record["outcomes"]}
    assert len(records) == 2
    assert sorted(fates.values()) == ["done"] * 11 + ["failed"]
    assert fates[broken] == "failed"


def test_what_follows_a_stage_that_failed_is_cancelled(cluster, scripts, study):
    study.write_text(study.read_text().replace("tile_px: 64", "tile_px: sixty"))
    jobs = _submit(cluster, scripts, study, "tile", "mil")
    assert set(cluster.wait(jobs["tile"]).values()) == {"FAILED"}
    assert set(cluster.wait(jobs["mil"]).values()) == {"CANCELLED"}
    assert "tile_px" in logs(study.parent)
    assert not (study.parent / "out").exists()


def test_daemons_and_then_the_node_are_killed_while_slides_are_tiled(cluster, scripts, tmp_path):
    """Jobs outlive the daemons; those that die with their node are started again by SLURM, and keep what is finished."""
    slides, out = write_slides(tmp_path / "slides", 4, 2048), tmp_path / "out"
    for index in range(4, SLIDES):
        (slides / f"s{index}.svs").hardlink_to(slides / f"s{index % 4}.svs")
    study = tmp_path / "study.yaml"
    study.write_text(f"out: out\ncohort: {{slides: [{slides}]}}\ntile: {{tile_px: 16}}\ncompute: {{threads: 1}}\n")
    job = cluster.sbatch("--chdir", tmp_path, scripts / "tile.sh", study)
    until(lambda: leased(out), "a slide at work")
    cluster.wait_until_saved()
    assert len(made(out)) < SLIDES - 4, "the kill comes too late"
    for daemon in ("slurmctld", "slurmd"):
        cluster.end(daemon)
    before = len(made(out))
    until(lambda: len(made(out)) > before, "jobs at work without daemons")
    cluster.start()

    until(lambda: len(made(out)) > before + 1, "jobs at work with new daemons")
    cluster.end("slurmd")
    assert cluster.kill_jobs()
    assert len(made(out)) < SLIDES, "the kill came too late"
    assert leased(out), "the kill hit no work"
    back = time.monotonic() + BOOT_S
    assert tile(slides, tmp_path / "undisturbed", tile_px=16, workers=2)[0] == 0
    time.sleep(max(0.0, back - time.monotonic()))
    cluster.start()
    assert set(cluster.wait(job).values()) == {"COMPLETED"}, logs(tmp_path)
    done = said(out, "slide_done")
    assert set(done) == {f"s{index}" for index in range(SLIDES)}
    assert set(done.values()) == {1}, "a finished slide was made again"
    assert "nothing to do" in cluster.command("pathfm", "tile", study)  # the page of all slides, which no array task writes
    assert digest(out) == digest(tmp_path / "undisturbed")
