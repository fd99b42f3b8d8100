"""One run of a night batch: looks at the inbox, works in rounds, and says how it goes."""

from __future__ import annotations

import datetime
import errno
import hashlib
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pathfm.batch.health import Health, State, in_words, now, some_of
from pathfm.batch.ignored import Ignored
from pathfm.batch.inbox import Glance, Inbox, InboxError, Look, content_identity, is_usual, stamp_of
from pathfm.batch.ledger import Entry, Ledger
from pathfm.batch.options import Control
from pathfm.batch.results import RESULT, Findings, Outbox, commit_result, outcome_of, shown, shown_decision
from pathfm.batch.tables import Tables
from pathfm.errors import ExitCode, PathfmError, SlideError, StoreError
from pathfm.events import Events
from pathfm.faults import crash_point
from pathfm.log import get_log, plural, quiet, say, status
from pathfm.run_manifest import RunManifest
from pathfm.store.cohort import id_problem
from pathfm.store.commit import TROUBLE, disk_errors, read_json
from pathfm.store.interop.label_tables import folded
from pathfm.store.lease import LeaseLostError
from pathfm.store.manifest import file_digest
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
FULL = (TROUBLE[errno.ENOSPC][0], TROUBLE[errno.EDQUOT][0])
"""What a drive says to whatever is written."""
NAMESAKE = "two slides in the inbox would have this name: A__B.svs is called like A/B.svs (rename one of them)"
NO_MPP = " (set `mpp` for it in the cohort table"
BY_HAND = " (predict it by hand: `pathfm mil predict --bundle BUNDLE TABLE.csv`, a table with slide_id, path and mpp)"
"""What is advised elsewhere about a slide without mpp, and what goes for an inbox."""

log = get_log(__name__)


class NoRoomError(StoreError):
    """The drive of the outbox is too full to begin, or to finish, a round."""


