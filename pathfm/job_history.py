"""What events and run manifests tell of the jobs of a study: which receipts there must be, and what they may say.

Receipts lie open. What jobs have told of them in the chains of events, and manifests at the end of runs, cannot be changed
without a trace (``docs/audit.md``), so ``pathfm verify`` asks both about each receipt, and about those that are not there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathfm.chain import PATTERN, chain_files, told
from pathfm.errors import StoreError
from pathfm.run_manifest import manifest_files, receipt_digest
from pathfm.store.commit import read_json
from pathfm.store.receipts import BY_GROUP, Receipt

DONE, DROPPED = "job_done", "job_dropped"
TRAIN, BUNDLE = "mil train", "mil/bundle"
ENDED_WELL = (0, 3)
PLACES = {"tile": ("tiles/*", (".zarr",)), "extract": ("features/*/*", (".h5", ".zarr"))}
"""Where the artifacts of slides lie below an output folder, and how their names end."""


@dataclass(frozen=True)
class Told:
    """What an event tells of a job.

    Attributes:
        digest: of its receipt.
        file, sequence, time: the place of the event.
        slides: slide_id -> fingerprint, and content digest; None: told by a version that did not say.
        is_dropped: the job is no more, since the cohort is grouped otherwise.
    """

    digest: str
    file: str
    sequence: int
    time: str
    slides: Mapping[str, tuple[str, str]] | None = None
    is_dropped: bool = False


@dataclass(frozen=True)
class Known:
    """What manifests say of a job.

    Attributes:
        fingerprint: what it depended on.
        content: digest of what it had made.
        heads: how long each file of events was when that was first said.
        artifacts: paths below the output folder, of jobs of all slides.
    """

    fingerprint: str
    content: str
    heads: Mapping[str, int]
    artifacts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """What a manifest says of a command that ended well: its name, what decided its results, its bundle, the heads after it."""

    name: str
    decided_by: tuple[str, Mapping[str, str]]
    bundle: str
    heads: Mapping[str, int]


@dataclass(frozen=True)
class History:
    """All that is told of the jobs of a study.

    Attributes:
        told: stage and group -> what jobs have told, oldest first; empty where all are of versions that told nothing.
        known: the jobs of the last manifest, by ``stage/group``.
        recorded: those of any manifest, as the last one says that has them.
        commands: that ended well, oldest first.
        worked: stage and slide_id -> when the stage made something of the slide last.
    """

    out: Path
    told: Mapping[tuple[str, str], Sequence[Told]]
    known: Mapping[str, Known] = field(default_factory=dict)
    recorded: Mapping[str, Known] = field(default_factory=dict)
    commands: Sequence[Command] = ()
    worked: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def doubt(self, receipt: Receipt) -> tuple[str, bool]:
        """What is strange about a receipt, and whether that is a problem: one that nobody has told of is."""
        known = self.known.get(f"{receipt.stage}/{receipt.group}")
        if not self.told:
            return self._doubt_of_old(receipt, known)
        fitting, is_same = self._fitting(receipt), known is not None and known.content == receipt.content
        # A job of an earlier version has only the manifest to tell of it.
        if not fitting and (self._done(receipt.stage, receipt.group) or not is_same):
            return "no event tells of it: altered, or made up", True
        if known is None or is_same:
            return "", False
        other = "of other content than when the last recorded run ended"
        if any(line.sequence > known.heads.get(line.file, 0) for line in fitting):  # that run was killed, or is still going
            return other, False
        return f"{other}, and no event tells of such work since", True

    def missing(self, stage: str, there: Collection[str]) -> Iterator[tuple[str, str, bool]]:
        """Groups without the receipt that a job has told of: what is strange about it, and whether that is a problem."""
        groups = {group for its, group in self.told if its == stage}
        groups |= {name.partition("/")[2] for name in self.known if name.startswith(f"{stage}/")}
        for group in sorted(groups.difference(there)):
            name, last = f"{stage}/{group}", next(reversed(self.told.get((stage, group), ())), None)
            is_old = last is None or (last.slides is None and not last.is_dropped)
            known = self.known.get(name) if is_old else self.recorded.get(name)
            if (last and last.is_dropped) or (is_old and not known):  # versions that told no slides told of no dropping either
                continue
            if known is None:
                yield group, "missing: its run was killed, or has not ended", False
            elif self._is_anything_left(stage, last, known):
                yield group, "missing, although a job told of it: `pathfm run` writes it anew", True
            else:
                yield group, "missing, and so is all that it was about", False

    def altered(self, stage: str) -> list[str]:
        """Slides of which jobs told two contents under one fingerprint, though nothing was made of them in between."""
        lines = [line for (its, _), lines in self.told.items() if its == stage for line in lines]
        trusted, found = dict[str, tuple[str, str, str]](), set[str]()
        for line in sorted(lines, key=lambda line: (line.time, line.file, line.sequence)):
            for slide_id, (made_of, content) in (line.slides or {}).items():
                was_of, was, since = trusted.get(slide_id, ("", "", ""))
                if was_of == made_of and was != content and self.worked.get((stage, slide_id), "") <= since:
                    found.add(slide_id)
                    continue
                found.discard(slide_id)
                trusted[slide_id] = made_of, content, line.time
        return sorted(found)

    def made_again(self, receipt: Receipt, slide_id: str) -> bool:
        """Whether the stage of a receipt has made something of a slide since."""
        return any(self.worked.get((receipt.stage, slide_id), "") > line.time for line in self._fitting(receipt)[-1:])

    def trained_again(self, receipt: Receipt) -> Command | None:
        """The last ``pathfm mil train`` since a receipt that has trained on something else, or otherwise, than its run did."""
        for line in self._fitting(receipt)[-1:]:
            after = [command for command in self.commands if command.heads.get(line.file, 0) >= line.sequence]
            others = [it for it in after[1:] if it.name == TRAIN and it.decided_by != after[0].decided_by]
            return others[-1] if others else None
        return None

    def _done(self, stage: str, group: str) -> list[Told]:
        return [line for line in self.told.get((stage, group), ()) if not line.is_dropped]

    def _fitting(self, receipt: Receipt) -> list[Told]:
        digest = receipt_digest(receipt)
        return [line for line in self._done(receipt.stage, receipt.group) if line.digest == digest]

    def _doubt_of_old(self, receipt: Receipt, known: Known | None) -> tuple[str, bool]:
        """The same for a study whose jobs have told of no receipt."""
        if known is None or known.content == receipt.content:
            return "", False
        other = "of other content than when the last recorded run ended"
        if self._is_explained(receipt, known):
            return other, False
        return f"{other}, and nothing has worked on its slides since", True

    def _is_explained(self, receipt: Receipt, known: Known) -> bool:
        """Whether a receipt may have come to say something else than the manifests: a run was killed, or is still going.

        Stages that work on slides tell of each: of the same slides and settings, only such work can have made something else.
        """
        if receipt.stage not in BY_GROUP or receipt.fingerprint != known.fingerprint:
            return True
        slides = {slide.slide_id for slide in receipt.slides}
        return any(
            said["sequence"] > known.heads.get(path.relative_to(self.out).as_posix(), 0)
            for path in chain_files(self.out)
            for said in told(path, "slide_done", "slide_empty", "slide_failed")
            if said.get("stage") == receipt.stage and said.get("slide_id") in slides
        )

    def _is_anything_left(self, stage: str, last: Told | None, known: Known) -> bool:
        if known.artifacts or stage not in BY_GROUP:
            return any((self.out / name).exists() for name in known.artifacts)
        folders, ends = PLACES[stage]
        if last is None or last.slides is None:
            return any(self.out.glob(folders))
        names = [f"{slide_id}{end}" for slide_id in last.slides for end in ends]
        return any((place / name).exists() for place in self.out.glob(folders) for name in names)


def read_history(out: Path) -> History:
    """What is told of the jobs of a study; whether it is as it was written, the audit says."""
    known, recorded, commands = dict[str, Known](), dict[str, Known](), []
    for path in manifest_files(out):
        try:
            said = read_json(path)
            heads = {str(head["file"]): int(head["sequence"]) for head in said["chains"]}
            found = {name: _known(job, heads) for name, job in said["jobs"].items() if "content" in job}
            bundle = str(said.get("models", {}).get(BUNDLE))
        except (StoreError, AttributeError, KeyError, TypeError, ValueError):  # the audit tells of it
            continue
        known = found | {name: was for name, was in known.items() if name in found and found[name].content == was.content}
        recorded |= known
        if said.get("exit_code") in ENDED_WELL:
            decided_by = str(said.get("fingerprint")), said.get("inputs", {})
            commands.append(Command(str(said.get("command")), decided_by, bundle, heads))
    jobs = _told_jobs(out)
    return History(out, jobs, known, recorded, commands, _worked(out) if jobs else {})


def _known(job: Mapping[str, Any], heads: Mapping[str, int]) -> Known:
    return Known(str(job["fingerprint"]), str(job["content"]), heads, tuple(map(str, job.get("artifacts", {}))))


def _told_jobs(out: Path) -> dict[tuple[str, str], list[Told]]:
    jobs: dict[tuple[str, str], list[Told]] = {}
    for path in sorted(out.glob(PATTERN)):
        for said in told(path, DONE, DROPPED):
            place = path.name, said["sequence"], str(said.get("time"))
            line = Told(str(said.get("receipt")), *place, _slides(said), said["kind"] == DROPPED)
            jobs.setdefault((str(said.get("stage")), str(said.get("group"))), []).append(line)
    for lines in jobs.values():
        lines.sort(key=lambda line: (line.time, line.file, line.sequence))
    return jobs


def _slides(said: Mapping[str, Any]) -> dict[str, tuple[str, str]] | None:
    try:
        return {slide_id: (str(of["fingerprint"]), str(of["content"])) for slide_id, of in said["slides"].items()}
    except (AttributeError, KeyError, TypeError):
        return None


def _worked(out: Path) -> dict[tuple[str, str], str]:
    worked: dict[tuple[str, str], str] = {}
    for path in chain_files(out):
        for said in told(path, "slide_done", "slide_empty"):
            name = str(said.get("stage")), str(said.get("slide_id"))
            worked[name] = max(worked.get(name, ""), str(said.get("time")))
    return worked
