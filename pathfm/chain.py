"""Lines that prove each other: each carries the hash of the one before it and, with a key, a MAC that nobody else can make.

A sealed line is a JSON object that ends with ``"sequence"`` (from 1), ``"previous"`` (SHA-256 of the bytes of the line before,
empty for the first), ``"key"`` (which key, null for none) and ``"mac"`` (HMAC-SHA256 over all bytes before it). What is proved
by that, and what is not, is said in ``docs/audit.md``.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pathfm.errors import UsageError
from pathfm.log import get_log
from pathfm.workers import ProcessName

KEY_FILE = "PATHFM_AUDIT_KEY"
"""Environment variable that names the file with the key."""
LEAST_KEY_BYTES = 32
PATTERN = "events-*.jsonl"
"""Names of files of sealed lines."""
ID_FILE, ID = ".chain-id", "folder_id"
"""File with the id of a folder of such files, and the field of a line that has it."""

_SEALED = re.compile(rb'(\{.*), "mac": (?:"([0-9a-f]{64})"|null)\}', re.DOTALL)
_FOLDER_ID = re.compile("[0-9a-f]{16}")
_BLOCK = 1 << 16

log = get_log(__name__)


@dataclass(frozen=True)
class SecretKey:
    """A key, and the name by which lines say that they were made with it (it tells nothing of the key)."""

    id: str
    secret: bytes = field(repr=False)

    def mac(self, purpose: str, content: bytes) -> str:
        """HMAC-SHA256 (hex) of a content; one made for another purpose is another one."""
        return hmac.digest(self.secret, purpose.encode() + b"\0" + content, "sha256").hex()

    def is_mac(self, mac: str | None, purpose: str, content: bytes) -> bool:
        """Whether a MAC was made with this key."""
        return mac is not None and hmac.compare_digest(mac, self.mac(purpose, content))


def read_key(path: Path) -> SecretKey:
    """The key of a file: its bytes, without white space around them.

    Raises:
        UsageError: it cannot be read, or is shorter than 32 bytes.
    """
    try:
        secret, mode = path.read_bytes().strip(), path.stat().st_mode
    except OSError as error:
        raise UsageError(f"the key cannot be read: {error.strerror}", where=str(path), fix="check the path") from None
    if len(secret) < LEAST_KEY_BYTES:
        fix = "make one with `pathfm audit --new-key FILE`"
        raise UsageError(f"a key of {len(secret)} bytes, and {LEAST_KEY_BYTES} are needed", where=str(path), fix=fix)
    if mode & 0o077:
        log.warning("%s: other users can reach this key: chmod 600", path)
    return SecretKey(hmac.digest(secret, b"name of the key", "sha256").hex()[:16], secret)


def key_of_environment() -> SecretKey | None:
    """The key that ``PATHFM_AUDIT_KEY`` names; None when it names none.

    Raises:
        UsageError: it names a file without a key.
    """
    named = os.environ.get(KEY_FILE)
    return read_key(Path(named)) if named else None


def new_key(path: Path) -> SecretKey:
    """Makes a key of 256 random bits, in a file that only its owner can read.

    Raises:
        UsageError: the file is there already, or cannot be written.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        fix = "name another file: whatever was made with the old key is checked with the old key"
        raise UsageError("this file is there already", where=str(path), fix=fix) from None
    except OSError as error:
        raise UsageError(f"the key cannot be written: {error.strerror}", where=str(path)) from None
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32) + "\n")
    return read_key(path)


class Head(NamedTuple):
    """Where a chain has got to: its last line's number, SHA-256, key (None: hashed only) and MAC; sequence 0: none yet."""

    sequence: int = 0
    hash: str = ""
    key: str | None = None
    mac: str | None = None


class Sealed(NamedTuple):
    """A line that was read: what it says, the bytes its MAC is over, and the head that a chain has with it."""

    said: Mapping[str, Any]
    body: bytes
    head: Head

    @property
    def previous(self) -> str:
        """Hash of the line before it, as it says."""
        return str(self.said["previous"])


