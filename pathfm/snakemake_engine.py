"""A study through Snakemake: its jobs on this machine, on SLURM, or on whatever Snakemake has an executor for.

Snakemake is a program that is started, never a library that is imported. The rules are in ``pipelines/Snakefile``; they read
the plan (``receipts/plan.json``), so what is stale is decided by the same code as without Snakemake.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from pathfm.errors import ExitCode, MissingExtraError, PathfmError, UsageError
from pathfm.log import say, status
from pathfm.snakemake_progress import Progress, ask, follow, last_line
from pathfm.store.commit import commit_file
from pathfm.workers import usable_cores

if TYPE_CHECKING:
    from pathfm.study_plan import Planned, StudyPlan

INSTALLED = "share/pathfm/pipelines"
"""Where an installed pathfm has its rules and profiles, under the prefix of the installation."""
LOGS = "logs"
EXIT = r"^exit (\d+)$"
"""What the log of a job that has failed ends with, before what its helper processes may still say."""
KILLED = 128 + signal.SIGKILL
"""Exit code that a shell gives for a killed job."""
REPORT = Path("report") / "snakemake.html"
"""Snakemake's own report, in the output folder."""
PICTURES = {".dot": "dot", ".svg": "dot", ".png": "dot", ".mmd": "mermaid-js"}
"""Kinds of pictures -> the language in which Snakemake writes them."""
SACCT = "sacct --allocations --parsable2 --noheader --clusters all --format JobIdRaw,State --name pathfm"
"""What Snakemake's executor asks to know how its jobs are."""


@dataclass(frozen=True)
class EngineOptions:
    """How Snakemake is to run.

    Attributes:
        profile: name of a shipped profile, or a folder.
        jobs: most jobs at a time (on this machine: cores in use); 0: what the profile says, on this machine all cores.
        dry_run: only say which jobs would run.
        until: last stage; empty: all.
        dag: file that gets a picture of the jobs that would run (.dot, .mmd, .svg, .png); nothing else is done.
        unlock: only remove what a killed Snakemake that was started by hand has left.
        snakemake_report: afterwards, write Snakemake's own report.
        command: how jobs start pathfm, where they do not run in this Python.
        plan: another file of the plan than the study's own, when nothing is to be written into it.
    """

    profile: str = "local"
    jobs: int = 0
    dry_run: bool = False
    until: str = ""
    dag: Path | None = None
    unlock: bool = False
    snakemake_report: bool = False
    command: str = ""
    plan: Path | None = None


def run_snakemake(out: Path, plan: StudyPlan, options: EngineOptions) -> ExitCode:
    """Runs the jobs of a plan that are not current, or does one of the other things that the options ask for.

    Args:
        out: the study's output folder, in which the plan has been written; the caller has it to itself.
        plan: what was written.
        options: see there.

    Raises:
        MissingExtraError: Snakemake, or for some pictures graphviz, is not installed.
        UsageError: there is no such profile, or Snakemake refuses it.
        PathfmError: Snakemake itself has failed.
    """
    if importlib.util.find_spec("snakemake") is None:
        raise MissingExtraError("running a study by Snakemake needs Snakemake", extra="pipelines")
    out = out.absolute()
    _profile(options.profile)
    if options.dag:
        return _draw(out, options.dag, options)
    if options.unlock:
        _ask(out, options, "--unlock")
        say("unlocked")
        return ExitCode.DONE
    code = _run(out, plan, options)
    if options.snakemake_report and not options.dry_run:
        _report(out, options)
    return code


def pipelines() -> Path:
    """The folder of the Snakefile and the profiles: of a checkout, else of the installation.

    Raises:
        PathfmError: the installation has none.
    """
    checkout = Path(__file__).resolve().parents[1] / "pipelines"
    if (checkout / "Snakefile").is_file():
        return checkout
    for file in importlib.metadata.files("pathfm") or ():
        if file.as_posix().endswith(f"{INSTALLED}/Snakefile"):
            return Path(str(file.locate())).resolve().parent
    raise PathfmError("this installation of pathfm has no Snakefile", fix="install pathfm again")