class Ready(NamedTuple):
    """A whole slide that is to be worked on."""

    entry: Entry
    glance: Glance


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
        self.tables = Tables(box, predictor.drift, predictor.bundle.digest)
        self.health = Health(box.folder, predictor.bundle.digest)
        self.ignored = Ignored(self.health)
        self.quarantined: list[str] = []
        self.waiting = 0
        self._seen = Look((), ())
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
        return ExitCode.SOME_FAILED if self.quarantined or self.ignored.told else ExitCode.DONE

    def _end(self, state: State, error: str = "") -> None:
        self.stop.hold()  # who asks twice must not make slides under way look like those that a run died of
        self._take_back()
        self.health.last_error = error
        self._tell(state)
        if self._tables_are_old:  # a round was broken off; that the run has ended is told when they are true again
            self._write_tables()
        self.events.write("run_ended", stage=STAGE, counts=dict(self.health.counts))
        say(f"{state}: {in_words(self.health.counts)}")
        if self.quarantined:
            say(f"quarantined in this run: {', '.join(self.quarantined)}")
        if self.ignored.told:
            say(f"ignored in this run, of no kind that can be read: {some_of(self.ignored.told)}")

    def _take_back(self) -> None:
        """Takes back the attempts of a round that was broken off; a result that is there stays, and is told of."""
        for entry in self.ledger.of_state("started"):
            if self.box.has_result(entry):
                self._note_done(entry)
            else:
                self.ledger.stop(entry)

    def _tell(self, state: State, current: Sequence[str] = ()) -> None:
        counts = {"quarantined": len(self.box.records), "waiting": self.waiting, "ignored": self.ignored.count}
        self.health.counts = {**self.ledger.counts, **counts}
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
            names = some_of([shown(self._alias(glance.slide_id)) for glance in self._seen.unsettled])
            what = f"{plural(self.waiting, 'slide is', 'slides are')} still being written, and left for the next run"
            say(f"{what}: {names}" if names else what)

    def _watch(self) -> None:
        pause_s = min(LOOK_S, max(0.1, self.options.settle_s / 2))
        while True:
            try:
                self._take_back()
                ready = self._look()
                if ready:
                    self._work(self._choose(ready))
                    continue
            except InboxError as error:
                self._wait("waiting for the inbox", error)
            except StoreError as error:
                if not isinstance(error, NoRoomError) and error.what not in FULL:
                    raise
                self._wait("waiting for disk", error)
            time.sleep(pause_s)

    def _wait(self, state: State, error: PathfmError) -> None:
        if self.health.state != state:
            say(f"{state}: {error.reason}")
        self.health.state, self.health.last_error = state, error.reason
        with suppress(StoreError):  # a full drive takes not even this; what it did not take is told when it has room
            self._tell(state)
            self._take_back()

    def _look(self) -> list[Ready]:
        """Slides to work on; only as many new ones are hashed as the next round needs."""
        look = self._seen = self.inbox.look()
        self.health.last_look, self.health.last_error = now(), ""
        self.waiting, ready = len(look.unsettled), dict[str, Ready]()
        self.ignored.note({shown(self._alias(file)): is_usual(file) for file in look.ignored})
        for glance in look.whole:
            entry = self.ledger.known(self._alias(glance.file), glance.stamp)
            if entry is None and sum(not slide.entry.suspect for slide in ready.values()) < self.options.round:
                entry = self._identify(glance)
            if entry is None:
                self.waiting += not self._unreadable(glance).is_file()
            elif entry.state == "waiting" and self._is_usable(entry, glance):
                ready.setdefault(entry.identity, Ready(entry, glance))
            elif entry.state == "quarantined":
                self._record_copy(entry, glance)
        self.waiting += len(ready)
        if not (ready and self.health.state == "waiting for disk"):
            self._tell("idle")
        return list(ready.values())

    def _record_copy(self, entry: Entry, glance: Glance) -> None:
        """A copy of what cannot be used has a record of its own: two transfers that failed are empty alike."""
        file = self._alias(glance.file)
        copy = Entry(entry.identity, self._alias(glance.slide_id), [file])
        if file != entry.files[0] and not self.box.record_of(copy).is_file():
            self._record(copy, f"as {shown(entry.slide_id)}: {entry.reason}")

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
            # A slide that was moved away meanwhile, and an inbox that went, are nothing to be told of.
            if not record.is_file() and stamp_of(glance.path) == glance.stamp:
                self._record(self._nameless(glance), f"the file cannot be read: {error.strerror}")
            return None
        record.unlink(missing_ok=True)
        if stamp_of(glance.path) != glance.stamp:
            return None
        before = self.ledger.entries.get(identity)
        renamed = before is not None and self._gives_name(glance, before)
        if before and renamed:
            status(shown(self._alias(glance.slide_id)), "renamed", f"was {shown(before.slide_id)}, which had no result yet")
            self.box.drop_records(before)
        entry = self.ledger.add(self._alias(glance.file), glance.stamp, identity, self._alias(glance.slide_id), renamed)
        if len(entry.files) > 1 and entry.state != "quarantined":
            status(shown(self._alias(glance.slide_id)), "duplicate", f"same content as {shown(entry.slide_id)}")
        return entry

    def _gives_name(self, glance: Glance, entry: Entry) -> bool:
        """Whether a slide that is known, and has no result, is called like this file from now on: it was renamed, or only its
        name is what is wrong with it, and this copy has a better one."""
        if entry.state not in {"waiting", "quarantined"}:
            return False
        misnamed = entry.state == "quarantined" and bool(entry.reason == NAMESAKE or id_problem(entry.slide_id))
        here = any(self._alias(each.file) in entry.files for each in (*self._seen.whole, *self._seen.unsettled))
        return not here or (misnamed and not self._name_problem(glance))

    def _name_problem(self, glance: Glance) -> str:
        return NAMESAKE if glance.is_namesake else id_problem(self._alias(glance.slide_id))

    def _is_usable(self, entry: Entry, glance: Glance) -> bool:
        # A copy has another name than the slide, and may have what name it likes.
        is_named_so = self._alias(glance.slide_id) == entry.slide_id
        problem = self._name_problem(glance) if is_named_so else id_problem(entry.slide_id)
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
        with disk_errors(self.box.index):
            free_gb = shutil.disk_usage(self.box.folder).free / GB
        if free_gb < self.options.min_free_gb:
            what = f"{free_gb:.1f} GB are free for the outbox, and {self.options.min_free_gb:g} are wanted"
            raise NoRoomError(what, fix="make room, or lower --min-free-gb")

    def _work(self, slides: Sequence[Ready]) -> None:
        """One round."""
        self._check_room()
        self.lease.check()
        with (
            RunManifest(self.box.folder, STAGE, self.predictor.study, {self.box.results.name}) as manifest,
            ExitStack() as stack,
        ):
            with disk_errors(self.box.index):
                stack.enter_context(self.box.work())
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
        damaged = self.tables.write({entry.name for entry in self.ledger.of_state("done")})
        for name in sorted(set(damaged) - set(self.health.damaged)):
            log.warning("%s: this result cannot be read: restore it from a copy", self.box.results / name)
        self.health.damaged, self._tables_are_old = damaged, False

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
            what, found_mpp, _ = outcome.reason.partition(NO_MPP)
            self._quarantine(entry, what + BY_HAND if found_mpp else outcome.reason)

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
        self.box.drop_records(entry)
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
