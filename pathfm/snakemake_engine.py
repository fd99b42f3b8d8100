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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from pathfm.chain import KEY_FILE
from pathfm.errors import ExitCode, MissingExtraError, PathfmError, UsageError
from pathfm.log import plural, say, status
from pathfm.snakemake_progress import Progress, ask, follow, last_line
from pathfm.store.commit import commit_file
from pathfm.workers import usable_cores

if TYPE_CHECKING:
    from pathfm.running import RunOptions
    from pathfm.study_plan import Planned, StudyPlan

INSTALLED = "share/pathfm/pipelines"
"""Where an installed pathfm has its rules and profiles, under the prefix of the installation."""
SNAKEMAKE = (sys.executable, "-m", "snakemake")
PROFILE_FILE = r"(config|profile)(\.v\d+\+)?\.yaml$"
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


def run_snakemake(out: Path, plan: StudyPlan, options: RunOptions, command: str = "") -> ExitCode:
    """Runs the jobs of a plan that are not current, or does one of the other things that the options ask for.

    Args:
        out: the study's output folder, in which the plan has been written; the caller has it to itself.
        plan: what was written.
        options: of the run, which ``check_engine`` has found usable.
        command: how jobs start pathfm, where they do not run in this Python.

    Raises:
        MissingExtraError: graphviz is not installed, which some pictures need.
        UsageError: Snakemake refuses something.
        PathfmError: Snakemake itself has failed.
    """
    snakemake = _Snakemake(out.absolute(), options, command)
    wanted = plan.up_to(options.until)
    if options.dag:
        return _draw(snakemake, options.dag)
    if options.dry_run:
        return _dry_run(snakemake, wanted)
    code = _run(snakemake, wanted)
    if options.snakemake_report and code in {ExitCode.DONE, ExitCode.SOME_FAILED}:
        _report(snakemake)
    return code


def check_engine(options: RunOptions) -> None:
    """What can be refused before anything of the study is touched.

    Raises:
        MissingExtraError: Snakemake is not installed.
        UsageError: there is no such profile, or it is none.
    """
    if importlib.util.find_spec("snakemake") is None:
        raise MissingExtraError("running a study by Snakemake needs Snakemake", extra="pipelines")
    _ = _Snakemake(Path(), options, "").settings


def unlock(out: Path) -> None:
    """Removes the lock that a Snakemake left which was started by hand and killed.

    Raises:
        UsageError: there is no such folder.
    """
    if not out.is_dir():
        raise UsageError("there is no such folder", where=str(out), fix="nothing has run there that could have left a lock")
    # Locks are of the folder: no rules are needed for it, nor a plan.
    _answer([*SNAKEMAKE, "--snakefile", os.devnull, "--directory", str(out), "--unlock"], dict(os.environ))
    say("unlocked")


@dataclass(frozen=True)
class _Snakemake:
    """How Snakemake is called for a study.

    Attributes:
        out: the output folder, with the plan.
        options: of the run.
        command: how jobs start pathfm; empty: in this Python.
    """

    out: Path
    options: RunOptions
    command: str

    @cached_property
    def profile(self) -> Path:
        """The folder of the profile: a shipped one, else the user's.

        Raises:
            UsageError: there is none.
        """
        name, shipped = self.options.profile, {folder.name: folder for folder in (pipelines() / "profiles").iterdir()}
        folder = shipped.get(name, Path(name).absolute())
        if not folder.is_dir():
            raise UsageError("there is no such profile", where=name, fix="local, slurm, kubernetes, or a folder")
        return folder

    @cached_property
    def settings(self) -> Mapping[str, object]:
        """What the profile says.

        Raises:
            UsageError: it has no file, or that is no YAML.
        """
        found = sorted(path for path in self.profile.glob("*.yaml") if re.match(PROFILE_FILE, path.name))
        if not found:
            raise UsageError("a profile needs a config.yaml", where=str(self.profile), fix="copy one of pipelines/profiles")
        try:
            settings = yaml.safe_load(found[-1].read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"this is no YAML: {' '.join(str(error).split())}", where=str(found[-1])) from error
        return settings if isinstance(settings, dict) else {}

    @property
    def executor(self) -> str:
        """What runs the jobs: local, slurm, ..."""
        return str(self.settings.get("executor", "local"))

    @property
    def environment(self) -> dict[str, str]:
        """Profiles with scripts of their own find them by their variable; the key of the logs is meant from where we are, and
        jobs start in the output folder."""
        named = os.environ.get(KEY_FILE)
        key = {KEY_FILE: str(Path(named).absolute())} if named else {}
        return {**os.environ, **key, "PATHFM_PROFILE": str(self.profile)}

    def call(self, *more: str, whole: bool = False) -> list[str]:
        """The command line; ``whole``: the graph holds all jobs, not only those that are not current."""
        config = {
            "out": ".",  # Snakemake and its jobs are there; a path would be read as YAML, where " #" and ": " say something
            "engine": os.getpid(),
            "until": self.options.until,
            "command": self.command,
            "whole": whole or "",
        }
        jobs = self.options.jobs
        if self.executor == "local" and not {"jobs", "cores"} & self.settings.keys():
            jobs = jobs or usable_cores()
        return [
            *(*SNAKEMAKE, "--snakefile", str(pipelines() / "Snakefile"), "--directory", str(self.out)),
            *("--profile", str(self.profile), "--nocolor"),
            *(("--jobs", str(jobs)) if jobs else ()),
            *("--config", *(f"{name}={value}" for name, value in config.items() if value)),
            *more,
        ]

    def ask(self, *what: str, whole: bool = False) -> str:
        """What Snakemake answers on its standard output.

        Raises:
            PathfmError: it fails.
        """
        return _answer(self.call(*what, whole=whole), self.environment)


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


