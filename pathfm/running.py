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
from pathfm.log import plural, say
from pathfm.run_manifest import recorded
from pathfm.store.receipts import ALL, STAGES, receipt_path
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
        UsageError: options that do not go together, a stage that does not exist, or several processes at once.
    """
    options = options or RunOptions()
    _check_options(options)
    _check_study(study)
    if options.replay:
        from pathfm.replaying import replay

        return replay(study, options.replay)
    if options.engine == "snakemake":
        from pathfm.snakemake_engine import check_engine, unlock

        check_engine(options)
        if options.unlock:
            unlock(study.out)
            return ExitCode.DONE
    run = begin(study)
    if options.why or options.dry_run or options.dag:
        return _answer(run, options)
    return recorded("run", study, lambda: _run(run, options))


def plan_study(study: Study) -> ExitCode:
    """``pathfm plan``: keeps the settings, writes the plan that an engine's jobs read, and says it."""
    run = begin(study)
    with study_to_oneself(study.out):
        plan = make_plan(run)
        _check_training(run, plan)
        keep_settings(run)
        write_plan(plan_file(study.out), plan)
    for line in summary(plan):
        say(line)
    say(f"plan: {plan_file(study.out)}")
    return ExitCode.DONE


def _check_options(options: RunOptions) -> None:
    """Refuses options that would be passed over without a word."""
    of_snakemake = {
        "--dag": options.dag,
        "--unlock": options.unlock,
        "--jobs": options.jobs,
        "--snakemake-report": options.snakemake_report,
        "--profile": options.profile != "local",
    }
    for name, value in of_snakemake.items():
        if value and options.engine != "snakemake":
            raise UsageError(f"{name} is for Snakemake", where="pathfm run", fix="add --engine snakemake")
    if options.replay and options != RunOptions(replay=options.replay):
        raise UsageError("a replay does the whole of a recorded run, in this process", fix="leave the other options out")
    alone = {
        "--why": options.why,
        "--dry-run": options.dry_run and not options.why,
        "--dag": options.dag,
        "--unlock": options.unlock,
        "--snakemake-report": options.snakemake_report,
    }
    asked = [name for name, value in alone.items() if value]
    if len(asked) > 1:
        raise UsageError(f"{asked[0]} and {asked[1]} are two things", where="pathfm run", fix="ask for one at a time")
    _check_stages(options)


def _check_stages(options: RunOptions) -> None:
    for stage in filter(None, (options.until, *options.forcerun)):
        if stage not in STAGES:
            raise UsageError(f"there is no stage {stage!r}", fix=f"stages: {', '.join(STAGES)}")
    wanted = {f"--forcerun {stage}": stage for stage in options.forcerun}
    wanted |= {"--retrain-encoder": "pretrain"} if options.retrain_encoder else {}
    for name, stage in wanted.items():
        if options.until and STAGES.index(stage) > STAGES.index(options.until):
            fix = "leave one of the two out"
            raise UsageError(f"{name} is about a stage after --until {options.until}", where="pathfm run", fix=fix)


def _check_study(study: Study) -> None:
    if study.mil.features is not None:
        what = "features that were made elsewhere are given, so there is nothing to tile or to extract"
        raise UsageError(what, where="mil.features", fix="use `pathfm mil train`")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        fix = "start `pathfm pretrain` so, and `pathfm run` as one process"
        raise UsageError("several processes at once would do every stage several times", where="torchrun or srun", fix=fix)


def _answer(run: Run, options: RunOptions) -> ExitCode:
    """What is only asked for: nothing is run, and nothing of the study is written."""
    plan = _plan(run, options)
    if options.why or options.engine == "local":
        for line in (explained if options.why else summary)(plan.up_to(options.until)):
            say(line)
        return ExitCode.DONE
    from pathfm.snakemake_engine import run_snakemake

    with tempfile.TemporaryDirectory() as name:  # Snakemake leaves notes wherever it looks
        folder = Path(name)
        write_plan(plan_file(folder), plan)
        for stage in STAGES:
            receipts = receipt_path(run.layout.out, stage, ALL).parent
            if receipts.is_dir():
                receipt_path(folder, stage, ALL).parent.symlink_to(receipts.absolute())
        return run_snakemake(folder, plan, options)


