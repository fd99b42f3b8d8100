"""``pathfm run``: the whole study, by the engine in this process or by Snakemake, both with the same artifacts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pathfm.errors import ExitCode, UsageError
from pathfm.jobs import Jobs, drop_old_receipts, failed_slides, write_receipts
from pathfm.log import say
from pathfm.run_manifest import recorded
from pathfm.store.receipts import STAGES
from pathfm.study import Study
from pathfm.study_plan import StudyPlan, make_plan, plan_file, write_plan
from pathfm.workflow import Run, begin, keep_settings, study_to_oneself

STATES = {"current": "up to date", "new": "new", "stale": "stale", "failed": "some failed", "gone": "gone", "forced": "forced"}
"""States of jobs, for people."""


@dataclass(frozen=True)
class RunOptions:
    """How a study is run.

    Attributes:
        engine: local, in this process; or snakemake.
        until: the last stage.
        forcerun: stages whose jobs run again even if they are up to date.
        retrain_encoder: pretrain on all slides of the cohort, not on those of the first time.
        yes: the price of that is known.
        why: only explain what would run.
        dry_run: only say what would run.
        profile: Snakemake's, by the name of a shipped one or a folder.
        jobs: how many Snakemake may run at once; 0: as the profile says.
        dag: file for a picture of the jobs.
        unlock: remove the lock of a Snakemake that was killed.
        snakemake_report: also write Snakemake's own report.
        replay: do instead what this record says, and compare.
    """

    engine: Literal["local", "snakemake"] = "local"
    until: str = ""
    forcerun: tuple[str, ...] = ()
    retrain_encoder: bool = False
    yes: bool = False
    why: bool = False
    dry_run: bool = False
    profile: str = "local"
    jobs: int = 0
    dag: Path | None = None
    unlock: bool = False
    snakemake_report: bool = False
    replay: Path | None = None


def run_study(study: Study, options: RunOptions | None = None) -> ExitCode:
    """Every stage in order, each doing only what is stale.

    Raises:
        UsageError: a stage that does not exist, or several processes at once.
    """
    options = options or RunOptions()
    _check(study, options)
    if options.replay:
        from pathfm.replaying import replay

        return replay(study, options.replay)
    run = begin(study)
    asked = options.why or options.dry_run or options.dag or options.unlock
    if options.retrain_encoder:
        from pathfm.retraining_price import retrain_price

        for line in retrain_price(run):
            say(line)
        if not asked and not options.yes:
            raise UsageError("retraining the encoder makes everything after it anew", fix="add --yes to accept this price")
    plan = make_plan(run, options.forcerun, options.retrain_encoder)
    if asked:
        return _answer(run, plan, options)
    return recorded("run", study, lambda: _run(run, plan, options))


def _answer(run: Run, plan: StudyPlan, options: RunOptions) -> ExitCode:
    """What is only asked for: nothing is run, and nothing of the study is written."""
    if not options.why and options.engine == "snakemake":
        with tempfile.TemporaryDirectory() as folder:
            write_plan(Path(folder, "plan.json"), plan)
            return _by_snakemake(run, plan, options, Path(folder, "plan.json"))
    for line in explained(plan, options.until) if options.why else summary(plan, options.until):
        say(line)
    return ExitCode.DONE


def _run(run: Run, plan: StudyPlan, options: RunOptions) -> ExitCode:
    with study_to_oneself(run.layout.out):
        keep_settings(run)
        if options.retrain_encoder:
            from pathfm.pretraining import reopen_list

            reopen_list(run)
        write_plan(plan_file(run.layout.out), plan)
        if options.engine == "snakemake":
            return _by_snakemake(run, plan, options)
        _in_this_process(run, plan, options.until)
        drop_old_receipts(run.layout.out, plan)
    return max(run.exit_code, ExitCode.SOME_FAILED if failed_slides(run.layout.out, plan) else ExitCode.DONE)


def plan_study(study: Study) -> ExitCode:
    """``pathfm plan``: keeps the settings, writes the plan that an engine's jobs read, and says it."""
    run = begin(study)
    plan = make_plan(run)
    keep_settings(run)
    write_plan(plan_file(run.layout.out), plan)
    for line in summary(plan):
        say(line)
    say(f"plan: {plan_file(run.layout.out)}")
    return ExitCode.DONE


