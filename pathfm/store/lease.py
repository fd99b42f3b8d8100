"""Leases: many machines on one shared drive divide the slides of a study among them, without a server.

A lease is the file ``.NAME.lease`` beside what is to be made. It is created with O_EXCL, which drives (NFS since version 3,
SMB) grant to one machine only. Its first line says who holds it, with a random token; a thread of the holder appends one byte
every sixth of ``ttl_s``. Appending, and not setting a time: the drive itself then stamps the file with its own clock,
whatever the protocol, the file changes also for those who see no times, and an append to a file that was removed fails at the
drive, where a look at it might be answered from a cache.

**When a lease has expired.** The holder is a process of this machine and boot that has ended: at once. Otherwise two things
must be true. The drive's clock says that it has been silent for ``ttl_s``: a file is written beside the lease and the two
time stamps are compared, so that no machine's clock matters. And this process has itself seen it unchanged for a third of
``ttl_s`` (two beats), since a drive's clock may be set or jump when its server fails over, and then all leases would look old
at once. When the drive's clock has been set back, twice ``ttl_s`` of unchanged content is enough. A lease that names no holder,
since that died while it created it, has a term of its own (``NAMELESS_S``). What is seen here may be as
old as the attribute cache of a network drive (``acregmax``, 60 s on NFS by default), so on such a drive ``ttl_s`` must be
well above that (default 120).

**Taking over.** The expired file is renamed to a name of its own: of all who try, the rename gives the file to one. What was
renamed is read again. If it is not, byte for byte, what was judged (a beat came after all, or another was faster and its new
lease was caught), it is put back by an O_EXCL creation, which cannot overwrite a newer one. If it is, it is unlinked, so that
machines that still hold it open get an error from the drive, and the new lease is created in competition with all others.

**What can still go wrong, and why it does no harm.** Two may work on one slide: when a holder was paused for longer than
``ttl_s`` and wakes up, or when a lease that was caught by mistake could not be put back. ``Lease.check`` is called right
before the rename that commits the work. It appends to the lease, so that its success also means that nobody takes the lease
for expired for another ``ttl_s``. A holder that is paused between that and its rename commits although another works. Then
one whole artifact replaces another of the same content: what is made depends on the slide and the settings only. A process
that dies at any moment leaves the lease, which expires, or a renamed one, which ``sweep`` removes. So at worst work is done
twice.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from pathfm.errors import StoreError
from pathfm.faults import crash_point
from pathfm.log import get_log
from pathfm.store.commit import beside, discard_partials, disk_errors, partial
from pathfm.workers import ProcessName

SUFFIX = ".lease"
BEATS, WATCH = 6, 1 / 3
"""Signs of life per ``ttl_s``; share of ``ttl_s`` that a lease must have been seen unchanged, whatever clocks say."""
_PUT_BACK_S = 1.0
"""Another may have caught this lease by mistake, and is about to put it back [s]."""
NAMELESS_S = 10.0
"""A holder names itself right after it has created the lease; one that has not in this time died between the two [s]."""
POLL_S = 2.0
"""Longest time between looks at slides that others hold [s]."""

Task = TypeVar("Task")

log = get_log(__name__)


class LeaseLostError(StoreError):
    """Another process has taken the lease over: it makes, or has made, what this one was making."""


class _Content(NamedTuple):
    """What a lease file says; a holder that died while it wrote the file leaves no token and no process."""

    raw: bytes
    mtime: float
    token: str = ""
    process: ProcessName | None = None
    ttl_s: float = 0.0


@dataclass(frozen=True)
class Lease:
    """The right to make one artifact. Can be sent to worker processes; the process that took it keeps it alive.

    Attributes:
        path: the lease file.
        token: what the file must say.
    """

    path: Path
    token: str

    def still_mine(self) -> bool:
        """Whether the lease is held; if so, it counts as fresh from now on. Asks the drive, not a cache."""
        try:
            with self.path.open("r+b", buffering=0) as file:
                if _parse(file.read(), 0.0).token != self.token:
                    return False
                file.write(b".")
                os.fsync(file)
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ESTALE}:
                return False
            raise
        return True

    def check(self) -> None:
        """Refuse to go on without the lease: the ``check`` of ``commit_dir``.

        Raises:
            LeaseLostError: the lease is not held any more.
        """
        if self.still_mine():
            return
        time.sleep(_PUT_BACK_S)
        if not self.still_mine():
            name = self.path.name.removeprefix(".").removesuffix(SUFFIX)
            raise LeaseLostError("another process has taken it over, as this one gave no sign of life for too long", where=name)

    def release(self) -> None:
        """Let the next one have it. A lost lease stays with its new holder; a drive that fails only delays the others."""
        crash_point("lease.before_release")
        try:
            found = _read(self.path)
            if found and found.token == self.token:
                _withdraw(self.path, lambda content: content.token == self.token)
        except OSError as error:
            log.warning("%s: the lease could not be given back: %s", self.path.name, error.strerror)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


class Leases:
    """All leases of this process: takes them, keeps them alive in one thread, and gives back what is left at the end.

    Args:
        ttl_s: a holder that is silent for so long loses its lease [s]; must be well above the attribute cache of the drive.
        clock: seconds that never go back, for judging how long a lease was seen unchanged.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.ttl_s, self._clock = ttl_s, clock
        self._held: dict[str, Lease] = {}
        self._missed: dict[str, int] = {}
        self._seen: dict[Path, tuple[bytes, float]] = {}
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def take(self, target: Path) -> Lease | None:
        """The lease of ``target``, or None while another holds it. Does not wait; when asked again later, it may have expired.

        With an expired lease, what its holder left half-written of ``target`` is removed.

        Raises:
            StoreError: no file can be created in the folder (it is read-only, or the disk is full).
        """
        path = beside(target, SUFFIX)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(2):  # the second time after an expired lease was cleared away, or if one vanished meanwhile
                lease = self._create(path)
                if lease:
                    crash_point("lease.taken")
                    return self._keep(lease)
                if not self._clear(path):
                    return None
        return None

    def each(
        self, tasks: Iterable[Task], target_of: Callable[[Task], Path], is_done: Callable[[Task], bool]
    ) -> Iterator[tuple[Task, Lease]]:
        """Yield every task with its lease, in order; those that others hold come last, when they are free or have expired.

        A task that ``is_done`` by the time its lease is had is not yielded; ``is_done`` can take note of it.
        """
        waiting = list(tasks)
        while waiting and not self._closed.is_set():
            held: list[Task] = []
            for task in waiting:
                lease = self.take(target_of(task))
                if lease is None:
                    held.append(task)
                elif is_done(task):
                    lease.release()
                else:
                    yield task, lease
            waiting = held
            if waiting:
                self._closed.wait(min(POLL_S, self.ttl_s / BEATS))

    def sweep(self, folder: Path) -> None:
        """Remove the expired leases in ``folder``, and what their holders left half-written.

        Worth a call at the start and at the end: the silence of other machines is only known after some time.
        """
        with disk_errors(folder):
            for path in folder.glob(f".*{SUFFIX}"):
                self._clear(path)

    def close(self) -> None:
        """Give back all leases and take no more. Closing twice is allowed."""
        with self._lock:
            self._closed.set()
            held, self._held = list(self._held.values()), {}
        for lease in held:
            lease.release()
        if self._thread:
            self._thread.join(5.0)  # it may hang on a drive that does not answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _create(self, path: Path) -> Lease | None:
        lease = Lease(path, secrets.token_hex(16))
        content = {"token": lease.token, "process": str(ProcessName.here()), "ttl_s": self.ttl_s}
        try:
            file = path.open("xb", buffering=0)
        except FileExistsError:
            return None
        crash_point("lease.created")
        with file:
            try:
                file.write(json.dumps(content).encode() + b"\n")
                os.fsync(file)
            except OSError:
                _withdraw(path, lambda content: content.token in {"", lease.token})
                raise
        return lease

    def _keep(self, lease: Lease) -> Lease | None:
        with self._lock:
            if not self._closed.is_set():
                self._held[lease.token] = lease
                if not self._thread:
                    self._thread = threading.Thread(target=self._beat, daemon=True)
                    self._thread.start()
                return lease
        lease.release()
        return None

    def _beat(self) -> None:
        while not self._closed.wait(self.ttl_s / BEATS):
            for lease in list(self._held.values()):
                self._beat_one(lease)

    def _beat_one(self, lease: Lease) -> None:
        try:
            alive = lease.still_mine()
        except OSError as error:
            log.warning("%s: the lease could not be kept alive: %s", lease.path.name, error.strerror)
            return
        # Given back, or lost, which the commit will find; after one miss, it might only have been caught by mistake.
        self._missed[lease.token] = 0 if alive else self._missed.get(lease.token, 0) + 1
        if self._missed[lease.token] == 2:
            self._held.pop(lease.token, None)
            del self._missed[lease.token]

    def _clear(self, path: Path) -> bool:
        """Remove a lease that has expired; False when another holds it, or clears it away itself."""
        found = _read(path)
        if found is None:
            return True
        if not self._has_expired(path, found):
            return False
        crash_point("lease.before_takeover")
        if not _withdraw(path, lambda content: content.raw == found.raw):
            return False
        log.info("%s: given up by %s", path.name, _who(found))
        discard_partials(path.with_name(path.name.removeprefix(".").removesuffix(SUFFIX)))
        return True

    def _has_expired(self, path: Path, found: _Content) -> bool:
        if found.process and found.process.has_ended:
            return True
        now, ttl_s = self._clock(), found.ttl_s or min(NAMELESS_S, self.ttl_s)
        raw, since = self._seen.get(path, (b"", now))
        if raw != found.raw:
            since = now
        self._seen[path] = found.raw, since
        if now - since >= 2 * ttl_s:
            return True
        return now - since >= WATCH * ttl_s and _drive_time(path) - found.mtime >= ttl_s


