"""What a command did, by whom, where, with what and to what: ``runs/<time>-<run>.json`` in the output folder, one per command.

A manifest is written when the command ends, however it ends, unless it is killed: the next one counts the runs that began and
never ended. Manifests are a chain like events are, and each keeps the heads of all chains of events in the folder, so that
lines that are cut off later are missed. Specified in ``docs/audit.md``.
"""

from __future__ import annotations

import datetime
import fcntl
import fnmatch
import getpass
import hashlib
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pathfm.chain import SecretKey, chain_files, key_of_environment, read_end
from pathfm.config import fingerprint
from pathfm.errors import ExitCode, PathfmError, StoreError, UsageError
from pathfm.events import Events, public_text
from pathfm.log import get_log
from pathfm.store.commit import content_digest, disk_errors, sweep, write_json
from pathfm.store.manifest import file_digest
from pathfm.store.receipts import ALL, FOLDER, STAGES, Receipt, read_receipt
from pathfm.store.record import library_versions
from pathfm.study import Study
from pathfm.workers import ProcessName

FORMAT = 1
RUNS = "runs"
PATTERN = "[0-9]*Z-*.json"
"""Names of manifests."""
OPERATOR = "PATHFM_OPERATOR"
"""Environment variable with the name that is written; without it, a hash of the login name is."""
_BLOCK = 1 << 20
_TIME = "%Y%m%dT%H%M%S.%fZ"

log = get_log(__name__)


class RunManifest:
    """The manifest of a command, written when the ``with`` block ends.

    What a study says itself (its settings, tables, receipts, bundle and events) need not be told. A command that
    was refused (``UsageError``) before it did anything leaves none: the folder may be somebody else's.

    Args:
        out: the output folder.
        command: as it is typed (``run``, ``mil predict``).
        study: all settings.
        aside: names of folders in the output folder in which nobody writes events, and which are large.

    Attributes:
        exit_code: how the command ends; set it before the block ends, or raise.
    """

    def __init__(self, out: Path, command: str, study: Study | None = None, aside: Collection[str] = ()) -> None:
        self.exit_code, self._aside = ExitCode.DONE, aside
        self._out, self._key, self._before = out, key_of_environment(), chain_heads(out, aside)
        self._started, self._clock = datetime.datetime.now(datetime.UTC), time.monotonic()
        self._about = {"command": command, "run": secrets.token_hex(4), **_settings(study, out), **_who(self._key)}
        self._digests: dict[str, dict[str, str]] = {"inputs": _tables(study), "models": {}, "outputs": {}}

    def inputs(self, digests: Mapping[str, str]) -> None:
        """Adds what went in: name (a slide_id) -> hash of its content."""
        self._digests["inputs"] |= digests

    def models(self, digests: Mapping[str, str]) -> None:
        """Adds what decided: name (encoder, bundle) -> digest."""
        self._digests["models"] |= digests

    def outputs(self, *paths: Path) -> None:
        """Adds files and folders below the output folder that were made, with their content digests; ``pathfm verify`` asks for
        them."""
        made = {path.relative_to(self._out).as_posix(): content_digest(path) for path in paths}
        self._digests["outputs"] |= made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, UsageError) and chain_heads(self._out, self._aside) == self._before:
            return
        try:
            with disk_errors(self._out / RUNS):
                self._write(error)
        except StoreError as trouble:  # the work is done all the same
            log.warning("this run is not recorded: %s", trouble)

    def _write(self, error: BaseException | None) -> None:
        code, reason = (self.exit_code, "") if error is None else _ending(error)
        self._about |= {"ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")}
        content = {
            "format": FORMAT,
            **self._about,
            "started": self._started.isoformat(timespec="milliseconds"),
            "seconds": round(time.monotonic() - self._clock, 3),
            "exit_code": int(code),
            "reason": public_text(reason, self._out),
            "versions": library_versions(),
            "jobs": _jobs(self._out),
            **self._digests,
            "models": {**_bundle(self._out), **self._digests["models"]},
            "unended_runs": len(unended_runs(self._out, self._aside)),
            "chains": chain_heads(self._out, self._aside),
        }
        with _alone(self._out / RUNS):
            sweep(self._out / RUNS)
            path = write_manifest(self._out, content, self._key)
        with Events(self._out) as events:
            events.write("run_recorded", manifest=path.name, sha256=file_digest(path))
        log.info("this run is recorded: %s, %s", path, file_digest(path))


