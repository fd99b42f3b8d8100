"""One run of a night batch: looks at the inbox, works in rounds, and says how it goes."""

from __future__ import annotations

import datetime
import hashlib
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pathfm.batch.health import Health, State, in_words, now
from pathfm.batch.inbox import Glance, Inbox, InboxError, content_identity, stamp_of
from pathfm.batch.ledger import Entry, Ledger
from pathfm.batch.results import RESULT, Findings, Outbox, commit_result, outcome_of, shown, shown_decision
from pathfm.batch.stop import Stop
from pathfm.errors import ExitCode, PathfmError, SlideError, StoreError
from pathfm.events import Events
from pathfm.faults import crash_point
from pathfm.log import get_log, plural, quiet, say, status
from pathfm.run_manifest import RunManifest
from pathfm.store.cohort import id_problem
from pathfm.store.commit import TROUBLE, read_json
from pathfm.store.interop.label_tables import folded
from pathfm.store.lease import Lease, LeaseLostError
from pathfm.store.manifest import file_digest
from pathfm.store.pseudonyms import Pseudonyms
from pathfm.store.record import library_versions

if TYPE_CHECKING:
    from pathfm.batch.rounds import Predictor
    from pathfm.prediction import Predicted

STAGE = "batch"
CRASHES = 2
"""A slide during which the run was killed so often, while nothing else was worked on, is not tried again."""
LOOK_S = 15.0
"""Longest time between two looks at the inbox while there is nothing to do [s]."""
GB = 1e9
TROUBLES = tuple(what for what, _ in TROUBLE.values())
"""How the reason of a slide begins that failed by the drive of the outbox."""

log = get_log(__name__)


class NoRoomError(StoreError):
    """The drive of the outbox is too full to begin, or to finish, a round."""


@dataclass(frozen=True)
class BatchOptions:
    """How a night batch works; but for the pseudonyms, nothing here changes a result.

    Attributes:
        watch: go on until told to stop, else end when nothing is left to do.
        settle_s: a slide is whole when it was unchanged for so long [s].
        sentinel: instead, a slide is whole when a file of its name with this at the end is there.
        round: slides worked on together.
        min_free_gb: no work is begun with less free space in the outbox [10^9 bytes].
        new_bundle: another bundle than before is meant.
        pseudonym_key: file with the key by which names of slides become pseudonyms.
        dicom: also write DICOM objects.
    """

    watch: bool = False
    settle_s: float = 30.0
    sentinel: str = ""
    round: int = 8
    min_free_gb: float = 5.0
    new_bundle: bool = False
    pseudonym_key: Path | None = None
    dicom: bool = False


class Ready(NamedTuple):
    """A whole slide that is to be worked on."""

    entry: Entry
    glance: Glance


class Control(NamedTuple):
    """What a run is told by others: its options, the wish to stop, the right to write, and pseudonyms, if any."""

    options: BatchOptions
    stop: Stop
    lease: Lease
    names: Pseudonyms | None = None


