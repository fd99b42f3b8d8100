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
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pathfm.errors import ExitCode, MissingExtraError, PathfmError, StoreError, UsageError
from pathfm.log import say, status
from pathfm.store.commit import commit_file
from pathfm.store.receipts import read_receipt, receipt_path
from pathfm.workers import usable_cores

if TYPE_CHECKING:
    from pathfm.study_plan import Planned, StudyPlan

INSTALLED = "share/pathfm/pipelines"
"""Where an installed pathfm has its rules and profiles, under the prefix of the installation."""
LOGS = "logs"
KILLED = 128 + signal.SIGKILL
"""Exit code that a shell gives for a killed job."""
REPORT = Path("report") / "snakemake.html"
"""Snakemake's own report, in the output folder."""
PICTURES = {".dot": "dot", ".svg": "dot", ".png": "dot", ".mmd": "mermaid-js"}
"""Kinds of pictures -> the language in which Snakemake writes them."""
TAIL = 12
"""Lines of Snakemake's that are shown when it fails without a job having failed."""


@dataclass(frozen=True)
class EngineOptions:
    """How Snakemake is to run.

    Attributes:
        profile: name of a shipped profile, a folder, or the name of a profile of the user.
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
        UsageError: Snakemake refuses the profile.
        PathfmError: Snakemake itself has failed.
    """
    if importlib.util.find_spec("snakemake") is None:
        raise MissingExtraError("running a study by Snakemake needs Snakemake", extra="pipelines")
    out = out.absolute()
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


def _profile(options: EngineOptions) -> str:
    """A shipped profile, else a folder, else a name that Snakemake looks up among those of the user."""
    found = [path for path in (pipelines() / "profiles" / options.profile, Path(options.profile)) if path.is_dir()]
    return str(found[0].absolute()) if found else options.profile


def _environment(options: EngineOptions) -> dict[str, str]:
    """Profiles with scripts of their own find them by this variable."""
    return {**os.environ, "PATHFM_PROFILE": _profile(options)}


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
        *("--profile", _profile(options), "--nocolor"),
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


@dataclass
class _Progress:
    """What Snakemake's lines say, said again in ours. Nothing but these lines depends on how Snakemake words its own."""

    out: Path
    names: dict[str, tuple[str, str]] = field(default_factory=dict)
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL))
    stage: str = ""
    job: str = ""
    said: str = ""
    errors: int = 0

    def take(self, line: str) -> None:
        """One line of Snakemake's."""
        self.tail.append(line)
        if found := re.match(r"(?:local)?rule (\w+):$", line):
            self.stage = found[1]
        elif found := re.match(r"\s+jobid: (\d+)$", line):
            self.job = found[1]
        elif found := re.match(r"\s+wildcards: group=(\S+)$", line):
            self.names[self.job] = self.stage, found[1]
        elif line.startswith("Error in rule "):
            self.errors += 1
        elif found := re.match(r"Finished jobid: (\d+)", line):
            self.said = found[1]
        elif (found := re.match(r"(\d+) of (\d+) steps", line)) and self.said in self.names:
            self._say_done(*self.names[self.said], int(found[1]), int(found[2]) - 1)  # the last step is the target of all

    def _say_done(self, stage: str, group: str, done: int, total: int) -> None:
        try:
            receipt = read_receipt(receipt_path(self.out, stage, group))
        except StoreError:
            receipt = None
        failed = f", {len(receipt.failed)} of {len(receipt.slides)} slides failed" if receipt and receipt.failed else ""
        status(f"{stage} {group}", "done", f"{done} of {total} jobs{failed}")


def _run(out: Path, plan: StudyPlan, options: EngineOptions) -> ExitCode:
    from pathfm.study_plan import NEEDS

    stages = list(NEEDS)[: list(NEEDS).index(options.until) + 1] if options.until else list(NEEDS)
    jobs = [job for job in plan.stale if job.stage in stages]
    if not jobs:
        say("everything is up to date: nothing was done")
        return _outcome(out, plan)
    if options.dry_run:
        return _dry_run(out, jobs, options)
    logs = {job.name: Path(LOGS, job.stage, f"{job.group}.log") for job in jobs}
    before = {name: _ended(out / log) for name, log in logs.items()}
    code, sent, progress = _start([*_arguments(out, options), "--nolock"], _environment(options), _Progress(out))
    broken = {name: ended[1] for name, log in logs.items() if (ended := _ended(out / log)) and ended != before[name]}
    for name in broken:
        status(name, "failed", f"{_last_words(out / logs[name], broken[name])} - see {logs[name]}")
    if sent:
        return ExitCode.INTERRUPTED if sent == signal.SIGINT else ExitCode.PREEMPTED
    if code and not broken and not progress.errors:
        raise _trouble(progress.tail)
    return _worst(broken.values()) if code else _outcome(out, plan)


def _dry_run(out: Path, jobs: list[Planned], options: EngineOptions) -> ExitCode:
    """Snakemake builds its graph, so that a profile or a rule that it refuses is known now; the plan says what is in it."""
    _ask(out, options, "--dry-run", "--quiet", "all")
    for job in jobs:
        say(f"{job.name}: {job.state}, {len(job.slide_ids)} slides")
    say(f"{len(jobs)} jobs would run")
    return ExitCode.DONE


def _outcome(out: Path, plan: StudyPlan) -> ExitCode:
    """Says which slides have failed."""
    from pathfm.jobs import failed_slides

    failed = failed_slides(out, plan)
    for slide_id, (stage, reason) in failed.items():
        status(slide_id, "failed", f"{stage}: {reason}")
    return ExitCode.SOME_FAILED if failed else ExitCode.DONE


def _start(command: list[str], environment: dict[str, str], progress: _Progress) -> tuple[int, int, _Progress]:
    """Runs Snakemake and tells how far it is: its exit code, the signal that ended it (0: none), what it said.

    It and its jobs are a process group of their own, to which signals are passed on: jobs save what they have.
    """
    sent = 0
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=environment, start_new_session=True,
    )  # fmt: skip

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal sent
        sent = number
        if process.poll() is None:
            os.killpg(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with process:
            for line in process.stdout or ():
                progress.take(line.rstrip())
        return process.returncode, sent, progress
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(log: Path) -> tuple[int, int] | None:
    """When the log of a job was written last, and the exit code that is its last line; None where it has none."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        found = re.match(r"exit (\d+)$", lines[-1]) if lines else None
        return (log.stat().st_mtime_ns, int(found[1])) if found else None
    except OSError:
        return None


def _last_words(log: Path, code: int) -> str:
    if code == KILLED:  # then its last line is about something else
        return "it was killed, often for want of memory"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-2].strip() if len(lines) > 1 else "it said nothing"


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