def _answer(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environment, check=False
    )
    if done.returncode:
        raise _trouble(done.returncode, done.stderr.splitlines())
    return done.stdout


def _draw(snakemake: _Snakemake, file: Path) -> ExitCode:
    language, tool = PICTURES.get(file.suffix), shutil.which("dot")
    if language is None:
        raise UsageError(f"no picture of the kind {file.suffix!r}", where=str(file), fix=f"kinds: {', '.join(PICTURES)}")
    drawn = file.suffix in {".svg", ".png"}
    if drawn and tool is None:
        fix = "install graphviz, or name a file .mmd (Mermaid, which Markdown viewers draw) or .dot"
        raise MissingExtraError("this picture needs graphviz's program `dot`", where=str(file), fix=fix)
    text = snakemake.ask("--dag", language)
    with commit_file(file.absolute()) as temporary:
        if drawn:
            command = [str(tool), f"-T{file.suffix[1:]}", "-o", str(temporary)]
            if subprocess.run(command, input=text, text=True, check=False).returncode:
                raise PathfmError("graphviz cannot draw this", where=str(file), fix="name a file .mmd or .dot")
        else:
            temporary.write_text(text, encoding="utf-8")
    say(f"picture: {file}")
    return ExitCode.DONE


def _dry_run(snakemake: _Snakemake, plan: StudyPlan) -> ExitCode:
    """Snakemake builds its graph, so that a profile or a rule that it refuses is known now; the plan says what is in it."""
    snakemake.ask("--dry-run", "--quiet", "all")
    for job in plan.stale:
        say(f"{job.name}: {job.state}, {plural(len(job.slide_ids), 'slide')}")
    say(f"{plural(len(plan.stale), 'job')} would run" if plan.stale else "everything is up to date: nothing would run")
    return ExitCode.DONE


def _report(snakemake: _Snakemake) -> None:
    file = snakemake.out / REPORT
    file.parent.mkdir(parents=True, exist_ok=True)
    snakemake.ask("--report", str(file), whole=True)
    say(f"Snakemake's report: {file}")


def _run(snakemake: _Snakemake, plan: StudyPlan) -> ExitCode:
    out, jobs = snakemake.out, plan.stale
    if not jobs:
        say("everything is up to date: nothing was done")
        return _outcome(out, plan)
    progress = Progress(out, snakemake.executor)
    before = {job.name: _ended(out / _log(job)) for job in jobs}
    command = snakemake.call("--nolock", *_status_command(snakemake.settings))
    code, sent = follow(command, snakemake.environment, progress)
    if not code and not sent:
        return _outcome(out, plan)
    ended = {job.name: _ended(out / _log(job)) for job in jobs}
    broken = {name: end[1] for name, end in ended.items() if end and end != before[name]}
    _say_what_failed(out, jobs, broken, progress, "stopped" if sent else "failed")
    if sent:
        _say_how_far(progress, "stopped", f"by {signal.Signals(sent).name}, ")
        return ExitCode.INTERRUPTED if sent == signal.SIGINT else ExitCode.PREEMPTED
    if not broken and not progress.failed:
        raise _trouble(code, progress.tail)
    _say_how_far(progress, "failed")
    return _worst(broken.values())


def _log(job: Planned) -> Path:
    return Path(LOGS, job.stage, f"{job.group}.log")


def _say_what_failed(out: Path, jobs: Sequence[Planned], broken: dict[str, int], progress: Progress, outcome: str) -> None:
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


def _status_command(settings: Mapping[str, object]) -> tuple[str, ...]:
    """Snakemake's executor trusts ``sacct`` wherever it is installed, and without accounting waits for ever for its answer."""
    if settings.get("executor") != "slurm" or settings.get("slurm-status-command") or not shutil.which("sacct"):
        return ()
    answer = ask(*SACCT.split())
    if not answer.returncode:
        return ()
    say(f"jobs are watched by squeue, because sacct fails: {last_line(answer.stderr)}")
    return "--slurm-status-command", "squeue"


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
    order = (ExitCode.INTERNAL, ExitCode.USAGE, ExitCode.SOME_FAILED, ExitCode.PREEMPTED, ExitCode.INTERRUPTED)
    return next((code for code in order if code in found), ExitCode.INTERNAL)


def _trouble(code: int, lines: Iterable[str]) -> PathfmError:
    """Snakemake has failed, and no job of ours: its last words, in one line."""
    if code < 0:
        return PathfmError(f"Snakemake was ended by {signal.Signals(-code).name}", fix="start the same command again")
    said = [line.strip() for line in lines if line.strip() and not line.startswith((" ", "Complete log", "Elapsed time"))]
    text = " ".join(said[-2:]) or "it said nothing"
    return UsageError(f"Snakemake has failed: {text}", fix="its whole log is in .snakemake/log of the output folder")
