"""The catalogue: what pretraining must know of every tile store before it opens one, as flat arrays.

Kept as a folder of .npy files that all processes of a machine map into memory, so that they share its pages: per slide 64 bytes
of numbers, its slide_id and its path, some 220 MB for a million. What each process needs of its own is the same for any number.

Shapes: E entries: a slide at one resolution, sorted by the columns of ``sampling.weights``, then slide_id, then resolution.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pathfm.config import bullet_list, did_you_mean
from pathfm.errors import StoreError, UsageError
from pathfm.log import track
from pathfm.pretrain import shares
from pathfm.pretrain.order import Indices, Line
from pathfm.pretrain_settings import SamplingSettings
from pathfm.store.commit import commit_dir, read_json, write_json
from pathfm.store.tile_store import open_tiles

VERSION = 1
HEAD = "catalogue.json"
THREADS = 16
"""Stores opened at a time: on network drives nearly all of it is waiting."""
CHUNK = 4096
"""Stores given to the threads at a time, so that a million of them do not queue."""
SHOWN = 5
"""Stores that an error names."""
PATIENCE_S = 4 * 3600.0

Facts = Mapping[str, Mapping[str, str]]
"""Of the cohort table: slide_id -> column -> value."""


class Entry(NamedTuple):
    """A slide at one resolution; ``mpp`` is NaN when unknown, ``path``: the store, or its group of that resolution."""

    slide_id: str
    mpp: float
    path: str
    tiles: int
    shard_tiles: int
    tile_px: int


@dataclass(frozen=True)
class Catalogue:
    """All tiles of a run.

    Attributes:
        ends_E, tiles_E, used_E, shard_tiles_E: as ``order.Line``.
        mpp_E: resolution [um per px], NaN when unknown.
        tile_px_E: side of the tiles [px].
        texts_N: slide_id and path of every entry, UTF-8, one after the other.
        text_ends_E2: where the two of each entry end in it [E, 2].
        folder: where it is kept; None: in memory only.
    """

    ends_E: Indices
    tiles_E: Indices
    used_E: Indices
    shard_tiles_E: Indices
    mpp_E: npt.NDArray[np.float64]
    tile_px_E: Indices
    texts_N: npt.NDArray[np.uint8]
    text_ends_E2: Indices
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.tiles_E)

    @property
    def line(self) -> Line:
        """What the order of samples follows from."""
        return Line(self.ends_E, self.tiles_E, self.used_E, self.shard_tiles_E)

    @property
    def tile_px(self) -> int:
        """Side of the smallest tiles that are used [px]."""
        return int(self.tile_px_E[self.used_E > 0].min(initial=np.iinfo(np.int64).max))

    @property
    def used(self) -> list[tuple[str, int]]:
        """slide_id and number of used tiles of every slide, over all its resolutions, by slide_id."""
        counts: Counter[str] = Counter()
        for entry, used in enumerate(self.used_E.tolist()):
            counts[self.slide_id(entry)] += used
        return sorted(counts.items())

    def slide_id(self, entry: int) -> str:
        """Of an entry."""
        start = int(self.text_ends_E2[entry - 1, 1]) if entry else 0
        return self.texts_N[start : int(self.text_ends_E2[entry, 0])].tobytes().decode()

    def path(self, entry: int) -> Path:
        """Of an entry's store, or of its group of that resolution."""
        start, end = self.text_ends_E2[entry].tolist()
        return Path(os.fsdecode(self.texts_N[start:end].tobytes()))

    def saved(self, folder: Path, fingerprint: str) -> Catalogue:
        """Writes it to a folder, whole or not at all, and returns it mapped from there."""
        with commit_dir(folder) as temporary:
            for name in ARRAYS:
                np.save(temporary / f"{name}.npy", getattr(self, name))
            write_json(temporary / HEAD, {"version": VERSION, "fingerprint": fingerprint})
        return _mapped(folder)

    def __reduce__(self) -> tuple[object, ...]:
        # Another process maps the same pages; a copy for each would be hundreds of megabytes.
        return (_mapped, (self.folder,)) if self.folder else (Catalogue, tuple(getattr(self, name) for name in ARRAYS))


ARRAYS = tuple(field.name for field in fields(Catalogue) if field.name != "folder")


def open_catalogue(folder: Path, fingerprint: str) -> Catalogue | None:
    """What ``Catalogue.saved`` has written; None when there is none, or one of another fingerprint.

    Args:
        folder: of the catalogue.
        fingerprint: of the settings and tiles it was made for.
    """
    try:
        head = read_json(folder / HEAD)
        return _mapped(folder) if (head.get("version"), head.get("fingerprint")) == (VERSION, fingerprint) else None
    except (StoreError, OSError, ValueError, EOFError):
        return None


def shared_catalogue(folder: Path, fingerprint: str, build: Callable[[], Catalogue], makes_it: bool) -> Catalogue:
    """The catalogue kept in a folder, which one process builds when it is absent while the others wait for it.

    Args:
        folder: where it is kept, the same for all processes.
        fingerprint: of the settings and tiles.
        build: makes it.
        makes_it: whether this is the process that does.

    Raises:
        StoreError: nobody has made it within hours.
    """
    waited_until = time.monotonic() + PATIENCE_S
    while not (found := open_catalogue(folder, fingerprint)):
        if makes_it:
            return build().saved(folder, fingerprint)
        if time.monotonic() > waited_until:
            raise StoreError("the first process has made no catalogue", where=str(folder), fix="see what it says")
        time.sleep(1)
    return found