def _profile(name: str) -> Path:
    """The folder of a profile: a shipped one, else the user's.

    Raises:
        UsageError: there is none.
    """
    shipped = {folder.name: folder for folder in (pipelines() / "profiles").iterdir()}
    folder = shipped.get(name, Path(name).absolute())
    if not folder.is_dir():
        raise UsageError("there is no such profile", where=name, fix="local, slurm, kubernetes, or a folder")
    _profile_file(folder)
    return folder


def _profile_file(folder: Path) -> Path:
    found = sorted(file for file in folder.glob("*.yaml") if re.match(r"(config|profile)(\.v\d+\+)?\.yaml$", file.name))
    if not found:
        raise UsageError("a profile needs a config.yaml", where=str(folder), fix="copy one of pipelines/profiles")
    return found[-1]


def _profile_settings(name: str) -> dict[str, object]:
    """What a profile says.

    Raises:
        UsageError: it is no YAML.
    """
    file = _profile_file(_profile(name))
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"this is no YAML: {' '.join(str(error).split())}", where=str(file)) from error
    return settings if isinstance(settings, dict) else {}


def _environment(options: EngineOptions) -> dict[str, str]:
    """Profiles with scripts of their own find them by this variable."""
    return {**os.environ, "PATHFM_PROFILE": str(_profile(options.profile))}


def _arguments(out: Path, options: EngineOptions, whole: bool = False) -> list[str]:
    config = {
        "out": out,
        "engine": os.getpid(),
        "until": options.until,
        "command": options.command,
        "plan": options.plan,
        "whole": whole or "",
    }
    jobs = str(options.jobs or usable_cores())
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(pipelines() / "Snakefile"), "--directory", str(out)),
        *("--profile", str(_profile(options.profile)), "--nocolor"),
        *(("--jobs", jobs) if options.jobs or options.profile == "local" else ()),
        *("--config", *(f"{name}={value}" for name, value in config.items() if value)),
    ]


def _ask(out: Path, options: EngineOptions, *what: str, whole: bool = False) -> str:
    """What Snakemake answers on its standard output.

    Raises:
        PathfmError: it fails.
    """
    command = [*_arguments(out, options, whole), *what]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=_environment(options),
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise _trouble(done.stderr.splitlines())
    return done.stdout


def _draw(out: Path, file: Path, options: EngineOptions) -> ExitCode:
    language, tool = PICTURES.get(file.suffix), shutil.which("dot")
    if language is None:
        raise UsageError(f"no picture of the kind {file.suffix!r}", where=str(file), fix=f"kinds: {', '.join(PICTURES)}")
    drawn = file.suffix in {".svg", ".png"}
    if drawn and tool is None:
        fix = "install graphviz, or name a file .mmd (Mermaid, which Markdown viewers draw) or .dot"
        raise MissingExtraError("this picture needs graphviz's program `dot`", where=str(file), fix=fix)
    text = _ask(out, options, "--dag", language)
    with commit_file(file.absolute()) as temporary:
        if drawn:
            subprocess.run([str(tool), f"-T{file.suffix[1:]}", "-o", str(temporary)], input=text, text=True, check=True)
        else:
            temporary.write_text(text, encoding="utf-8")
    say(f"picture: {file}")
    return ExitCode.DONE


def _report(out: Path, options: EngineOptions) -> None:
    file = out / REPORT
    file.parent.mkdir(parents=True, exist_ok=True)
    _ask(out, options, "--report", str(file), whole=True)
    say(f"Snakemake's report: {file}")


def _run(out: Path, plan: StudyPlan, options: EngineOptions) -> ExitCode:
    from pathfm.study_plan import NEEDS

    stages = list(NEEDS)[: list(NEEDS).index(options.until) + 1] if options.until else list(NEEDS)
    jobs = [job for job in plan.stale if job.stage in stages]
    if options.dry_run:
        return _dry_run(out, jobs, options)
    if not jobs:
        say("everything is up to date: nothing was done")
        return _outcome(out, plan)
    settings = _profile_settings(options.profile)
    before = {job.name: _ended(out / _log(job)) for job in jobs}
    progress = Progress(out, str(settings.get("executor", "local")))
    command = [*_arguments(out, options), "--nolock", *_status_command(settings)]
    code, sent = follow(command, _environment(options), progress)
    ended = {job.name: _ended(out / _log(job)) for job in jobs}
    broken = {name: end[1] for name, end in ended.items() if end and end != before[name]}
    _say_what_failed(out, jobs, broken, progress, "stopped" if sent else "failed")
    if sent:
        _say_how_far(progress, "stopped", f"by {signal.Signals(sent).name}, ")
        return ExitCode.INTERRUPTED if sent == signal.SIGINT else ExitCode.PREEMPTED
    if not code:
        return _outcome(out, plan)
    if not broken and not progress.failed:
        raise _trouble(progress.tail)
    _say_how_far(progress, "failed")
    return _worst(broken.values())


