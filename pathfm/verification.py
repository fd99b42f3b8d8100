"""``pathfm verify``: hashes again what was made, and says what is not what it was. See ``docs/audit.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pathfm.batch.verified import check_results
from pathfm.config import fingerprint
from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.exporting import CONTENT, FILES
from pathfm.job_history import BUNDLE as BUNDLED
from pathfm.job_history import TRAIN, History, read_history
from pathfm.log import plural, say, track
from pathfm.offline import SUMS, check_carried
from pathfm.run_manifest import manifest_files
from pathfm.store.commit import content_digest, read_json
from pathfm.store.manifest import file_digest, manifest_of
from pathfm.store.receipts import FOLDER, STAGES, Receipt, SlideReceipt, read_receipt
from pathfm.store.tile_store import open_tiles

THREADS = 4
CARD, WEIGHTS, BUNDLE = "card.json", "model.safetensors", "bundle.json"
WEIGHTS_DIGEST = "weights_sha256"
OF_TRAINING = ("mil", "report")
"""Stages whose work `pathfm mil train` does too."""
ALTERED = "a job told of other content than the one before it, and nothing was made of it in between; delete it to make it anew"
MADE_AGAIN = "made again since by {}; whether it was altered after that nobody can tell until `pathfm run` has hashed it"
TRAINED_AGAIN = MADE_AGAIN.format(f"`pathfm {TRAIN}`")
BUNDLED_AGAIN = f"made again since by `pathfm {TRAIN}`, and of the bundle in the manifest of that"
SHOWN = 5
"""Artifacts that a note names."""
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
        explained: files and folders that may have another digest by now -> why; that is a note.
    """

    name: str
    wanted: Mapping[Path, str]
    digest: Callable[[Path], str] = content_digest
    problems: tuple[str, ...] = ()
    content: str = ""
    notes: tuple[str, ...] = ()
    explained: Mapping[Path, str] = field(default_factory=dict)


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
        differences = dict(_differences(part, digests, folder))
        problems = [*part.problems, *(line for path, line in differences.items() if path not in part.explained)]
        notes = [*part.notes, *_explanations(part, differences, folder)]
        bad += len(problems)
        found_here = {_name(path, folder): digest for path, digest in digests.items()}
        content = part.content or fingerprint(found_here)
        count, trouble = "all" if part.content else len(digests), f"{plural(len(problems), 'problem')}, " if problems else ""
        say(f"{part.name}: {count} hashed, {trouble}content {content}")
        for line in (*problems, *(f"note: {note}" for note in notes)):
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


def _differences(part: Part, digests: Mapping[Path, str], folder: Path) -> Iterator[tuple[Path, str]]:
    for path, digest in digests.items():
        name = _name(path, folder)
        if not digest:
            yield path, f"{name}: {'cannot be read' if path.exists() else 'missing'}"
        elif digest != part.wanted[path]:
            yield path, f"{name}: differs from what was made"


def _explanations(part: Part, different: Iterable[Path], folder: Path) -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for path in different:
        if path in part.explained:
            names.setdefault(part.explained[path], []).append(_name(path, folder))
    for why, found in names.items():
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        yield f"{', '.join(found[:SHOWN])}{more}: {why}"


def _stages(out: Path) -> Iterator[Part]:
    """What the receipts of a study name, and whether events and manifests tell of just these receipts."""
    history = read_history(out)
    for stage in STAGES:
        wanted, explained = dict[Path, str](), dict[Path, str]()
        problems, notes = list[str](), list[str]()
        paths = sorted((out / FOLDER / stage).glob("*.json"))
        for path in paths:
            name = f"{FOLDER}/{stage}/{path.name}"
            try:
                receipt = read_receipt(path)
            except StoreError as error:
                problems.append(f"{name}: {error.what}")
                continue
            if not receipt:
                continue
            wanted |= {out / name: digest for name, digest in receipt.all_artifacts.items()}
            explained |= {out / name: why for name, why in _made_again(out, receipt, history)}
            doubt, is_problem = history.doubt(receipt)
            if doubt:
                (problems if is_problem else notes).append(f"{name}: {doubt}")
        for group, doubt, is_problem in history.missing(stage, {path.stem for path in paths}):
            (problems if is_problem else notes).append(f"{FOLDER}/{stage}/{group}.json: {doubt}")
        problems += [f"{slide_id}: {ALTERED}" for slide_id in history.altered(stage)]
        if paths or problems or notes:
            yield Part(stage, wanted, problems=tuple(problems), notes=tuple(notes), explained=explained)


def _made_again(out: Path, receipt: Receipt, history: History) -> Iterator[tuple[str, str]]:
    """Artifacts that later work has made anew, and which: what a receipt says of them does not hold any more.

    Work on the same gives the same: tiles that still have the fingerprint of the receipt must be those of the receipt.
    """
    for slide in receipt.slides:
        if history.made_again(receipt, slide.slide_id):
            others = [name for name in slide.artifacts if _is_another(out / name, receipt.stage, slide)]
            yield from ((name, MADE_AGAIN.format(f"the stage {receipt.stage}")) for name in others)
    trained = history.trained_again(receipt) if receipt.stage in OF_TRAINING else None
    if not trained:
        return
    # It has the hashes of all files of the bundle.
    bundle = out / BUNDLED / BUNDLE
    is_known = bundle.is_file() and file_digest(bundle) == trained.bundle
    for name in receipt.artifacts:
        if not name.startswith(f"{BUNDLED}/"):
            yield name, TRAINED_AGAIN
        elif is_known:
            yield name, BUNDLED_AGAIN


def _is_another(path: Path, stage: str, slide: SlideReceipt) -> bool:
    if stage != "tile":
        return path.exists()
    try:
        return open_tiles(path).fingerprint != slide.fingerprint
    except StoreError:
        return False


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