def seal(content: Mapping[str, object], last: Head, key: SecretKey | None) -> tuple[bytes, Head]:
    """The line (without its end) that says ``content`` after the line ``last``, and the head of the chain with it.

    Raises:
        ValueError: a number that JSON does not have.
        TypeError: a value that JSON does not have.
    """
    place = {"sequence": last.sequence + 1, "previous": last.hash, "key": key.id if key else None}
    text = json.dumps({**content, **place}, ensure_ascii=False, allow_nan=False)
    body = text.encode(errors="backslashreplace")  # file names that are no text; JSON reads the escapes back
    mac = key.mac("event", body) if key else None
    line = body[:-1] + f', "mac": {json.dumps(mac)}}}'.encode()
    return line, Head(last.sequence + 1, hashlib.sha256(line).hexdigest(), place["key"], mac)  # type: ignore[arg-type]


def parse_sealed(line: bytes) -> Sealed | None:
    """A line (without its end) as it is, unchecked; None when it is no sealed line."""
    found = _SEALED.fullmatch(line)
    if not found:
        return None
    body = found[1] + b"}"
    try:
        said = json.loads(body)
        sequence, previous, key = said["sequence"], said["previous"], said["key"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    mac = found[2].decode() if found[2] else None
    fits = type(sequence) is int and sequence > 0 and isinstance(previous, str) and isinstance(key, (str, type(None)))
    if not fits or (key is None) != (mac is None):
        return None
    return Sealed(said, body, Head(sequence, hashlib.sha256(line).hexdigest(), key, mac))


class End(NamedTuple):
    """The end of a file of lines: its last sealed line, what lies behind that (line end included), and its folder's id."""

    head: Head
    behind: bytes
    folder_id: str = ""


def read_end(file: BinaryIO) -> End:
    """Looks from the end of a file for the last sealed line; that is the last one, but after a kill or in old files."""
    size = reach = file.seek(0, os.SEEK_END)
    reach = min(size, _BLOCK)
    while True:
        file.seek(size - reach)
        data = file.read(reach)
        lines, end = data.split(b"\n"), len(data)
        for line in reversed(lines if reach == size else lines[1:]):  # the first one may be a part of a line
            sealed = parse_sealed(line)
            if sealed:
                return End(sealed.head, data[end:], str(sealed.said.get(ID, "")))
            end -= len(line) + 1
        if reach == size:
            return End(Head(), data)
        reach = min(size, reach * 8)


def told(path: Path, *kinds: str) -> Iterator[Mapping[str, Any]]:
    """The sealed lines of these kinds in a file of events; whether they are sound, the audit says."""
    with path.open("rb") as file:
        for line in file:
            sealed = parse_sealed(line.removesuffix(b"\n")) if any(kind.encode() in line for kind in kinds) else None
            if sealed and sealed.said.get("kind") in kinds:
                yield sealed.said


def folder_id(folder: Path) -> str:
    """The id that all lines in a folder carry: 16 random digits, made with the first of them, the same for all who write there.

    Empty where the drive cannot give it to all writers at once (it has no hard links, or is full).
    """
    file = folder / ID_FILE
    try:
        if not file.is_file():
            _make_id(file, _told_id(folder) or secrets.token_hex(8))
        return read_id(folder) or _told_id(folder)
    except OSError:
        return ""


def read_id(folder: Path) -> str:
    """What the file with the id of a folder says; empty where there is none.

    Raises:
        OSError: the file cannot be read.
    """
    file = folder / ID_FILE
    said = file.read_bytes().decode(errors="replace").strip() if file.is_file() else ""
    return said if _FOLDER_ID.fullmatch(said) else ""


def _make_id(file: Path, new: str) -> None:
    """Whole at once, and never over one that another process has just made."""
    temporary = file.with_name(f"{ID_FILE}-{secrets.token_hex(4)}.{ProcessName.here()}.partial")  # swept if this is killed
    try:
        with temporary.open("w", encoding="ascii") as stream:
            stream.write(new + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        with suppress(FileExistsError):
            file.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)


def _told_id(folder: Path) -> str:
    """The id that the lines of a folder carry whose file was lost, as in a copy without hidden files."""
    for path in sorted(folder.glob(PATTERN)):
        with path.open("rb") as file:
            if _FOLDER_ID.fullmatch(told := read_end(file).folder_id):
                return told
    return ""


def chain_files(folder: Path, aside: Collection[str] = ()) -> Iterator[Path]:
    """All files of sealed lines below a folder, in order; stores and hidden folders are not looked into.

    Args:
        folder: searched.
        aside: names of folders directly in it that are not looked into either.
    """
    skipped = aside
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not name.endswith(".zarr"))
        folders[:], skipped = [name for name in folders if name not in skipped], ()
        yield from (Path(place, name) for name in sorted(fnmatch.filter(files, PATTERN)))
