"""Work on many items in worker processes, so that what one item breaks is that item only.

Each slot keeps one worker process for all the items it is given; only a crash or a time limit costs a new process. Workers are
started by ``spawn``: nothing of the parent's threads, locks or open files leaks into them. A worker ends with its parent,
however that ends. Only functions of the main script itself need its usual ``if __name__ == "__main__":``.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import multiprocessing
import os
import platform
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import Generic, NamedTuple, Self, TypeVar

from pathfm.errors import PathfmError, SlideError

Item = TypeVar("Item")
Result = TypeVar("Result")

_EXIT_PATIENCE_S = 5.0
_SCHEDULER = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # what a scheduler says to all processes of a job


class InternalError(SlideError):
    """Something nobody foresaw went wrong with one item; ``traceback`` is the worker's, as text."""

    def __init__(self, what: str, *, where: str = "", fix: str = "", traceback: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.traceback = traceback

    def __reduce__(self) -> tuple[object, ...]:
        return functools.partial(InternalError, where=self.where, fix=self.fix, traceback=self.traceback), (self.what,)


class WorkerCrash(SlideError):
    """The worker process ended before it had a result: a native crash, a kill, or the time limit; ``killed``: by SIGKILL."""

    killed = False


class ProcessName(NamedTuple):
    """One process among those of all machines and times, as text ``host-machine-boot-space-pid-start`` (no dots, < 80 bytes).

    A process number alone says nothing on a shared drive: every machine and every container counts its own, and gives a number
    again later. Only numbers of one boot and one process space (container) can be looked up from here.

    Attributes:
        host: the machine's own name, for people.
        machine: hash of its name and machine-id.
        boot: hash of what the kernel was called since it started.
        space: number of the process space.
        pid: process number.
        start: when it started, in the kernel's ticks; 0 where that is not known.
    """

    host: str
    machine: str
    boot: str
    space: str
    pid: int
    start: int

    @classmethod
    def here(cls) -> Self:
        """This process."""
        pid = os.getpid()
        return cls(*_machine(), pid, _started(pid))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The process of a written name; None for any other text."""
        found = re.fullmatch(r"(\w+)-(\w+)-(\w+)-(\w+)-([0-9]+)-([0-9]+)", text, re.ASCII)
        if not found:
            return None
        host, machine, boot, space, pid, start = found.groups()
        return cls(host, machine, boot, space, int(pid), int(start))

    @property
    def has_ended(self) -> bool:
        """Whether it is certain, from here, that the process has ended; False for processes of other machines."""
        return (self.boot, self.space) == _machine()[2:] and not _is_running(self.pid, self.start)

    @property
    def of_earlier_boot(self) -> bool:
        """Whether the process ran on a machine of this name before it was started again (or on a copy of it with its name)."""
        here = _machine()
        return self.machine == here[1] and self.boot != here[2]

    def __str__(self) -> str:
        return "-".join(str(part) for part in self)


def usable_cores() -> int:
    """Cores this process may really use: its affinity, and the CPU quota of its control groups (at least 1)."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([affinity, *_cpu_quotas(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])))


def map_isolated(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, timeout_s: float | None = None
) -> Iterator[tuple[Item, Result | PathfmError]]:
    """Yield ``(item, result)`` in the order of completion, each item worked on in a worker process.

    A ``PathfmError`` comes back as it was raised; any other exception as ``InternalError``; the end of the worker process
    (native crash, kill, ``timeout_s``) as ``WorkerCrash``. The other items go on. Function, items and results must be
    picklable; workers cannot start processes of the same kind. Closing the iterator ends the workers.

    ``items`` may be lazy and slow: each item is drawn when a worker has nothing to do and the caller has handled what was
    yielded, in one thread of its own, so that waiting for an item holds up no result. What ``items`` raises is raised here.

    Args:
        function: called with one item, in a worker process also when there is only one.
        items: what to work on.
        workers: worker processes; 0 means as many as there are usable cores.
        timeout_s: longest time for one item [s], counted from its start.
    """
    feed = _Feed(items)
    slots: list[_Slot[Item, Result]] = [_Slot(function, timeout_s) for _ in range(workers or usable_cores())]
    try:
        yield from _work_off(feed, slots)
    finally:
        feed.close()
        for slot in slots:
            slot.close()


def _work_off(feed: _Feed[Item], slots: Sequence[_Slot[Item, Result]]) -> Iterator[tuple[Item, Result | PathfmError]]:
    while True:
        idle = [slot for slot in slots if not slot.holding]
        if feed.is_over and len(idle) == len(slots):
            return
        if idle:
            feed.ask()
        rings, speaking = _that_speak(feed, [slot for slot in slots if slot.holding])
        for item in feed.take() if rings else ():
            idle[0].give(item)
        for slot in speaking:
            yield from slot.take()


class _Feed(Generic[Item]):
    """Draws from ``items`` in a thread, one item each time it is asked; ``bell`` can be waited for like a worker's pipe."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.is_over = self.is_asked = self._is_closed = False
        self.bell, self._rope = multiprocessing.Pipe(duplex=False)
        self._wanted = threading.Semaphore(0)
        self._drawn: Future[list[Item]]
        # A daemon, because an item may never come: nobody waits for this thread.
        threading.Thread(target=self._draw, args=(iter(items),), daemon=True).start()

    def ask(self) -> None:
        """Have the next item drawn, unless that is under way or there is none; the bell rings when ``take`` has something."""
        if not (self.is_asked or self.is_over):
            self.is_asked = True
            self._wanted.release()

    def take(self) -> list[Item]:
        """What was drawn: one item, or nothing at the end. Raises what drawing it raised."""
        self.bell.recv_bytes()
        self.is_asked, self.is_over = False, True
        drawn = self._drawn.result()
        self.is_over = not drawn
        return drawn

    def close(self) -> None:
        """Draw no more; an item that is being drawn is forgotten."""
        self._is_closed = True
        self._wanted.release()
        self.bell.close()

    def _draw(self, items: Iterator[Item]) -> None:
        with self._rope:  # closed by its only user: another thread's file might have its number by then
            while self._wanted.acquire() and not self._is_closed:
                self._drawn = Future()
                try:
                    self._drawn.set_result(list(itertools.islice(items, 1)))
                except BaseException as error:  # noqa: BLE001 - raised again by take()
                    self._drawn.set_exception(error)
                with suppress(BrokenPipeError):  # nobody listens any more
                    self._rope.send_bytes(b".")


class _Slot(Generic[Item, Result]):
    """One worker process and the item it works on (``holding``: that item, or nothing)."""

    def __init__(self, function: Callable[[Item], Result], timeout_s: float | None) -> None:
        self.function, self.timeout_s = function, timeout_s
        self.holding: list[Item] = []
        self.deadline = float("inf")
        self.process: SpawnProcess | None = None
        self.connection: Connection

    def give(self, item: Item) -> None:
        """Hand an item to the worker, which is started first if there is none or if it died while idle."""
        self.holding = [item]
        if self.process is not None:
            with suppress(BrokenPipeError, ConnectionResetError):
                return self.connection.send(item)
            self._end()
        deaf(resource_tracker.ensure_running)
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.function, theirs), daemon=True)
        with _main_script_left_out(self.function):
            self.process.start()
        theirs.close()
        with suppress(BrokenPipeError, ConnectionResetError):  # a worker that dies at once is found by take()
            self.connection.send(item)
        return None

    def take(self) -> list[tuple[Item, Result | PathfmError]]:
        """The item and its outcome, or nothing if the worker only said that it has started."""
        if not self.connection.poll() and time.monotonic() >= self.deadline:
            self._end()
            return self._finish(WorkerCrash(f"no result after {self.timeout_s:g} s; its worker process was ended"))
        try:
            message: list[Result | PathfmError] = self.connection.recv()
        except (EOFError, ConnectionResetError):
            return self._finish(_crash(self._end(_EXIT_PATIENCE_S)))
        if message:
            return self._finish(message[0])
        self.deadline = time.monotonic() + self.timeout_s if self.timeout_s else self.deadline
        return []

    def close(self) -> None:
        """End the worker: at once if it is busy, else by telling it that there is no more work."""
        if self.process is not None:
            self._end(0.0 if self.holding else _EXIT_PATIENCE_S)

    def _finish(self, outcome: Result | PathfmError) -> list[tuple[Item, Result | PathfmError]]:
        item, self.holding, self.deadline = self.holding[0], [], float("inf")
        return [(item, outcome)]

    def _end(self, patience_s: float = 0.0) -> int:
        """Wait for the process, kill it if that takes too long, and return its exit code."""
        assert self.process is not None
        if not patience_s:
            self.process.kill()  # before its pipe is closed, or it might complain about that on standard error
        self.connection.close()
        self.process.join(patience_s or None)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode or 0
        self.process.close()
        self.process = None
        return code


@contextmanager
def _main_script_left_out(function: Callable[..., object]) -> Iterator[None]:
    """Keep a new process from running the main script again, which only a function defined there needs.

    Spawned processes import ``__main__`` by default: slow for the command line, endless for a script without the guard,
    impossible for one read from standard input.
    """
    main = sys.modules["__main__"]
    plain = function.func if isinstance(function, functools.partial) else function
    if plain.__module__ == "__main__":
        yield
        return
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _that_speak(feed: _Feed[Item], busy: Sequence[_Slot[Item, Result]]) -> tuple[bool, list[_Slot[Item, Result]]]:
    """Wait for an item, or for a worker that has sent something, has died or has used up its time: is there one, and which."""
    soonest = min((slot.deadline for slot in busy), default=float("inf")) - time.monotonic()
    bells = [feed.bell] if feed.is_asked else []
    ready = wait([*bells, *(slot.connection for slot in busy)], None if soonest == float("inf") else max(0.0, soonest))
    now = time.monotonic()
    return feed.bell in ready, [slot for slot in busy if slot.connection in ready or now >= slot.deadline]


def _serve(function: Callable[[Item], Result], connection: Connection) -> None:
    """The worker: for each item, an empty list when it starts and a list with the outcome when it is done."""
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has gone
        while True:
            item: Item = connection.recv()
            connection.send([])
            try:
                connection.send([function(item)])
            except PathfmError as error:
                connection.send([error])
            except Exception as error:  # noqa: BLE001 - what nobody foresaw must end this item only, as a row of the record
                connection.send([_internal(error)])


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it has ended, however that ends: for a thread of its own."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def deaf(start: Callable[[], None]) -> None:
    """Starts a helper process of Python's that the scheduler's signals do not end: they stay blocked in it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SCHEDULER)
    try:
        start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _internal(error: Exception) -> InternalError:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join("".join(traceback.format_exception_only(error)).split())
    where = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
    return InternalError(f"internal error: {what}", where=where, traceback="".join(traceback.format_exception(error)))


