"""``pathfm verify``: hashes again what was made, and says what is not what it was. See ``docs/audit.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pathfm.batch.verified import check_results
from pathfm.chain import PATTERN, chain_files, told
from pathfm.config import fingerprint
from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.exporting import CONTENT, FILES
from pathfm.log import plural, say, track
from pathfm.offline import SUMS, check_carried
from pathfm.run_manifest import manifest_files, receipt_digest
from pathfm.store.commit import content_digest, read_json
from pathfm.store.manifest import file_digest, manifest_of
from pathfm.store.receipts import BY_GROUP, FOLDER, STAGES, Receipt, read_receipt

THREADS = 4
CARD, WEIGHTS, BUNDLE = "card.json", "model.safetensors", "bundle.json"
WEIGHTS_DIGEST = "weights_sha256"
NO_SUMS = f"{CARD} has no hashes of the other files: no export, or one of an earlier version"


@dataclass(frozen=True, eq=False)
class Part:
    """What is checked together: a stage, a bundle, an encoder, the results of a batch.

    Attributes:
        name: for its line.
        wanted: file or folder -> the digest that it had.
        digest: how it is hashed.
        problems: what was wrong before anything was hashed.
        content: digest over all of it; by default over those that are found.
        notes: what is worth a look, and no problem.
    """

    name: str
    wanted: Mapping[Path, str]
    digest: Callable[[Path], str] = content_digest
    problems: tuple[str, ...] = ()
    content: str = ""
    notes: tuple[str, ...] = ()


def verify(folder: Path) -> ExitCode:
    """Hashes again every artifact of a study, a bundle, an encoder's folder or an outbox, and says one line for each part.

    Args:
        folder: of one of these.

    Returns:
        0 when everything is what it was, 3 when something is missing or differs: each is one line.

    Raises:
        UsageError: nothing here has a digest to compare with.
    """
    if not folder.is_dir():
        raise UsageError("there is no such folder", where=str(folder))
    if (folder / SUMS).is_file():
        return check_carried(folder)
    parts = [*_stages(folder), *_recorded(folder), *_bundles(folder), *_encoders(folder), *_results(folder)]
    if not parts:
        fix = "name an output folder with receipts, a bundle, an exported encoder or an outbox"
        raise UsageError("nothing here says what it should be", where=str(folder), fix=fix)
    jobs = [(part, path) for part in parts for path in part.wanted]
    with ThreadPoolExecutor(THREADS) as pool:
        hashed = pool.map(lambda job: _hashed(*job), jobs)
        found = dict(zip(jobs, track(hashed, "verify", len(jobs)), strict=True)) if jobs else {}
    bad = 0
    for part in parts:
        digests = {path: found[part, path] for path in part.wanted}
        problems = [*part.problems, *_differences(part, digests, folder)]
        bad += len(problems)
        found_here = {_name(path, folder): digest for path, digest in digests.items()}
        content = part.content or fingerprint(found_here)
        count, trouble = "all" if part.content else len(digests), f"{plural(len(problems), 'problem')}, " if problems else ""
        say(f"{part.name}: {count} hashed, {trouble}content {content}")
        for line in (*problems, *(f"note: {note}" for note in part.notes)):
            say(f"  {line}")
    say(f"verify: {plural(bad, 'problem') if bad else 'everything is what it was'}")
    return ExitCode.SOME_FAILED if bad else ExitCode.DONE


def _hashed(part: Part, path: Path) -> str:
    """Digest of what is there; empty when nothing is, or it cannot be read."""
    try:
        return part.digest(path) if path.exists() else ""
    except OSError:
        return ""


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _differences(part: Part, digests: Mapping[Path, str], folder: Path) -> Iterator[str]:
    for path, digest in digests.items():
        name = _name(path, folder)
        if not digest:
            yield f"{name}: {'cannot be read' if path.exists() else 'missing'}"
        elif digest != part.wanted[path]:
            yield f"{name}: differs from what was made"


def _stages(out: Path) -> Iterator[Part]:
    """What the receipts of a study name, and whether events and manifests tell of just these receipts."""
    known, told_jobs = _known_jobs(out), _told_jobs(out)
    for stage in STAGES:
        wanted: dict[Path, str] = {}
        problems, notes = list[str](), list[str]()
        paths = sorted((out / FOLDER / stage).glob("*.json"))
        for path in paths:
            try:
                receipt = read_receipt(path)
            except StoreError as error:
                problems.append(f"{FOLDER}/{stage}/{path.name}: {error.what}")
                continue
            if not receipt:
                continue
            wanted |= {out / name: digest for name, digest in receipt.all_artifacts.items()}
            was, name = known.get(f"{stage}/{path.stem}"), f"{FOLDER}/{stage}/{path.name}"
            doubt, is_problem = _doubt(receipt, was, told_jobs) if told_jobs else _doubt_of_old(out, receipt, was)
            if doubt:
                (problems if is_problem else notes).append(f"{name}: {doubt}")
        if paths:
            yield Part(stage, wanted, problems=tuple(problems), notes=tuple(notes))


@dataclass(frozen=True)
class Known:
    """What manifests say of a job.

    Attributes:
        fingerprint: what it depended on.
        content: digest of what it had made.
        heads: how long each file of events was when that was first said.
    """

    fingerprint: str
    content: str
    heads: Mapping[str, int]


def _known_jobs(out: Path) -> dict[str, Known]:
    """The jobs of the last manifest."""
    known: dict[str, Known] = {}
    for path in manifest_files(out):
        try:
            said = read_json(path)
            heads = {str(head["file"]): int(head["sequence"]) for head in said["chains"]}
            jobs = {
                name: (str(job["fingerprint"]), str(job["content"])) for name, job in said["jobs"].items() if "content" in job
            }
        except (StoreError, AttributeError, KeyError, TypeError, ValueError):  # the audit tells of it
            continue
        found = {name: Known(*job, heads) for name, job in jobs.items()}
        known = found | {name: was for name, was in known.items() if name in found and found[name].content == was.content}
    return known


@dataclass(frozen=True)
class Told:
    """What an event tells of a receipt: its hash, and the place of the event."""

    digest: str
    file: str
    sequence: int


def _told_jobs(out: Path) -> dict[tuple[str, str], list[Told]]:
    """Stage and group -> all receipts that jobs have told of. Empty: they are all of versions that told of none."""
    jobs: dict[tuple[str, str], list[Told]] = {}
    for path in sorted(out.glob(PATTERN)):
        for said in told(path, "job_done"):
            line = Told(str(said.get("receipt")), path.name, said["sequence"])
            jobs.setdefault((str(said.get("stage")), str(said.get("group"))), []).append(line)
    return jobs


def _doubt(receipt: Receipt, known: Known | None, told_jobs: Mapping[tuple[str, str], list[Told]]) -> tuple[str, bool]:
    """What is strange about a receipt, and whether that is a problem: one that nobody has told of is."""
    digest, lines = receipt_digest(receipt), told_jobs.get((receipt.stage, receipt.group), [])
    fitting = [line for line in lines if line.digest == digest]
    is_same = known is not None and known.content == receipt.content
    if not fitting and (lines or not is_same):  # a job of an earlier version has only the manifest to tell of it
        return "no event tells of it: altered, or made up", True
    if known is None or is_same:
        return "", False
    other = "of other content than when the last recorded run ended"
    if any(line.sequence > known.heads.get(line.file, 0) for line in fitting):  # that run was killed, or is still going
        return other, False
    return f"{other}, and no event tells of such work since", True


def _doubt_of_old(out: Path, receipt: Receipt, known: Known | None) -> tuple[str, bool]:
    """The same for a study whose jobs have told of no receipt."""
    if known is None or known.content == receipt.content:
        return "", False
    other = "of other content than when the last recorded run ended"
    if _is_explained(out, receipt, known):
        return other, False
    return f"{other}, and nothing has worked on its slides since", True


def _is_explained(out: Path, receipt: Receipt, known: Known) -> bool:
    """Whether a receipt may have come to say something else than the manifests: a run was killed, or is still going.

    Stages that work on slides tell of each: of the same slides and settings, only such work can have made something else.
    """
    if receipt.stage not in BY_GROUP or receipt.fingerprint != known.fingerprint:
        return True
    slides = {slide.slide_id for slide in receipt.slides}
    return any(
        said["sequence"] > known.heads.get(path.relative_to(out).as_posix(), 0)
        for path in chain_files(out)
        for said in told(path, "slide_done", "slide_empty", "slide_failed")
        if said.get("stage") == receipt.stage and said.get("slide_id") in slides
    )


def _recorded(out: Path) -> Iterator[Part]:
    """What manifests of runs name as their outputs, each as the last one that names it."""
    wanted: dict[Path, str] = {}
    problems = []
    for path in manifest_files(out):
        try:
            wanted |= {out / name: str(digest) for name, digest in read_json(path).get("outputs", {}).items()}
        except StoreError as error:
            problems.append(f"runs/{path.name}: {error.what}")
    if wanted or problems:
        yield Part("recorded outputs", wanted, problems=tuple(problems))


def _bundles(folder: Path) -> Iterator[Part]:
    """A bundle checks itself, each file by its hash."""
    for place in (folder, folder / "mil" / "bundle"):
        if not (place / BUNDLE).is_file():
            continue
        from pathfm.mil.bundle import open_bundle

        try:
            yield Part("bundle", {}, content=open_bundle(place).digest)
        except StoreError as error:
            yield Part("bundle", {}, problems=(error.what,))


def _encoders(folder: Path) -> Iterator[Part]:
    """Encoder folders whose card says what belongs to them."""
    places = [folder, *sorted(path.parent for path in folder.glob(f"encoder/*/*/{CARD}"))]
    for place in places:
        if not (place / CARD).is_file():
            continue
        problems, notes = list[str](), list[str]()
        wanted: dict[Path, str] = {}
        try:
            card = read_json(place / CARD)
            wanted = {place / WEIGHTS: str(card[WEIGHTS_DIGEST])} if WEIGHTS_DIGEST in card else {}
            if isinstance(files := card.get(FILES), dict):
                wanted |= {place / name: str(digest) for name, digest in files.items()}
                problems += [] if card.pop(CONTENT, "") == fingerprint(card) else [f"{CARD}: differs from what was made"]
            else:
                manifest_of(place)
                # Receipts of a study look after its own encoders.
                notes += [NO_SUMS] if place == folder else []
        except StoreError as error:
            problems.append(error.what)
        name = "" if place == folder else f" {place.relative_to(folder).as_posix()}"
        yield Part(f"encoder{name}", wanted, file_digest, tuple(problems), notes=tuple(notes))


def _results(folder: Path) -> Iterator[Part]:
    """Results of a batch."""
    if found := check_results(folder):
        yield Part("results", found.wanted, file_digest, found.problems, notes=found.notes)