def holder(target: Path) -> str:
    """Who holds the lease of ``target``, for a status line: ``host NAME, pid 12``; nothing when it is free."""
    with disk_errors(target):
        found = _read(beside(target, SUFFIX))
    return _who(found) if found else ""


def _who(content: _Content) -> str:
    return f"host {content.process.host}, pid {content.process.pid}" if content.process else "an unknown process"


def _read(path: Path) -> _Content | None:
    """A lease file as it is now (opening a file makes network drives look); None when there is none."""
    try:
        with path.open("rb") as file:
            return _parse(file.read(), os.fstat(file.fileno()).st_mtime)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ESTALE}:
            return None
        raise


def _parse(raw: bytes, mtime: float) -> _Content:
    try:
        said = json.loads(raw.partition(b"\n")[0])
        return _Content(raw, mtime, str(said["token"]), ProcessName.parse(str(said["process"])), float(said["ttl_s"]))
    except (ValueError, TypeError, KeyError):
        return _Content(raw, mtime)


def _withdraw(path: Path, is_right: Callable[[_Content], bool]) -> bool:
    """Remove a lease file if it is the right one; whether it was. One that is not is put back."""
    aside = partial(path.with_name(f"{path.name}-{secrets.token_hex(4)}"))
    try:
        path.rename(aside)
    except OSError as error:
        # Gone, or (SMB) open elsewhere. A rename whose answer was lost on the network is told as "gone", and was done.
        if error.errno not in {errno.ENOENT, errno.ESTALE, errno.EBUSY, errno.ETXTBSY}:
            raise
    found = _read(aside)
    if found is None:
        return False
    right = is_right(found)
    if not right:
        _put_back(path, found.raw)
    aside.unlink(missing_ok=True)
    return right


def _put_back(path: Path, raw: bytes) -> None:
    try:
        with path.open("xb", buffering=0) as file:
            file.write(raw)
            os.fsync(file)
    except FileExistsError:
        log.warning("%s: two machines may work on this one; the later one will notice", path.name)


def _drive_time(path: Path) -> float:
    """The time of the drive's own clock, as it stamps files beside ``path`` [s]."""
    probe = partial(path.with_name("clock"))
    try:
        probe.write_bytes(b".")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
