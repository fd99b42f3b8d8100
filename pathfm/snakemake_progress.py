"""A Snakemake at work: what it says, in our words, and the signals that end it.

Nothing but this depends on how Snakemake words its lines.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import IO

from pathfm.errors import StoreError
from pathfm.log import status
from pathfm.store.receipts import read_receipt, receipt_path

TAIL = 12
"""Lines of Snakemake's that are kept for when it fails without a job having failed."""
QUIET_S = (60.0, 300.0, 900.0)
"""Seconds without news after which SLURM's queue is shown; the last is repeated."""
SHOWN = 10
"""Most jobs of the queue that are shown at a time."""
SAME_S = 1.0
"""Signals that come closer together are one: some programs send theirs to a process and to its group [s]."""
ASK_S = 10.0
"""A queue that takes longer to answer does not answer [s]."""


@dataclass
class Progress:
    """How far Snakemake is.

    Attributes:
        out: the study's output folder.
        executor: what runs the jobs: local, slurm, ...
        active: jobs that were started and have not ended, by Snakemake's number: their number on the cluster, else empty.
        failed: jobs that have failed for good, (stage, group): why, in Snakemake's words.
        counts: jobs that are done, and all of this run.
        tail: Snakemake's last lines.
    """

    out: Path
    executor: str = "local"
    active: dict[str, str] = field(default_factory=dict)
    failed: dict[tuple[str, str], str] = field(default_factory=dict)
    counts: tuple[int, int] = (0, 0)
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL))
    _names: dict[str, tuple[str, str]] = field(default_factory=dict)
    _stage: str = ""
    _job: str = ""
    _error: str | None = None
    _run: str = ""

    def take(self, line: str) -> None:
        """One line of Snakemake's."""
        self.tail.append(line)
        if found := re.match(r"(?:local)?rule (\w+):$", line):
            self._stage, self._error = found[1], None
        elif line.startswith("Error in rule "):
            self._error = ""
        elif self._error == "" and (found := re.match(r"\s+message: (.+)", line)):
            self._error = found[1].partition("For further error details")[0]
        elif found := re.match(r"\s+jobid: (\d+)$", line):
            self._begin(found[1])
        elif found := re.match(r"\s+wildcards: group=(\S+)$", line):
            self._names[self._job] = self._stage, found[1]
            self.active[self._job] = ""
        else:
            self._take_news(line)

    def _begin(self, job: str) -> None:
        """Lines about a job follow, or those about its failure are over."""
        self._job = job
        if self._error is not None and job in self._names:
            self.active.pop(job, None)
            self.failed[self._names[job]] = self._error
            self._error = None

    def _take_news(self, line: str) -> None:
        if found := re.match(r"SLURM run ID: (\S+)$", line):
            self._run = found[1]
        elif (found := re.match(r"Job (\d+) has been submitted with SLURM jobid (\w+)", line)) and found[1] in self._names:
            self.active[found[1]] = found[2]
            status(self._name(found[1]), "submitted", f"as SLURM job {found[2]}")
        elif found := re.match(r"Finished jobid: (\d+)", line):
            self._job = found[1]
            self.active.pop(self._job, None)
        elif (found := re.match(r"(\d+) of (\d+) steps", line)) and self._job in self._names:
            self.counts = int(found[1]), int(found[2]) - 1  # the last step is the target of all
            self._say_done(*self._names[self._job])

    def _name(self, job: str) -> str:
        return " ".join(self._names[job])

    def _say_done(self, stage: str, group: str) -> None:
        self.failed.pop((stage, group), None)  # of an earlier attempt
        try:
            receipt = read_receipt(receipt_path(self.out, stage, group))
        except StoreError:
            receipt = None
        failed = f", {len(receipt.failed)} of {len(receipt.slides)} slides failed" if receipt and receipt.failed else ""
        status(f"{stage} {group}", "done", f"{self.counts[0]} of {self.counts[1]} jobs{failed}")

    def say_queue(self) -> None:
        """Says what the jobs that were submitted wait for: a job that cannot start would else be silent for ever."""
        waiting = {job: number for job, number in self.active.items() if number}
        if not waiting:
            return
        answer = ask("squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%r", f"--name={self._run}")
        if answer.returncode:
            status("squeue", "waiting", f"SLURM does not answer: {last_line(answer.stderr)}")
            return
        rows = {number: (state.lower(), reason) for number, state, reason in _rows(answer.stdout)}
        for job, number in list(waiting.items())[:SHOWN]:
            state, reason = rows.get(number, ("unknown", "not in SLURM's queue any more"))
            status(self._name(job), state, f"SLURM job {number}{'' if reason == 'None' else f': {reason}'}")
        if len(waiting) > SHOWN:
            status(f"{len(waiting) - SHOWN} more jobs", "and", "squeue --me lists them")

    def left_behind(self) -> str:
        """How to end the jobs of a cluster that go on without Snakemake; empty if there are none."""
        if self.executor == "local" or not self.active:
            return ""
        return f"jobs on the cluster go on{f': scancel --name {self._run} ends them' if self._run else ''}"