def _mapped(folder: Path) -> Catalogue:
    return Catalogue(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}, folder=folder)


def build_catalogue(paths: Sequence[Path], sampling: SamplingSettings, facts: Facts) -> Catalogue:
    """Opens every store once.

    Args:
        paths: tile stores, in any order.
        sampling: how often each slide is to come.
        facts: columns of the cohort table, for ``sampling.weights``.

    Raises:
        StoreError: stores that cannot be read, or that hold no pixels.
        UsageError: slides twice, or weights of columns or values that nothing has.
    """
    return catalogue_of(_read_stores(paths, sampling), sampling, facts)


def catalogue_of(entries: Sequence[Entry], sampling: SamplingSettings, facts: Facts) -> Catalogue:
    """The catalogue of known entries, as ``build_catalogue``."""
    groupings = [_grouping(column, entries, weights, facts) for column, weights in sampling.weights.items()]
    keys = [tuple(grouping.code_E[row] for grouping in groupings) + entry[:3] for row, entry in enumerate(entries)]
    order = np.array(sorted(range(len(entries)), key=keys.__getitem__), dtype=np.int64)
    ordered = [entries[row] for row in order]
    _refuse_twins(ordered)
    groupings = [grouping._replace(code_E=grouping.code_E[order]) for grouping in groupings]
    tiles_E = np.array([entry.tiles for entry in ordered], dtype=np.int64)
    used_E = np.minimum(tiles_E, sampling.max_tiles_per_slide or tiles_E)
    draws_E = shares.draws_per_epoch(used_E, groupings, sampling)
    texts = [os.fsencode(text) for entry in ordered for text in (entry.slide_id, entry.path)]
    return Catalogue(
        ends_E=shares.line(draws_E),
        tiles_E=tiles_E,
        used_E=np.where(draws_E > 0, used_E, 0),
        shard_tiles_E=np.array([entry.shard_tiles for entry in ordered], dtype=np.int64),
        mpp_E=np.array([entry.mpp for entry in ordered], dtype=np.float64),
        tile_px_E=np.array([entry.tile_px for entry in ordered], dtype=np.int64),
        texts_N=np.frombuffer(b"".join(texts), dtype=np.uint8),
        text_ends_E2=np.cumsum([len(text) for text in texts], dtype=np.int64).reshape(-1, 2),
    )


def _read_stores(paths: Sequence[Path], sampling: SamplingSettings) -> list[Entry]:
    """Reads the attributes of all stores, a few at a time."""
    entries: list[Entry] = []
    problems: list[str] = []

    def read(path: Path) -> list[Entry] | str:
        try:
            return list(_entries(path, sampling.quality))
        except (StoreError, OSError) as error:
            return str(error)

    def found() -> Iterator[list[Entry] | str]:
        with ThreadPoolExecutor(THREADS) as threads:
            for start in range(0, len(paths), CHUNK):
                yield from threads.map(read, paths[start : start + CHUNK])

    for result in track(found(), "pretrain: opening tile stores", len(paths)):
        if isinstance(result, str):
            problems.append(result)
        else:
            entries += result
    if problems:
        raise StoreError(
            bullet_list(problems, SHOWN), where="tile stores", fix="delete these and tile again, or leave them out"
        )
    return entries


def _entries(path: Path, quality: Sequence[str]) -> Iterator[Entry]:
    first = open_tiles(path)
    for store in (first, *(open_tiles(path, mpp) for mpp in first.scales[1:])):
        if not store.has_pixels:
            raise StoreError("the store has coordinates only", where=str(path), fix="tile with another tile.codec than none")
        if absent := sorted(set(quality) - set(store.quality_names)):
            has = ", ".join(store.quality_names) or "none"
            raise UsageError(
                f"the store has no quality column {absent[0]!r}{did_you_mean(absent[0], store.quality_names)}",
                where=f"pretrain.sampling.quality: {path}",
                fix=f"it has {has}",
            )
        mpp = math.nan if store.mpp is None else store.mpp
        yield Entry(first.slide_id, mpp, str(store.path), len(store), int(store.attrs["shard_tiles"]), store.tile_px)


def _refuse_twins(ordered: Sequence[Entry]) -> None:
    """The same slide twice would come twice as often, and no report could tell its tiles apart."""
    twins = [after for before, after in itertools.pairwise(ordered) if before[:2] == after[:2]]
    if twins:
        what = f"slide {twins[0].slide_id!r} is there twice at {twins[0].mpp:g} mpp"
        raise UsageError(what, where=twins[0].path, fix="leave one out")


def _grouping(column: str, entries: Sequence[Entry], weights: Mapping[str, float], facts: Facts) -> shares.Grouping:
    if column == shares.MPP:
        names = shares.mpp_names(np.array([entry.mpp for entry in entries]), weights)
        return shares.grouping(column, names, weights)
    columns = {name for values in facts.values() for name in values}
    if column not in columns:
        known = ", ".join([shares.MPP, *sorted(columns)])
        hint = did_you_mean(column, [shares.MPP, *columns])
        raise UsageError(f"no column {column!r}{hint}", where="pretrain.sampling.weights", fix=f"there are {known}")
    return shares.grouping(column, [facts.get(entry.slide_id, {}).get(column, "") for entry in entries], weights)