class Runner:
    """One run.

    Args:
        inbox: looked at.
        box: written into.
        ledger: of that outbox.
        events: of that outbox.
        predictor: the bundle, ready to be asked.
        control: what others say.
    """

    def __init__(
        self, inbox: Inbox, box: Outbox, ledger: Ledger, events: Events, predictor: Predictor, control: Control
    ) -> None:
        self.inbox, self.box, self.ledger, self.events, self.predictor = inbox, box, ledger, events, predictor
        self.options, self.stop, self.lease, self.names = control
        self.health = Health(box.folder, predictor.bundle.digest)
        self.quarantined: list[str] = []
        self.waiting = 0
        self._tables_are_old = True

    def run(self) -> ExitCode:
        """Works until nothing is left (``--once``) or until it is stopped.

        Raises:
            PathfmError: the drive fails, or the outbox was taken over by another run.
        """
        versions = library_versions()
        self.events.write("run_started", stage=STAGE, versions=versions, settings=self.predictor.bundle.digest)
        try:
            self._recover()
            self._watch() if self.options.watch else self._once()
        except KeyboardInterrupt:
            self._end("stopped")
            return self._exit_code if self.options.watch else ExitCode.INTERRUPTED
        except LeaseLostError:  # the outbox belongs to another run now: nothing is written any more
            raise
        except PathfmError as error:
            with suppress(StoreError):
                self._end("stopped", error.reason)
            raise
        self._end("finished")
        return self._exit_code

    @property
    def _exit_code(self) -> ExitCode:
        return ExitCode.SOME_FAILED if self.quarantined else ExitCode.DONE

    def _end(self, state: State, error: str = "") -> None:
        for entry in self.ledger.of_state("started"):
            self.ledger.stop(entry)
        self.health.last_error = error
        self._tell(state)
        if self._tables_are_old:  # a round was broken off; that the run has ended is told when they are true again
            self._write_tables()
        self.events.write("run_ended", stage=STAGE, counts=dict(self.health.counts))
        say(f"{state}: {in_words(self.health.counts)}")
        if self.quarantined:
            say(f"quarantined in this run: {', '.join(self.quarantined)}")

    def _tell(self, state: State, current: Sequence[str] = ()) -> None:
        self.health.counts = {**self.ledger.counts, "quarantined": len(self.box.records), "waiting": self.waiting}
        self.health.tell(state, current)

    def _recover(self) -> None:
        """Corrects the ledger by what lies in the outbox."""
        for entry in self.ledger.of_state("waiting", "started"):
            if self.box.has_result(entry):
                self._note_done(entry)
            elif entry.state == "started":
                self.ledger.crashed(entry)
        for entry in self.ledger.of_state("quarantined"):
            if not self.box.record_of(entry).is_file():
                self.ledger.try_again(entry)
        self._write_tables()

    def _once(self) -> None:
        self._look()
        if self.waiting and not self.options.sentinel:
            time.sleep(self.options.settle_s)
        while ready := self._look():
            self._work(self._choose(ready))
        if self.waiting:
            say(f"{plural(self.waiting, 'slide is', 'slides are')} still being written, and left for the next run")

    def _watch(self) -> None:
        pause_s = min(LOOK_S, max(0.1, self.options.settle_s / 2))
        while True:
            try:
                ready = self._look()
                if ready:
                    self._work(self._choose(ready))
                    continue
            except InboxError as error:
                self._wait("waiting for the inbox", error)
            except NoRoomError as error:
                self._wait("waiting for disk", error)
            time.sleep(pause_s)

    def _wait(self, state: State, error: PathfmError) -> None:
        if self.health.state != state:
            say(f"{state}: {error.reason}")
        for entry in self.ledger.of_state("started"):
            self.ledger.stop(entry)
        self.health.last_error = error.reason
        self._tell(state)

    def _look(self) -> list[Ready]:
        """Slides to work on; only as many new ones are hashed as the next round needs."""
        look = self.inbox.look()
        self.health.last_look, self.health.last_error = now(), ""
        self.waiting, ready = len(look.unsettled), dict[str, Ready]()
        for glance in look.whole:
            entry = self.ledger.known(self._alias(glance.file), glance.stamp)
            if entry is None and sum(not slide.entry.suspect for slide in ready.values()) < self.options.round:
                entry = self._identify(glance)
            if entry is None:
                self.waiting += not self._unreadable(glance).is_file()
            elif entry.state == "waiting" and self._is_usable(entry):
                ready.setdefault(entry.identity, Ready(entry, glance))
        self.waiting += len(ready)
        if not (ready and self.health.state == "waiting for disk"):
            self._tell("idle")
        return list(ready.values())

    def _alias(self, name: str) -> str:
        """What a slide, or a file, is called outside of the inbox."""
        return self.names.of("slide", shown(name)) if self.names else name

    def _unreadable(self, glance: Glance) -> Path:
        """The record of a slide that could not even be hashed; its content being unknown, its name stands for it."""
        return self.box.record_of(self._nameless(glance))

    def _nameless(self, glance: Glance) -> Entry:
        file = self._alias(glance.file)
        identity = hashlib.sha256(file.encode(errors="surrogateescape")).hexdigest()
        return Entry(identity, self._alias(glance.slide_id), [file])

    def _identify(self, glance: Glance) -> Entry | None:
        """The entry of a slide by its content; None when it cannot be read, or has changed meanwhile."""
        record = self._unreadable(glance)
        try:
            identity = content_identity(glance.path)
        except OSError as error:
            if not record.is_file():
                self._record(self._nameless(glance), f"the file cannot be read: {error.strerror}")
            return None
        record.unlink(missing_ok=True)
        if stamp_of(glance.path) != glance.stamp:
            return None
        entry = self.ledger.add(self._alias(glance.file), glance.stamp, identity, self._alias(glance.slide_id))
        if len(entry.files) > 1:
            status(shown(self._alias(glance.slide_id)), "duplicate", f"same content as {shown(entry.slide_id)}")
            if entry.state == "quarantined":
                self.box.write_record(entry, entry.reason)
        return entry

    def _is_usable(self, entry: Entry) -> bool:
        problem = id_problem(entry.slide_id)
        if entry.crashes >= CRASHES:
            problem = f"the run was killed {entry.crashes} times while it worked on this slide alone"
        if problem:
            self._quarantine(entry, problem)
        return not problem

    def _choose(self, ready: Sequence[Ready]) -> list[Ready]:
        """The slides of the next round: those that nothing is held against, else one suspect alone."""
        names: dict[str, Ready] = {}
        for slide in ready:
            if not slide.entry.suspect:
                names.setdefault(folded(slide.entry.slide_id), slide)
        return list(names.values())[: self.options.round] or [min(ready, key=lambda slide: slide.entry.crashes)]

    def _check_room(self) -> None:
        free_gb = shutil.disk_usage(self.box.folder).free / GB
        if free_gb < self.options.min_free_gb:
            what = f"{free_gb:.1f} GB are free for the outbox, and {self.options.min_free_gb:g} are wanted"
            raise NoRoomError(what, fix="make room, or lower --min-free-gb")

    def _work(self, slides: Sequence[Ready]) -> None:
        """One round."""
        self._check_room()
        self.lease.check()
        with RunManifest(self.box.folder, STAGE, self.predictor.study) as manifest, self.box.work():
            manifest.models({"bundle": self.predictor.bundle.digest})
            manifest.inputs({slide.entry.slide_id: slide.entry.identity for slide in slides})
            for slide in slides:
                self.ledger.start(slide.entry, alone=len(slides) == 1)
                self.events.write("slide_started", stage=STAGE, slide_id=slide.entry.slide_id)
            self._tell("working", [slide.entry.slide_id for slide in slides])
            crash_point("batch.round.started")
            with quiet():  # the stages name folders that go with the round, and a slide that fails several times over
                predicted = self.predictor.predict({slide.entry.slide_id: slide.glance.path for slide in slides})
            for slide in slides:
                self.stop.check()
                with self.stop.held():
                    self._finish(slide, predicted)
            made = [slide.entry for slide in slides if slide.entry.state == "done"]
            manifest.outputs(*(self.box.results / entry.name for entry in made))
            manifest.exit_code = ExitCode.DONE if len(made) == len(slides) else ExitCode.SOME_FAILED
        self.health.last_success = now()
        self._write_tables()

    def _write_tables(self) -> None:
        from pathfm.batch.drift import write_page

        found, damaged = self.box.read_results()
        for name in sorted(set(damaged) - set(self.health.damaged)):
            log.warning("%s: this result cannot be read: restore it from a copy", self.box.results / name)
        self.health.damaged = damaged
        self.box.write_index(found)
        write_page(self.box, self.predictor.drift, self.predictor.bundle.digest, found)
        self._tables_are_old = False

    def _finish(self, slide: Ready, predicted: Predicted) -> None:
        """Commits what became of a slide."""
        entry, glance = slide
        outcome = predicted.result.outcome(entry.slide_id)
        if stamp_of(glance.path) != glance.stamp:
            status(entry.slide_id, "left", "it has changed or gone while it was worked on: for a later look")
            self.ledger.stop(entry)
        elif outcome.status != "failed":
            found = self._findings(entry, predicted)
            commit_result(self.box, entry, predicted.result, found, self.lease.check)
            self._note_done(entry)
        elif outcome.reason.startswith(TROUBLES):  # not the slide's fault
            raise NoRoomError(outcome.reason)
        else:
            self._quarantine(entry, outcome.reason)

    def _findings(self, entry: Entry, predicted: Predicted) -> Findings:
        from pathfm.batch.dicom import About, write_dicom_of
        from pathfm.batch.drift import drift_of

        time, result = datetime.datetime.now(datetime.UTC), predicted.result
        store, features = result.stores_dir / f"{entry.slide_id}.zarr", predicted.features.get(entry.slide_id)
        drift = drift_of(self.predictor.drift, store, features)
        found = Findings(time, drift, self.events.head)
        if not self.options.dicom or features is None:
            return found
        about = About(entry.slide_id, time, qc=tuple(flag["sentence"] for flag in (drift or {}).get("flags", ())))
        scores = result.stores_dir.parents[1] / "attention" / f"{entry.slide_id}.csv"

        def add_dicom(folder: Path) -> None:
            try:
                write_dicom_of(folder / "dicom", scores, result, entry.slide_id, about)
            except SlideError as error:
                status(entry.slide_id, "note", f"no DICOM objects: {error.reason}")

        return replace(found, add_files=add_dicom)

    def _note_done(self, entry: Entry) -> None:
        """Tells of a result that is there. The ledger comes last: until it knows, the next run tells all of this again."""
        self._tables_are_old, file = True, self.box.results / entry.name / RESULT
        said = read_json(file)
        outcome, bundle = outcome_of(said), str(said["bundle"])
        kind = "slide_empty" if outcome == "empty" else "slide_done"
        self.events.write(kind, stage=STAGE, slide_id=entry.slide_id)
        about = {"identity": entry.identity, "bundle": bundle, "result": file_digest(file)}
        self.events.write("result_written", stage=STAGE, slide_id=entry.slide_id, **about)
        self.events.flush()
        self.box.record_of(entry).unlink(missing_ok=True)
        crash_point("batch.result.told")
        self.ledger.done(entry, outcome, bundle)
        status(entry.slide_id, "done", f"{shown_decision(said)} -> {file.parent.relative_to(self.box.folder).as_posix()}")

    def _quarantine(self, entry: Entry, reason: str) -> None:
        self._record(entry, reason)
        crash_point("batch.quarantine.recorded")
        self.ledger.quarantine(entry, reason)

    def _record(self, entry: Entry, reason: str) -> None:
        self.box.write_record(entry, reason)
        self.quarantined.append(shown(entry.slide_id))
        status(shown(entry.slide_id), "quarantine", reason)
        self.events.write("slide_failed", stage=STAGE, slide_id=shown(entry.slide_id), reason=reason)
