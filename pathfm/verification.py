"""``pathfm verify``: hashes again what was made, and says what is not what it was. See ``docs/audit.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pathfm.chain import chain_files, parse_sealed
from pathfm.config import fingerprint
from pathfm.errors import ExitCode, StoreError, UsageError
from pathfm.log import say, track
from pathfm.offline import SUMS, check_carried
from pathfm.run_manifest import manifest_files
from pathfm.store.commit import content_digest, read_json
from pathfm.store.manifest import file_digest, manifest_of
from pathfm.store.receipts import FOLDER, STAGES, read_receipt

THREADS = 4
RESULT, RESULTS = "result.json", "results"
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
        count, trouble = "all" if part.content else len(digests), f"{len(problems)} problems, " if problems else ""
        say(f"{part.name}: {count} hashed, {trouble}content {content}")
        for line in (*problems, *(f"note: {note}" for note in part.notes)):
            say(f"  {line}")
    say(f"verify: {f'{bad} problems' if bad else 'everything is what it was'}")
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
    """What the receipts of a study name; those that have changed since the last recorded run are noted."""
    recorded = _jobs(out)
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
            if recorded.get(f"{stage}/{path.stem}", receipt.content) != receipt.content:
                notes.append(f"{FOLDER}/{stage}/{path.name}: of other content than when the last recorded run ended")
        if paths:
            yield Part(stage, wanted, problems=tuple(problems), notes=tuple(notes))


def _jobs(out: Path) -> dict[str, str]:
    """Job -> content of its receipt, as the last manifest has it."""
    try:
        jobs = read_json(manifest_files(out)[-1]).get("jobs", {})
        return {name: str(job["content"]) for name, job in jobs.items() if "content" in job}
    except (IndexError, StoreError, AttributeError, TypeError):  # none, or one that the audit tells of
        return {}


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


def _results(outbox: Path) -> Iterator[Part]:
    """Results of a batch: the files that each names, and itself as the events tell of it."""
    paths = sorted(outbox.glob(f"{RESULTS}/*/{RESULT}"))
    if not paths:
        return
    wanted: dict[Path, str] = {}
    problems = []
    written = set(_written(outbox))
    for path in paths:
        name = path.relative_to(outbox).as_posix()
        try:
            files = read_json(path)["files"].items()
            wanted |= {path.parent / file: str(digest) for file, digest in files}
        except (StoreError, KeyError, AttributeError):
            problems.append(f"{name}: not a result as it was written")
            continue
        if written and file_digest(path) not in written:
            problems.append(f"{name}: differs from what the events tell of")
    problems += _strangers(paths, wanted, outbox)
    yield Part(RESULTS, wanted, file_digest, tuple(problems))


def _written(outbox: Path) -> Iterator[str]:
    """Hashes of results that the events of an outbox tell of."""
    for path in chain_files(outbox):
        with path.open("rb") as file:
            lines = (parse_sealed(line.removesuffix(b"\n")) for line in file if b'"result_written"' in line)
            yield from (str(sealed.said.get("result")) for sealed in lines if sealed)


def _strangers(paths: Sequence[Path], wanted: Mapping[Path, str], outbox: Path) -> list[str]:
    """Files in the folders of results that nobody has written there."""
    files = sorted(file for path in paths for file in path.parent.rglob("*") if file.is_file() and file != path)
    return [f"{file.relative_to(outbox).as_posix()}: does not belong there" for file in files if file not in wanted]
