"""Slides on servers: ranges over the network, checked, retried, joined and fetched side by side."""

from __future__ import annotations

import io
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

from pathfm.addresses import public_name
from pathfm.errors import MissingExtraError
from pathfm.slides.source import ByteRange, ByteSource, LostSourceError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from fsspec import AbstractFileSystem

BACKOFF_S = (0.5, 1.0, 2.0)
"""Waits before the second, third and last attempt [s]."""
TIMEOUT_S = 60.0
"""Longest time for one request [s]."""
RECHECK_S = 10.0
"""How often a store whose answers carry no version is asked whether the file has changed [s]."""
JOIN_GAP_BYTES = 64 * 1024
"""Ranges this close together become one request."""
MAX_REQUEST_BYTES = 8 * 2**20
"""Ranges are joined up to this size."""
PARALLEL = 8
"""Requests under way at once, per slide."""
BLOCK_BYTES, MAX_BLOCKS = 2**20, 32
"""Directories are parsed from blocks of this size, and so many are kept; the file's first one comes with its opening."""
TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP answers that are worth another attempt."""
FOREIGN_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)
"""Errors of the libraries under fsspec that are not OSErrors."""


class _Part(NamedTuple):
    """An answer: bytes, and the size and version of the file they belong to (no version: empty text)."""

    data: bytes
    size: int
    version: str


class _Transport(Protocol):
    """One request. Raises ``_TemporaryError``, ``_FinalError``, OSError or a library's error; retries are made above."""

    def get(self, offset: int, length: int) -> _Part: ...


class _TemporaryError(Exception):
    """What went wrong may go right the next time."""


class _FinalError(Exception):
    """What went wrong will go wrong again; the second argument is what to do about it."""


