"""``pathfm verify``: hashes again what was made, and says what is not what it was. See ``docs/audit.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pathfm.batch.verified import check_results
from pathfm.chain import chain_files, told
from pathfm.config import fingerprint
from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.log import plural, say, track
from pathfm.offline import SUMS, check_carried
from pathfm.run_manifest import manifest_files
from pathfm.store.commit import content_digest, read_json
from pathfm.store.manifest import file_digest, manifest_of
from pathfm.store.receipts import BY_GROUP, FOLDER, STAGES, Receipt, read_receipt

THREADS = 4
CARD, WEIGHTS, BUNDLE = "card.json", "model.safetensors", "bundle.json"
WEIGHTS_DIGEST = "weights_sha256"


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
    """What the receipts of a study name, and whether they have changed since the last recorded run."""
    known = _known_jobs(out)
    for stage in STAGES:
        wanted: dict[Path, str] = {}
        problems, notes = [], []
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
            was = known.get(f"{stage}/{path.stem}")
            if not was or was.content == receipt.content:
                continue
            what = f"{FOLDER}/{stage}/{path.name}: of other content than when the last recorded run ended"
            is_note = _is_explained(out, receipt, was)
            notes += [what] if is_note else []
            problems += [] if is_note else [f"{what}, and nothing has worked on its slides since"]
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
        problems: list[str] = []
        wanted: dict[Path, str] = {}
        try:
            manifest_of(place)
            stated = read_json(place / CARD).get(WEIGHTS_DIGEST)
            wanted = {place / WEIGHTS: str(stated)} if stated else {}
        except StoreError as error:
            problems.append(error.what)
        name = "" if place == folder else f" {place.relative_to(folder).as_posix()}"
        yield Part(f"encoder{name}", wanted, file_digest, tuple(problems))


def _results(folder: Path) -> Iterator[Part]:
    """Results of a batch."""
    if found := check_results(folder):
        yield Part("results", found.wanted, file_digest, found.problems, notes=found.notes)