def _check(study: Study, options: RunOptions) -> None:
    if study.mil.features is not None:
        what = "features that were made elsewhere are given, so there is nothing to tile or to extract"
        raise UsageError(what, where="mil.features", fix="use `pathfm mil train`")
    of_snakemake = {
        "--dag": options.dag,
        "--unlock": options.unlock,
        "--jobs": options.jobs,
        "--snakemake-report": options.snakemake_report,
    }
    asked = [name for name, value in {**of_snakemake, "--profile": options.profile != "local"}.items() if value]
    if asked and options.engine != "snakemake":
        raise UsageError(f"{asked[0]} is for Snakemake", where="pathfm run", fix="add --engine snakemake")
    if options.replay and options != RunOptions(replay=options.replay):
        raise UsageError("a replay does the whole of a recorded run, in this process", fix="leave the other options out")
    for stage in filter(None, (options.until, *options.forcerun)):
        if stage not in STAGES:
            raise UsageError(f"there is no stage {stage!r}", fix=f"stages: {', '.join(STAGES)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        fix = "start `pathfm pretrain` so, and `pathfm run` as one process"
        raise UsageError("several processes at once would do every stage several times", where="torchrun or srun", fix=fix)


def _in_this_process(run: Run, plan: StudyPlan, until: str) -> None:
    """Each stage for all slides at once. Stages look for themselves at what is up to date, whatever the plan says."""
    jobs = Jobs(run)
    for stage in _stages(until):
        planned = plan.of(stage)
        todo = [job for job in planned if job.state != "current"]
        if not planned or (stage == "check" and not todo):
            continue
        made = jobs.work(stage)
        write_receipts(run, todo, made)
    if all(report.did_nothing for report in run.reports.values()):
        say("everything is up to date: nothing was done")


def _by_snakemake(run: Run, plan: StudyPlan, options: RunOptions, file: Path | None = None) -> ExitCode:
    from pathfm.snakemake_engine import EngineOptions, run_snakemake

    engine = EngineOptions(
        profile=options.profile,
        jobs=options.jobs,
        dry_run=options.dry_run,
        until=options.until,
        dag=options.dag,
        unlock=options.unlock,
        snakemake_report=options.snakemake_report,
        plan=file,
    )
    return run_snakemake(run.layout.out, plan, engine)


def _stages(until: str) -> tuple[str, ...]:
    return STAGES[: STAGES.index(until) + 1] if until else STAGES


def summary(plan: StudyPlan, until: str = "") -> Iterator[str]:
    """A line per stage: its jobs by state."""
    for stage in _stages(until):
        jobs = plan.of(stage)
        counts = {state: [job for job in jobs if job.state == state] for state in STATES}
        said = [f"{len(found)} {STATES[state]}" for state, found in counts.items() if found]
        if jobs:
            slides = sum(len(job.slide_ids) for job in jobs)
            yield f"{stage:<9} {len(jobs)} job{'s' * (len(jobs) > 1)}, {slides} slides: {', '.join(said)}"


def explained(plan: StudyPlan, until: str = "") -> Iterator[str]:
    """A line per decision: what each job would do, and which setting, slide or upstream job makes it so."""
    for stage in _stages(until):
        jobs = plan.of(stage)
        current = [job for job in jobs if job.state == "current"]
        if current:
            shown = current[0].name if len(jobs) == 1 else f"{stage} ({len(current)} of {len(jobs)} jobs)"
            yield f"{shown}: up to date"
        for job in jobs:
            if job.state != "current":
                yield f"{job.name}: {STATES[job.state]} - {'; '.join(job.why)}"