def _run(run: Run, options: RunOptions) -> ExitCode:
    out = run.layout.out
    with study_to_oneself(out):
        plan = _plan(run, options)
        if options.retrain_encoder and _retrains(plan):
            _reopen(run, options.yes)
        keep_settings(run)
        write_plan(plan_file(out), plan)
        if options.engine == "snakemake":
            from pathfm.snakemake_engine import run_snakemake

            return run_snakemake(out, plan, options)
        _in_this_process(run, plan.up_to(options.until))
        drop_old_receipts(out, plan)
    return max(run.exit_code, ExitCode.SOME_FAILED if failed_slides(out, plan.up_to(options.until)) else ExitCode.DONE)


def _plan(run: Run, options: RunOptions) -> StudyPlan:
    """The plan; and what retraining the encoder costs, where that is wanted."""
    if not options.retrain_encoder:
        plan = make_plan(run, options.forcerun)
        _check_training(run, plan.up_to(options.until))
        return plan
    from pathfm.retraining_price import retrain_price

    price, plan = retrain_price(run), make_plan(run, options.forcerun, retrain=True)
    _check_training(run, plan.up_to(options.until))
    for line in price if _retrains(plan) else ("the encoder was pretrained on just these slides: it stays as it is",):
        say(line)
    return plan


def _check_training(run: Run, plan: StudyPlan) -> None:
    """Refuses what mil could not do, where it is asked for and has to run: what comes before it may take days."""
    if any(job.state != "current" for job in plan.of("mil")):
        from pathfm.classification import check_for_mil
        from pathfm.mil.plan import check_plan

        check_for_mil(run)
        check_plan(run.study, run.cohort, run.layout.mil)


def _retrains(plan: StudyPlan) -> bool:
    return plan.job("pretrain").state != "current"


def _reopen(run: Run, is_accepted: bool) -> None:
    from pathfm.pretraining import reopen_list

    if not is_accepted:
        raise UsageError("retraining the encoder makes everything after it anew", fix="add --yes to accept this price")
    reopen_list(run)


def _in_this_process(run: Run, plan: StudyPlan) -> None:
    """Each stage for all slides at once. Stages look for themselves at what is up to date, whatever the plan says."""
    jobs = Jobs(run)
    for stage in STAGES:
        planned = plan.of(stage)
        if any(job.state != "current" for job in planned) or (stage != "check" and planned):
            made = jobs.work(stage)
            write_receipts(run, [job for job in planned if job.state != "current" or jobs.has_worked(job, made)], made)
    if plan.stale and not run.reports:
        say("checked: nothing stands in the way of the study")
    elif all(report.did_nothing for report in run.reports.values()):
        say("everything is up to date: nothing was done")


def summary(plan: StudyPlan) -> Iterator[str]:
    """A line per stage: its jobs by state."""
    for stage in STAGES:
        jobs = plan.of(stage)
        counts = {state: [job for job in jobs if job.state == state] for state in STATES}
        said = [f"{len(found)} {STATES[state]}" for state, found in counts.items() if found]
        if jobs:
            slides = sum(len(job.slide_ids) for job in jobs)
            yield f"{stage:<9} {plural(len(jobs), 'job')}, {plural(slides, 'slide')}: {', '.join(said)}"


def explained(plan: StudyPlan) -> Iterator[str]:
    """A line per decision: what each job would do, and which setting, slide or upstream job makes it so."""
    for stage in STAGES:
        jobs = plan.of(stage)
        current = [job for job in jobs if job.state == "current"]
        if current:
            shown = current[0].name if len(jobs) == 1 else f"{stage} ({len(current)} of {len(jobs)} jobs)"
            yield f"{shown}: up to date"
        for job in jobs:
            if job.state != "current":
                yield f"{job.name}: {STATES[job.state]} - {'; '.join(job.why)}"