def _crash(code: int) -> WorkerCrash:
    if code >= 0:
        return WorkerCrash(f"its worker process ended with exit code {code} before it had a result")
    known = {item.value: item.name for item in signal.Signals}
    killed = -code == signal.SIGKILL
    advice = "often too little memory: fewer workers need less" if killed else ""
    crash = WorkerCrash(f"its worker process was ended by {known.get(-code, f'signal {-code}')}", fix=advice)
    crash.killed = killed
    return crash


def _machine() -> tuple[str, str, str, str]:
    """Host, machine, boot and process space of this process, as in ``ProcessName``."""
    # A container has the machine's boot and a process space of its own.
    space = Path("/proc/self/ns/pid")
    return (*_host(), re.sub(r"\D", "", str(space.readlink())) if space.is_symlink() else "0")


@functools.cache
def _host() -> tuple[str, str, str]:
    name = platform.node()
    host = re.sub(r"[^A-Za-z0-9]+", "_", name.partition(".")[0])[:24] or "host"
    return host, _short_hash(name, Path("/etc/machine-id")), _short_hash("", Path("/proc/sys/kernel/random/boot_id"))


def _short_hash(text: str, file: Path) -> str:
    with suppress(OSError):
        text += file.read_text(errors="replace")
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _started(pid: int) -> int:
    """When a process started, in ticks since the boot; 0 when that cannot be read or the process is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def _is_running(pid: int, start: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's: it is there, and its start can usually be read
    if not start or not Path(f"/proc/{pid}/stat").exists():
        return True  # there is a process of that number, and no way to tell whether it is that one
    # A killed process that nobody has waited for still has its number, and writes nothing any more.
    return _started(pid) == start


def _cpu_quotas(root: Path, membership: Path) -> Iterator[float]:
    """CPU limits, in cores, of this process's control group and of all above it (version 2), or of version 1's root."""
    with suppress(OSError):
        own = next((line[3:].strip("/") for line in membership.read_text().splitlines() if line.startswith("0::")), "")
        for folder in [root / own, *(root / own).parents]:
            if (folder / "cpu.max").is_file():
                quota, period = (folder / "cpu.max").read_text().split()
                yield float("inf") if quota == "max" else float(quota) / float(period)
    with suppress(OSError):
        quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if float(quota) > 0:
            yield float(quota) / float(period)
