"""The bytes of a slide by range, from a local file or from a server, and who the slide is by its bytes.

Remote slides go through fsspec: http and https by requests of our own, so that every answer can be checked, other stores (s3,
gs, ...) by its file systems. User names, passwords and signed queries of an address never get into a message or a name.
"""

from __future__ import annotations

import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

from pathfm.addresses import is_remote, remote_url
from pathfm.errors import UnreadableSlideError

SAMPLE_BYTES, SAMPLE_BLOCKS = 4096, 64
"""A file's identity rests on its size, this many evenly spaced blocks, and a head and a tail as large as all of them."""


class LostSourceError(UnreadableSlideError):
    """A file cannot be reached any more: that says nothing of its pixels, so the whole slide fails and no tile is left out."""


class ByteRange(NamedTuple):
    """A run of bytes of a file."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.length


class ByteSource(ABC):
    """A file's bytes by range. May be read from several threads at once.

    Attributes:
        name: what to call it in messages: a path, or an address without its secrets.
        size: of the file [bytes].
        is_remote: every read costs a round trip, so ``read_many`` is worth while.
    """

    name: str
    size: int
    is_remote = False

    @abstractmethod
    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly the bytes asked for.

        Raises:
            UnreadableSlideError: the file ends too early, has changed since it was opened, or cannot be read.
        """

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of several (offset, length), in their order; a remote source joins neighbours and fetches side by side.

        Raises:
            UnreadableSlideError: see ``read_at``.
        """
        return [self.read_at(offset, length) for offset, length in ranges]

    @abstractmethod
    def open_file(self) -> BinaryIO:
        """A new seekable file object over the same bytes, for directories to be parsed from; it is closed by itself."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file. Closing twice is allowed."""

    def within(self, offset: int, length: int) -> ByteRange:
        """The range, if the file has it.

        Raises:
            UnreadableSlideError: the file ends too early.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise self.unreadable("the file ends too early")
        return ByteRange(offset, length)

    def unreadable(self, what: str, fix: str = "get a new copy of the file, or leave the slide out") -> UnreadableSlideError:
        """The error of a source that cannot be used."""
        return UnreadableSlideError(what, where=self.name, fix=fix)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class LocalSource(ByteSource):
    """A file of this machine, or of a drive it has mounted.

    Raises:
        UnreadableSlideError: the file is absent or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path
        self._lock = threading.Lock()
        self._file = self._open()
        self.size = os.fstat(self._file.fileno()).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """See ``ByteSource.read_at``."""
        self.within(offset, length)
        try:
            data = self._read(offset, length)
            while len(data) < length and (more := self._read(offset + len(data), length - len(data))):
                data += more
        except OSError as error:
            raise self._failed(error) from error
        if len(data) < length:
            raise self.unreadable("the file ends too early")
        return data

    def open_file(self) -> BinaryIO:
        """See ``ByteSource.open_file``."""
        return self._open()

    def close(self) -> None:
        """See ``ByteSource.close``."""
        self._file.close()

    def _open(self) -> BinaryIO:
        try:
            return self._path.open("rb")
        except FileNotFoundError:
            raise self.unreadable("there is no such file", "check the path") from None
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> UnreadableSlideError:
        return self.unreadable(f"the file cannot be read: {error.strerror}", "check its permissions and its drive")

    def _read(self, offset: int, length: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), length, offset)
        with self._lock:  # Windows has no positioned read
            self._file.seek(offset)
            return self._file.read(length)


def open_source(path: Path | str) -> ByteSource:
    """The bytes of a local path or of a remote address.

    Raises:
        UnreadableSlideError: the file is absent or cannot be read.
        MissingExtraError: a remote address, and the library for it is not installed.
    """
    if not is_remote(path):
        return LocalSource(Path(path))
    from pathfm.slides.remote import RemoteSource

    return RemoteSource(remote_url(path))


def file_identity(source: ByteSource) -> str:
    """SHA-256 over a file's size, head, tail and 64 evenly spaced blocks; a file no larger than its head counts whole.

    Raises:
        UnreadableSlideError: the file cannot be read.
    """
    size, whole = source.size, SAMPLE_BYTES * SAMPLE_BLOCKS
    samples = [(0, min(size, whole))]
    if size > whole:
        samples += [(size - whole, whole)]
        samples += [(size * index // SAMPLE_BLOCKS, SAMPLE_BYTES) for index in range(SAMPLE_BLOCKS)]
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    for data in source.read_many(samples):
        digest.update(data)
    return digest.hexdigest()