def _rows(text: str) -> list[tuple[str, str, str]]:
    return [(row[0], row[1], row[2]) for line in text.splitlines() if len(row := line.strip().split("|", 2)) == 3]


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """What a program of the cluster answers; one that is absent or does not answer in time has failed."""
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=ASK_S, check=False
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error.strerror))
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {ASK_S:.0f} s")


def last_line(text: str) -> str:
    """The last line with something in it."""
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def follow(command: list[str], environment: dict[str, str], progress: Progress) -> tuple[int, int]:
    """Runs Snakemake and says how far it is: its exit code, and the signal that ended it (0: none).

    It and its jobs on this machine are a process group of their own. A first signal is passed on, so that jobs here save what
    they have, and jobs on a cluster are waited for; a second one kills the group.
    """
    news: SimpleQueue[str | int | None] = SimpleQueue()  # lines, signals, the end of lines; handlers may put into this kind

    def note(number: int, frame: FrameType | None) -> None:
        news.put(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env=environment, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=_read, args=(process.stdout, news), daemon=True).start()
        sent = _until_it_ends(process, news, progress)
        return process.wait(), sent
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read(lines: IO[str], news: SimpleQueue[str | int | None]) -> None:
    with lines:
        for line in lines:
            news.put(line.rstrip())
    news.put(None)


def _until_it_ends(process: subprocess.Popen[str], news: SimpleQueue[str | int | None], progress: Progress) -> int:
    """Takes what comes until there is nothing more; the signal that has ended it (0: none)."""
    sent, at, looks = 0, 0.0, 0
    while True:
        try:
            item = news.get(timeout=QUIET_S[min(looks, len(QUIET_S) - 1)] if progress.executor == "slurm" else None)
        except Empty:
            looks += 1
            progress.say_queue()
            continue
        looks = 0
        if item is None:
            return sent
        if isinstance(item, str):
            progress.take(item)
        elif not sent:
            sent, at = item, time.monotonic()
            _ask_to_end(process, item, progress)
        elif time.monotonic() - at > SAME_S:
            _signal_group(process, signal.SIGKILL)
            return sent


def _ask_to_end(process: subprocess.Popen[str], number: int, progress: Progress) -> None:
    """Jobs here get the signal themselves; from Ctrl-C, Snakemake would cancel those of a cluster without letting them save."""
    if progress.executor == "local":
        _signal_group(process, number)
    else:
        process.terminate()
    jobs = f"{len(progress.active)} job{'s' * (len(progress.active) != 1)}"
    behind = progress.left_behind()
    status("the run", "ending", f"waiting for {jobs} to end; again to stop now{f' ({behind})' if behind else ''}")


def _signal_group(process: subprocess.Popen[str], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
