"""Vectors of whole slides: one HDF5 per slide, whole or absent, and one table. Specified in ``docs/slide-vectors.md``."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from pathfm.errors import StoreError
from pathfm.store.commit import commit_file
from pathfm.store.hdf5_draft import write_hdf5

FORMAT = "pathfm-slide-vector"
VERSION = 1
AGAIN = "delete it and run `pathfm extract` again"


@dataclass(frozen=True)
class SlideVector:
    """The vector of one slide.

    Attributes:
        vector: [D] float32.
        attrs: slide, slide encoder and what it depends on, as written.
    """

    vector: npt.NDArray[np.float32]
    attrs: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """What the vector depends on."""
        return str(self.attrs["fingerprint"])


def write_slide_vector(
    path: Path,
    vector_D: npt.NDArray[np.float32],
    attrs: Mapping[str, str | int | float | bool],
    check: Callable[[], None] | None = None,
) -> None:
    """Writes a slide's vector, whole or not at all. ``check`` is called last; when it raises, nothing changes.

    Raises:
        StoreError: it is no vector, or not finite; or the drive is full or failing.
    """
    if vector_D.ndim != 1 or not np.isfinite(vector_D).all():
        raise StoreError("a slide's vector must be one row of finite numbers", where=str(path))

    def fill(file: h5py.File) -> None:
        file.create_dataset("vector", data=vector_D.astype(np.float32), track_times=False)
        file.attrs.update({"format": FORMAT, "version": VERSION, **dict(attrs)})

    with commit_file(path, check) as temporary:
        write_hdf5(temporary, "latest", fill)


def open_slide_vector(path: Path | str) -> SlideVector:
    """Reads and verifies a slide's vector.

    Raises:
        StoreError: absent, damaged, of another tool, or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError("no slide vector", where=str(path), fix="run `pathfm extract` with extract.slide_vectors first")
    try:
        with h5py.File(path, "r") as file:
            attrs = {name: value.item() if isinstance(value, np.generic) else value for name, value in file.attrs.items()}
            vector = np.asarray(file["vector"][()]) if attrs.get("format") == FORMAT else None
    except (OSError, KeyError) as error:
        raise StoreError("damaged slide vector", where=str(path), fix=AGAIN) from error
    if vector is None:
        raise StoreError("not a slide vector of pathfm", where=str(path))
    if int(attrs["version"]) > VERSION:
        raise StoreError(
            f"written by a newer pathfm (format version {attrs['version']})", where=str(path), fix="upgrade pathfm"
        )
    if vector.ndim != 1 or vector.dtype != np.float32 or not np.isfinite(vector).all():
        raise StoreError("damaged slide vector", where=str(path), fix=AGAIN)
    return SlideVector(vector, attrs)


def is_slide_table(path: Path, vectors: Mapping[str, npt.NDArray[np.float32]]) -> bool:
    """Whether the table is there and says exactly this."""
    return path.is_file() and path.read_bytes() == _table(path, vectors)


def write_slide_table(path: Path, vectors: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Writes ``slide_id,v0,v1,...`` as CSV, sorted by slide id; every float32 reads back as it was. Nothing if nothing changed.

    Raises:
        StoreError: the vectors differ in length, or the drive is full or failing.
    """
    if not is_slide_table(path, vectors):
        with commit_file(path) as temporary:
            temporary.write_bytes(_table(path, vectors))


def _table(path: Path, vectors: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    lengths = {len(vector) for vector in vectors.values()}
    if len(lengths) > 1:
        raise StoreError(f"slide vectors of different lengths ({sorted(lengths)}) make no table", where=str(path))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["slide_id", *(f"v{number}" for number in range(max(lengths, default=0)))])
    for slide_id, vector in sorted(vectors.items()):
        table.writerow([slide_id, *(f"{value:.9g}" for value in vector.tolist())])
    return text.getvalue().encode("utf-8")