class RemoteSource(ByteSource):
    """A file on a server.

    Args:
        url: its address.

    Raises:
        UnreadableSlideError: the file is absent, the server cannot be reached or does not answer range requests.
        MissingExtraError: the library for such addresses is not installed.
    """

    is_remote = True

    def __init__(self, url: str) -> None:
        self.name = public_name(url)
        self._lost: LostSourceError | None = None
        self._transport: _Transport = _transport(url)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._head, self.size, self._version = self._request(0, BLOCK_BYTES)

    def read_at(self, offset: int, length: int) -> bytes:
        """See ``ByteSource.read_at``."""
        self.within(offset, length)
        if offset + length <= len(self._head):
            return self._head[offset : offset + length]
        part = self._request(offset, length) if length else _Part(b"", self.size, self._version)
        if (part.size, part.version) != (self.size, self._version):
            raise LostSourceError("the file has changed on the server since it was opened", where=self.name, fix="run again")
        return part.data

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See ``ByteSource.read_many``."""
        wanted = [self.within(*each) for each in ranges]
        spans = joined(wanted)
        found: list[bytes] = [b""] * len(wanted)
        for (span, members), data in zip(spans, self._fetch([span for span, _ in spans]), strict=True):
            for index in members:
                start = wanted[index].offset - span.offset
                found[index] = data[start : start + wanted[index].length]
        return found

    def open_file(self) -> BinaryIO:
        """See ``ByteSource.open_file``."""
        return io.BufferedReader(_BlockFile(self))

    def close(self) -> None:
        """See ``ByteSource.close``."""
        if self._pool is not None:
            self._pool.shutdown()

    def _fetch(self, spans: Sequence[ByteRange]) -> list[bytes]:
        if len(spans) < 2:
            return [self.read_at(*span) for span in spans]
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(PARALLEL)
        return list(self._pool.map(lambda span: self.read_at(*span), spans))

    def lost(self, what: str, fix: str = "get a new copy of the file, or leave the slide out") -> LostSourceError:
        """The error of a server that fails. It holds for all that follows: a slide is read whole or not at all."""
        self._lost = LostSourceError(what, where=self.name, fix=fix)
        return self._lost

    def _request(self, offset: int, length: int) -> _Part:
        """One range, with retries. Foreign errors end here: their texts may quote the whole address."""
        if self._lost:
            raise self._lost
        reason = ""
        for wait in (0.0, *BACKOFF_S):
            time.sleep(wait)
            try:
                return self._transport.get(offset, length)
            except _FinalError as error:
                raise self.lost(*error.args) from None
            except _TemporaryError as error:
                reason = str(error)
            except FileNotFoundError:
                raise self.lost("there is no such file", "check the address") from None
            except PermissionError:
                raise self.lost("the server refuses access", "check the address and its credentials") from None
            except _network_errors() as error:
                slow = isinstance(error, TimeoutError)
                reason = f"no answer within {TIMEOUT_S:g} s" if slow else f"the connection failed ({type(error).__name__})"
        raise self.lost(f"{reason}, {len(BACKOFF_S) + 1} times", "check the address and the network, then run again")


def joined(ranges: Sequence[ByteRange]) -> list[tuple[ByteRange, list[int]]]:
    """Neighbouring ranges as one, each with the numbers of the ranges it holds."""
    spans: list[tuple[ByteRange, list[int]]] = []
    for index in sorted(range(len(ranges)), key=lambda index: ranges[index]):
        each = ranges[index]
        if spans:
            last, members = spans[-1]
            together = ByteRange(last.offset, max(last.end, each.end) - last.offset)
            if each.offset - last.end <= JOIN_GAP_BYTES and together.length <= MAX_REQUEST_BYTES:
                spans[-1] = (together, [*members, index])
                continue
        spans.append((each, [index]))
    return spans


class _BlockFile(io.RawIOBase):
    """A source as a file: whole blocks are fetched and kept, so that jumping about in directories costs few requests."""

    def __init__(self, source: ByteSource) -> None:
        self._source, self._position = source, 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}[whence]
        if base + offset < 0:
            raise ValueError("a place before the start of the file")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        number, start = divmod(self._position, BLOCK_BYTES)
        data = self._block(number)[start : start + len(view)]
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            offset = number * BLOCK_BYTES
            length = min(BLOCK_BYTES, self._source.size - offset)
            self._blocks[number] = self._source.read_at(offset, length) if length > 0 else b""
            while len(self._blocks) > MAX_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]


def _transport(url: str) -> _Transport:
    scheme = url.partition(":")[0].lower()
    try:
        import fsspec

        return _Http(url) if scheme in {"http", "https"} else _Store(*fsspec.core.url_to_fs(url))
    except ImportError:
        advice = {} if scheme in {"http", "https"} else {"fix": f"pip install 'fsspec[{scheme}]'"}
        raise MissingExtraError(f"{scheme}:// addresses need another library", extra="remote", **advice) from None


class _Http:
    """Range requests through the HTTP session that fsspec keeps for all slides."""

    def __init__(self, url: str) -> None:
        import aiohttp
        import fsspec

        # An address with percent signs is quoted already, and signatures only hold for it as it is. Proxies of the environment
        # are the only way out of many hospitals.
        self._system = fsspec.filesystem("http", encoded="%" in url, client_kwargs={"trust_env": True})
        self._url = url
        self._limit = aiohttp.ClientTimeout(total=TIMEOUT_S)

    def get(self, offset: int, length: int) -> _Part:
        """See ``_Transport``."""
        from fsspec.asyn import sync

        status, headers, data = sync(self._system.loop, self._ask, offset, length, timeout=2 * TIMEOUT_S)
        if status != 206:
            raise _refused(status)
        place = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", "").strip())
        if not place or int(place.group(1)) != offset:
            raise _FinalError("the server sends another range than it was asked for", "download the slide first")
        size = int(place.group(3))
        if len(data) != min(length, size - offset):
            raise _TemporaryError("the server sends fewer or more bytes than it was asked for")
        return _Part(data, size, headers.get("ETag") or headers.get("Last-Modified") or "")

    async def _ask(self, offset: int, length: int) -> tuple[int, Mapping[str, str], bytes]:
        session = await self._system.set_session()
        headers = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        async with session.get(self._system.encode_url(self._url), headers=headers, timeout=self._limit) as answer:
            # The body of a server that ignores the range is the whole slide: it is not waited for.
            data = await answer.read() if answer.status == 206 else b""
            return answer.status, answer.headers.copy(), data


def _refused(status: int) -> Exception:
    """The error for an answer that holds no range."""
    if status in TEMPORARY:
        return _TemporaryError(f"the server answers HTTP {status}")
    if status == 200:
        return _FinalError("the server sends whole files only, no ranges of them", "download the slide first")
    if status in {401, 403}:
        return _FinalError(f"the server refuses access (HTTP {status})", "check the address and its credentials")
    if status in {404, 410}:
        return _FinalError("there is no such file", "check the address")
    if status == 416:
        return _FinalError("the file is empty, or has become shorter since it was opened")
    return _FinalError(f"the server answers HTTP {status}", "check the address")


class _Store:
    """Ranges through a file system of fsspec."""

    def __init__(self, system: AbstractFileSystem, path: str) -> None:
        self._system, self._path = system, path
        self._size, self._version, self._checked = 0, "", float("-inf")

    def get(self, offset: int, length: int) -> _Part:
        """See ``_Transport``."""
        if time.monotonic() - self._checked > RECHECK_S:
            self._look()
        if not self._size:
            raise _FinalError("the file is empty")
        end = min(self._size, offset + length)
        data: bytes = self._system.cat_file(self._path, start=offset, end=end)
        if len(data) != end - offset:
            self._look()
            raise _TemporaryError("the server sends fewer or more bytes than it was asked for")
        return _Part(data, self._size, self._version)

    def _look(self) -> None:
        self._system.invalidate_cache()
        facts = self._system.info(self._path)
        if facts.get("size") is None:
            raise _FinalError("the server does not tell the size of the file", "download the slide first")
        named = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "mtime", "created")
        self._size = int(facts["size"])
        self._version = next((str(facts[name]) for name in named if facts.get(name)), "")
        self._checked = time.monotonic()


def _network_errors() -> tuple[type[BaseException], ...]:
    """What requests raise; only libraries that are loaded can."""
    loaded = [(sys.modules.get(module), name) for module, name in FOREIGN_ERRORS]
    return (OSError, TimeoutError, *(getattr(module, name) for module, name in loaded if module))
