"""``pathfm batch``: the slides of an inbox through a locked bundle, night after night. Specified in ``docs/hospital.md``.

What makes it safe to kill at any moment: a result is a folder that appears whole; the ledger says what is begun before it
begins, and is corrected by what lies in the outbox; everything else is made anew.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from pathfm.batch.inbox import Inbox
from pathfm.batch.ledger import FILE as LEDGER
from pathfm.batch.ledger import Ledger
from pathfm.batch.options import BatchOptions, Control
from pathfm.batch.results import Outbox
from pathfm.batch.runner import Runner
from pathfm.batch.stop import Stop
from pathfm.chain import read_key
from pathfm.errors import ExitCode, MissingExtraError, UsageError
from pathfm.events import Events
from pathfm.log import say
from pathfm.store.commit import beside, sweep
from pathfm.store.lease import SUFFIX, Lease, Leases
from pathfm.store.pseudonyms import Pseudonyms
from pathfm.workers import ProcessName

RUNNER = "runner"
"""What the lease of an outbox is called."""
LEASE_S = 120.0
"""A run on another machine that is silent for so long has died [s]."""


def batch(
    bundle: Path, inbox: Path, outbox: Path, options: BatchOptions | None = None, overrides: Sequence[str] = ()
) -> ExitCode:
    """``pathfm batch``.

    Args:
        bundle: of ``pathfm mil train``.
        inbox: where slides arrive; nothing in it is ever changed.
        outbox: where results, the ledger and the health file go.
        options: how it works.
        overrides: settings that the bundle leaves open, as for ``pathfm mil predict``.

    Returns:
        SOME_FAILED when this run put slides into quarantine, or found files that may be slides of a kind that cannot be read;
        INTERRUPTED when it was stopped before all was done.

    Raises:
        UsageError: the bundle, the folders or another run do not allow it.
        StoreError: the disk is full, or the drive fails.
    """
    options = options or BatchOptions()
    _check_folders(bundle, inbox, outbox)
    if options.dicom and importlib.util.find_spec("highdicom") is None:
        raise MissingExtraError("DICOM objects need highdicom", where="--dicom", extra="dicom")
    key = options.pseudonym_key.absolute() if options.pseudonym_key else None
    box = Outbox(outbox.absolute())
    with Stop() as stop, _nothing_left_empty(box.folder), Leases(LEASE_S) as leases:
        lease = _take(leases, box)
        from pathfm.batch.rounds import Predictor

        for folder in (box.folder, box.results, box.quarantine):
            sweep(folder)
        predictor = Predictor(bundle, box.folder / ".work", overrides, key)
        say(f"bundle {predictor.bundle.digest}")
        if predictor.drift is None:
            say("this bundle has no drift reference: slides are not compared with those of the training")
        with Ledger(box.folder / LEDGER) as ledger, Events(box.folder) as events:
            ledger.use(predictor.bundle.digest, read_key(key).id if key else "", options.new_bundle)
            seen = Inbox(inbox.absolute(), options.settle_s, options.sentinel, outbox=box.folder)
            names = Pseudonyms(key) if key else None
            control = Control(replace(options, round=max(1, options.round)), stop, lease, names)
            return Runner(seen, box, ledger, events, predictor, control).run()


def _check_folders(bundle: Path, inbox: Path, outbox: Path) -> None:
    # Where there is a ledger, the folder was right once: its drive is away, and the run waits for it or says so.
    if not (_is_there(inbox) or (outbox / LEDGER).is_file()):
        raise UsageError("there is no such folder", where=str(inbox), fix="name the folder that slides arrive in")
    places = {"inbox": inbox.resolve(), "outbox": outbox.resolve(), "bundle": bundle.resolve()}
    for one, other in (("outbox", "inbox"), ("inbox", "outbox"), ("outbox", "bundle")):
        if places[one].is_relative_to(places[other]):
            raise UsageError(f"the {one} lies in the {other}", where=str(places[one]), fix="use separate folders")
    strange = [name for name in ("study.yaml", "results", "predictions.csv") if (outbox / name).exists()]
    if strange and not (outbox / LEDGER).is_file():
        fix = f"name an empty folder, or bring {LEDGER} back: it tells what was already done"
        raise UsageError(f"no outbox of a night batch, but it has {strange[0]}", where=str(outbox), fix=fix)


def _is_there(folder: Path) -> bool:
    with suppress(OSError):  # whatever a drive says that is away
        return folder.is_dir()
    return False


@contextmanager
def _nothing_left_empty(folder: Path) -> Iterator[None]:
    """A run that is refused leaves no new folder behind."""
    was_there = folder.exists()
    try:
        yield
    finally:
        if not was_there:
            with suppress(OSError):  # there is something in it
                folder.rmdir()


def _take(leases: Leases, box: Outbox) -> Lease:
    """The right to write into an outbox; that of a process of this machine that has ended is no obstacle.

    Raises:
        UsageError: another run has it.
    """
    target = box.folder / RUNNER
    lease = leases.take(target)
    if lease is None:
        fix = f"stop it first; where its machine has died, try again after {LEASE_S:g} s"
        raise UsageError(f"another run works for this outbox ({_holder(target)})", where=str(box.folder), fix=fix)
    return lease


def _holder(target: Path) -> str:
    try:
        process = ProcessName.parse(json.loads(beside(target, SUFFIX).read_bytes().partition(b"\n")[0])["process"])
    except (OSError, ValueError, KeyError, TypeError):
        process = None
    return f"process {process.pid} on {process.host}" if process else "of an unknown process"