def recorded(command: str, study: Study, work: Callable[[], ExitCode]) -> ExitCode:
    """Does the work of a command, and leaves its manifest."""
    with RunManifest(study.out, command, study) as manifest:
        manifest.exit_code = work()
    return manifest.exit_code


def manifest_files(out: Path) -> list[Path]:
    """The manifests of an output folder, oldest first."""
    return sorted((out / RUNS).glob(PATTERN))


def manifest_text(content: Mapping[str, Any]) -> str:
    """The one way in which a manifest is written."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_manifest(out: Path, content: Mapping[str, Any], key: SecretKey | None) -> Path:
    """Writes the next manifest of a folder, sealed, and gives its path; names are in the order of the chain.

    Raises:
        StoreError: the drive fails.
    """
    now = datetime.datetime.now(datetime.UTC)
    place: dict[str, Any] = {"sequence": 1, "previous": "", "key": key.id if key else None}
    if path := _last_manifest(out):
        raw = path.read_bytes()
        place |= {"sequence": _sequence(raw) + 1, "previous": hashlib.sha256(raw).hexdigest()}
        last = datetime.datetime.strptime(path.name.partition("-")[0], _TIME).replace(tzinfo=datetime.UTC)
        now = max(now, last + datetime.timedelta(microseconds=1))  # a clock may be set back
    sealed = {**content, **place}
    sealed["mac"] = key.mac("manifest", manifest_text(sealed).encode()) if key else None
    path = out / RUNS / f"{now.strftime(_TIME)}-{content['run']}.json"
    write_json(path, sealed)
    return path


def _last_manifest(out: Path) -> Path | None:
    """The newest one, of as many as a night batch has rounds."""
    with suppress(FileNotFoundError), os.scandir(out / RUNS) as entries:
        if names := fnmatch.filter((entry.name for entry in entries), PATTERN):
            return out / RUNS / max(names)
    return None


def chain_heads(out: Path, aside: Collection[str] = ()) -> list[dict[str, Any]]:
    """The heads of all chains of events below a folder, as they are on the drive: file, sequence, hash, key, mac.

    Args:
        out: the folder.
        aside: names of folders in it that are not looked into.
    """
    heads = []
    for path in chain_files(out, aside):
        with path.open("rb") as file:
            with suppress(OSError):  # some drives do not flush what is only read
                os.fsync(file.fileno())
            heads.append({"file": path.relative_to(out).as_posix(), **read_end(file).head._asdict()})
    return heads


def receipt_digest(receipt: Receipt) -> str:
    """SHA-256 over all that a receipt says: the event of its job has it."""
    return fingerprint(asdict(receipt))


def unended_runs(out: Path, aside: Collection[str] = ()) -> set[str]:
    """Runs whose start is in the events and whose end is not: killed, broken off, or still going.

    Args:
        out: the folder with the events.
        aside: names of folders in it that are not looked into.
    """
    runs: dict[str, set[str]] = {"run_started": set(), "run_ended": set()}
    for path in chain_files(out, aside):
        for line in _lines_with(path, b'"kind": "run_'):
            _note_run(line, runs)
    return runs["run_started"] - runs["run_ended"]


def _lines_with(path: Path, text: bytes) -> Iterator[bytes]:
    """Lines of a file in which a text is; they are searched for in large blocks, since most have it not, and logs grow."""
    with path.open("rb") as file:
        while block := file.read(_BLOCK) + file.readline():
            found = block.find(text)
            while found >= 0:
                end = block.find(b"\n", found) % len(block) + 1  # the last line may have none
                yield block[block.rfind(b"\n", 0, found) + 1 : end]
                found = block.find(text, end)


def _note_run(line: bytes, runs: Mapping[str, set[str]]) -> None:
    with suppress(ValueError, KeyError, TypeError):  # a torn line
        said = json.loads(line)
        runs[said["kind"]].add(str(said["run"]))


def _sequence(raw: bytes) -> int:
    """The number of a manifest; 0 for one that was destroyed, which the audit tells."""
    with suppress(ValueError, KeyError, TypeError):
        return int(json.loads(raw)["sequence"])
    return 0


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two commands that end at the same time must not follow the same manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a drive without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _ending(error: BaseException) -> tuple[int, str]:
    if isinstance(error, PathfmError):
        return error.exit_code, error.reason
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED, "interrupted"
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code, ""
    return ExitCode.INTERNAL, f"internal error: {type(error).__name__}"


def _who(key: SecretKey | None) -> dict[str, str]:
    """Operator and machine. The login name is hashed, with the key where there is one: without it, names can be tried out."""
    here, operator = ProcessName.here(), os.environ.get(OPERATOR, "")
    if not operator:
        try:
            login = getpass.getuser()
        except (KeyError, OSError, ImportError):  # a user number without a name, as in containers
            login = str(os.getuid())
        hashed = key.mac("operator", login.encode()) if key else hashlib.sha256(f"operator\0{login}".encode()).hexdigest()
        operator = f"login {hashed[:16]}"
    return {"operator": operator, "host": here.host, "machine": here.machine, "platform": platform.platform()}


def _settings(study: Study | None, out: Path) -> dict[str, Any]:
    """All settings, without machine paths, and the fingerprint of those that can change a result."""
    if study is None:
        return {"settings": {}, "fingerprint": ""}
    plain = study.model_dump(mode="json")
    if study.cohort.pseudonym_key:  # file names of slides may name patients
        plain["cohort"]["slides"] = [f"{len(study.cohort.slides)} sources"]
    settings = {**_public(plain, out), "out": "."}
    return {"settings": settings, "fingerprint": fingerprint({**settings, "compute": None})}


def _public(value: Any, out: Path) -> Any:  # noqa: ANN401 - whatever JSON has
    if isinstance(value, dict):
        return {key: _public(item, out) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item, out) for item in value]
    return public_text(value, out) if isinstance(value, str) else value


def _tables(study: Study | None) -> dict[str, str]:
    """The tables of the cohort, as they are when the command starts."""
    if study is None:
        return {}
    cohort = study.cohort
    tables = {"cohort.table": cohort.table, "cohort.clinical": cohort.clinical, "cohort.tile_labels": cohort.tile_labels}
    return {name: file_digest(path) for name, path in tables.items() if path and path.is_file()}


def _jobs(out: Path) -> dict[str, dict[str, Any]]:
    """What every receipt says: fingerprint, inputs, digest of what was made, and how many slides failed."""
    jobs = {}
    for stage in STAGES:
        for path in sorted((out / FOLDER / stage).glob("*.json")):
            try:
                receipt = read_receipt(path)
            except StoreError as error:
                jobs[f"{stage}/{path.stem}"] = {"reason": error.what}
                continue
            if receipt:
                jobs[f"{stage}/{path.stem}"] = _job(receipt)
    return jobs


def _job(receipt: Receipt) -> dict[str, Any]:
    made = {} if receipt.group != ALL else {"artifacts": dict(receipt.artifacts)}
    about = {"fingerprint": receipt.fingerprint, "inputs": dict(receipt.inputs), "content": receipt.content}
    return {**about, **made, "slides": len(receipt.slides), "failed": len(receipt.failed)}


def _bundle(out: Path) -> dict[str, str]:
    file = out / "mil" / "bundle" / "bundle.json"
    return {"mil/bundle": file_digest(file)} if file.is_file() else {}