def _log(job: Planned) -> Path:
    return Path(LOGS, job.stage, f"{job.group}.log")


def _say_what_failed(out: Path, jobs: list[Planned], broken: dict[str, int], progress: Progress, outcome: str) -> None:
    """A line per job: its own last words; of one that could not even begin to write its log, Snakemake's."""
    for job in jobs:
        words = progress.failed.get((job.stage, job.group))
        if job.name in broken:
            words = f"{_last_words(out / _log(job), broken[job.name])} - see {_log(job)}"
        if words is not None:
            status(job.name, outcome, words or "Snakemake's log says more, in .snakemake/log")


def _say_how_far(progress: Progress, outcome: str, why: str = "") -> None:
    done, total = progress.counts
    behind = progress.left_behind()
    far = f"{done} of {total} jobs are done" if total else "no job is done"
    status("the run", outcome, f"{why}{far}; the same command does the rest{f' ({behind})' if behind else ''}")


def _status_command(settings: dict[str, object]) -> tuple[str, ...]:
    """Snakemake's executor trusts ``sacct`` wherever it is installed, and without accounting waits for ever for its answer."""
    if settings.get("executor") != "slurm" or settings.get("slurm-status-command") or not shutil.which("sacct"):
        return ()
    answer = ask(*SACCT.split())
    if not answer.returncode:
        return ()
    say(f"jobs are watched by squeue, because sacct fails: {last_line(answer.stderr)}")
    return "--slurm-status-command", "squeue"


def _dry_run(out: Path, jobs: list[Planned], options: EngineOptions) -> ExitCode:
    """Snakemake builds its graph, so that a profile or a rule that it refuses is known now; the plan says what is in it."""
    _ask(out, options, "--dry-run", "--quiet", "all")
    if not jobs:
        say("everything is up to date: nothing would run")
    for job in jobs:
        say(f"{job.name}: {job.state}, {len(job.slide_ids)} slides")
    if jobs:
        say(f"{len(jobs)} jobs would run")
    return ExitCode.DONE


def _outcome(out: Path, plan: StudyPlan) -> ExitCode:
    """Says which slides have failed."""
    from pathfm.jobs import failed_slides

    failed = failed_slides(out, plan)
    for slide_id, (stage, reason) in failed.items():
        status(slide_id, "failed", f"{stage}: {reason}")
    return ExitCode.SOME_FAILED if failed else ExitCode.DONE


def _ended(log: Path) -> tuple[int, int] | None:
    """When the log of a job was written last, and the exit code that it tells; None where it has none."""
    try:
        found = re.findall(EXIT, log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        return (log.stat().st_mtime_ns, int(found[-1])) if found else None
    except OSError:
        return None


def _last_words(log: Path, code: int) -> str:
    if code == KILLED:  # then its last line is about something else
        return "it was killed, often for want of memory"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = [line for line in lines if line and not re.match(EXIT, line)]
    return said[-1] if said else f"it said nothing, and ended with {code}"


def _worst(codes: Iterable[int]) -> ExitCode:
    """A crash before a user's mistake, and both before jobs that were stopped and can go on."""
    found = [ExitCode(code) if code in set(ExitCode) else ExitCode.INTERNAL for code in codes]
    order = (ExitCode.INTERNAL, ExitCode.USAGE, ExitCode.PREEMPTED, ExitCode.INTERRUPTED)
    return next((code for code in order if code in found), ExitCode.INTERNAL)


def _trouble(lines: Iterable[str]) -> PathfmError:
    """Snakemake has failed, and no job of ours: its last words, in one line."""
    said = [line.strip() for line in lines if line.strip() and not line.startswith((" ", "Complete log", "Elapsed time"))]
    text = " ".join(said[-2:]) or "it said nothing"
    return UsageError(f"Snakemake has failed: {text}", fix="its whole log is in .snakemake/log of the output folder")
