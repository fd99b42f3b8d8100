"""What a pretraining run has seen, kept beside the encoder, and the search for it among slides to be judged.

``manifest.csv`` has one line per slide: hashes of its name, patient, tile store and file, its size, and perceptual hashes of
its thumbnail (of some tiles where a slide is a folder of tiles). No name, path or pixel is in it. Specified in
``docs/seen-in-pretraining.md``.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pathfm.errors import StoreError
from pathfm.stats.phash import WORDS, Words, near_hashes, picture_hash, turned_hashes
from pathfm.store.commit import commit_file, read_json
from pathfm.store.interop.label_tables import spellings
from pathfm.store.tile_store import TileStore, open_tiles

MANIFEST, CARD, DIGEST = "manifest.csv", "card.json", "manifest_sha256"
"""The file, the card beside it, and the card's entry with the file's SHA-256."""
COLUMNS = ("slide", "patient", "store", "file", "width", "height", "pictures")
KEPT_TILES = 16
"""Tiles of a folder of tiles whose pictures are kept in the manifest."""
SOUGHT_TILES = 4096
"""Tiles of a folder of tiles that are looked for."""
ORIGIN_KNOWN = "origin_known"
"""The card's entry that is false when the weights it starts or learns from come without a manifest."""
KEY_DIGITS = 24
BATCH = 1024
THREADS = 8
"""Thumbnails read at the same time: most of the time is the drive's."""
STRENGTH = ("same file", "same tiles", "same picture", "same slide id", "same patient")
"""Evidence, strongest first."""
KINDS = {"same file": "file", "same tiles": "store", "same patient": "patient"}
"""Evidence by equality alone, and its column in the manifest."""
Item = TypeVar("Item")


class Evidence(NamedTuple):
    """Why a slide counts as seen: ``same file``, ``same tiles``, ``same picture``, ``same slide id`` or ``same patient``.

    ``match`` is the manifest's key of the pretraining slide, ``bits`` how many bits of the two pictures differ (-1: not asked).
    """

    reason: str
    match: str
    bits: int = -1


def name_key(kind: str, name: str | None) -> str:
    """How a name (``slide`` or ``patient``) stands in a manifest: 96 bits of its SHA-256; nothing for no name.

    Case, spaces around it and the way accents are written do not count. There is no salt, since other people's cohorts must be
    comparable: the hash hides a name at a glance, but whoever can list all possible names can find it.
    """
    plain = unicodedata.normalize("NFC", name or "").strip().casefold()
    return hashlib.sha256(f"{kind}\0{plain}".encode()).hexdigest()[:KEY_DIGITS] if plain else ""


def write_manifest(
    path: Path, stores: Sequence[Path], patient_of: Mapping[str, str | None], inherited: Sequence[Path] = ()
) -> str:
    """Writes the manifest of a run: the same slides give the same bytes, in whatever order they come.

    Args:
        path: the file.
        stores: tile stores that the run draws from.
        patient_of: slide_id -> patient, None or absent where unknown.
        inherited: manifests of encoders that the run starts or learns from: their slides count as seen too.

    Returns:
        SHA-256 of the file.

    Raises:
        StoreError: a store or an inherited manifest is damaged.
    """
    lines = {line for manifest in inherited for line in _lines(manifest)}
    for store, picture_SW in _looked_at(stores, KEPT_TILES):
        cells = (
            name_key("slide", store.slide_id),
            name_key("patient", patient_of.get(store.slide_id)),
            *_content_keys(store),
            *(str(side) for side in store.size_level0),
            ";".join(words.astype(">u8").tobytes().hex() for words in picture_SW),
        )
        lines.add(",".join(cells))
    with commit_file(path) as temporary:
        temporary.write_text("\n".join([",".join(COLUMNS), *sorted(lines)]) + "\n", encoding="ascii")
    return file_digest(path)


def manifest_of(encoder: Path) -> Path | None:
    """The manifest of an encoder folder; None when its card names none, so that nobody knows what it has seen.

    Raises:
        StoreError: the card names a manifest that is absent or another one.
    """
    card, path = encoder / CARD, encoder / MANIFEST
    wanted = read_json(card).get(DIGEST) if card.is_file() else None
    if wanted is None:
        return None
    if not path.is_file() or file_digest(path) != wanted:
        what = "the list of slides that this encoder has seen is absent, or not the one it was exported with"
        raise StoreError(what, where=str(path), fix="export the encoder again")
    return path


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_seen(manifest: Path, stores: Sequence[Path], patient_of: Mapping[str, str | None]) -> dict[str, tuple[Evidence, ...]]:
    """Slides of which the run has seen the file, the picture (renamed, saved again, turned), the name or the patient.

    The manifest is read in pieces; memory depends on ``stores`` alone. A name alone proves nothing where both pictures are
    known and differ: many cohorts have a slide called 1.

    Args:
        manifest: of the encoder.
        stores: tile stores of the slides to be judged.
        patient_of: slide_id -> patient, None or absent where unknown.

    Returns:
        slide_id -> what was found, for seen slides only: the strongest evidence of each kind, strongest first.

    Raises:
        StoreError: a store or the manifest is damaged.
    """
    wanted = _Wanted(patient_of)
    for store, picture_SW in _looked_at(stores, SOUGHT_TILES):
        wanted.add(store, picture_SW)
    return _found(wanted, manifest)


def find_by_identity(
    manifest: Path, identity: Mapping[str, str], patient_of: Mapping[str, str | None]
) -> dict[str, tuple[Evidence, ...]]:
    """Of ``find_seen``, what can be told before slides have tiles: the same file, and the same patient.

    Args:
        manifest: of the encoder.
        identity: slide_id -> identity of the slide file, empty where it cannot be read.
        patient_of: slide_id -> patient, None or absent where unknown.

    Raises:
        StoreError: the manifest is damaged.
    """
    wanted = _Wanted(patient_of)
    for slide_id, text in identity.items():
        wanted.name(slide_id, {"file": _content_key(text)})
    return _found(wanted, manifest)


def _found(wanted: _Wanted, manifest: Path) -> dict[str, tuple[Evidence, ...]]:
    found: dict[str, dict[str, Evidence]] = {}
    for rows in _batches(_lines(manifest)):
        for slide_id, evidence in wanted.among([_Row.parse(line, manifest) for line in rows]):
            best = found.setdefault(slide_id, {})
            kept = best.get(evidence.reason)
            if kept is None or (evidence.bits, evidence.match) < (kept.bits, kept.match):
                best[evidence.reason] = evidence
    return {
        slide_id: tuple(sorted(best.values(), key=lambda evidence: STRENGTH.index(evidence.reason)))
        for slide_id, best in sorted(found.items())
    }


class _Row(NamedTuple):
    """A line of a manifest."""

    slide: str
    patient: str
    store: str
    file: str
    picture_SW: Words

    @classmethod
    def parse(cls, line: str, where: Path) -> _Row:
        try:
            slide, patient, store, file, _, _, pictures = line.split(",")
            words = np.frombuffer(bytes.fromhex(pictures.replace(";", "")), dtype=">u8").astype(np.uint64).reshape(-1, WORDS)
        except ValueError as error:
            raise StoreError("not a manifest of pretraining", where=str(where), fix="export the encoder again") from error
        return cls(slide, patient, store, file, words)


@dataclass
class _Wanted:
    """The slides to be judged, by everything they can be recognised by."""

    patient_of: Mapping[str, str | None]
    by_key: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    with_picture: set[str] = field(default_factory=set)
    owners: list[str] = field(default_factory=list)
    hashes: list[Words] = field(default_factory=list)

    def add(self, store: TileStore, picture_SW: Words) -> None:
        """One slide with the hashes of its pictures."""
        stored, file = _content_keys(store)
        self.name(store.slide_id, {"slide": name_key("slide", store.slide_id), "store": stored, "file": file})
        if len(picture_SW):
            self.with_picture.add(store.slide_id)
            self.hashes.append(picture_SW)
            self.owners += [store.slide_id] * len(picture_SW)

    def name(self, slide_id: str, keys: Mapping[str, str]) -> None:
        """One slide by its keys and its patient, however spreadsheets write that one."""
        patients = {name_key("patient", name) for name in spellings(self.patient_of.get(slide_id) or "")}
        for kind, key in (*keys.items(), *(("patient", patient) for patient in patients)):
            if key:
                self.by_key.setdefault((kind, key), []).append(slide_id)

    def among(self, rows: Sequence[_Row]) -> Iterator[tuple[str, Evidence]]:
        """Every slide that one of the rows is evidence for."""
        for row in rows:
            for reason, column in KINDS.items():
                matches = self.by_key.get((column, getattr(row, column)), ())
                yield from ((slide_id, Evidence(reason, row.slide)) for slide_id in matches)
            for slide_id in self.by_key.get(("slide", row.slide), ()):
                if not len(row.picture_SW) or slide_id not in self.with_picture:
                    yield slide_id, Evidence("same slide id", row.slide)
        names = [row.slide for row in rows for _ in row.picture_SW]
        if not self.hashes or not names:
            return
        turned = turned_hashes(np.concatenate([row.picture_SW for row in rows])).reshape(-1, WORDS)
        for near in near_hashes(np.concatenate(self.hashes), turned):
            yield self.owners[near.query], Evidence("same picture", names[near.stored % len(names)], near.bits)


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    source = iter(items)
    while batch := list(islice(source, BATCH)):
        yield batch


def _lines(manifest: Path) -> Iterator[str]:
    """The lines below the header, checked to be those of a manifest."""
    try:
        with manifest.open(encoding="ascii") as stream:
            if stream.readline().rstrip("\n") != ",".join(COLUMNS):
                raise StoreError("not a manifest of pretraining", where=str(manifest), fix="export the encoder again")
            for line in stream:
                yield line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"cannot be read: {error}", where=str(manifest), fix="export the encoder again") from error


def _content_keys(store: TileStore) -> tuple[str, str]:
    """Keys of the tile store and of the slide file; empty where a store was not made from a file."""
    return _content_key(store.fingerprint), _content_key(str(store.attrs.get("identity") or ""))


def _content_key(digest: str) -> str:
    return digest[:KEY_DIGITS] if re.fullmatch(r"[0-9a-f]{64}", digest) else ""


def _looked_at(stores: Iterable[Path], tiles: int) -> Iterator[tuple[TileStore, Words]]:
    """Every store with the hashes [S, W] of its pictures, in order, read by several threads a batch at a time."""

    def look(path: Path) -> tuple[TileStore, Words]:
        store = open_tiles(path)
        hashes = [words for picture in _pictures(store, tiles) if (words := picture_hash(picture)) is not None]
        return store, np.array(hashes, dtype=np.uint64).reshape(-1, WORDS)

    with ThreadPoolExecutor(THREADS) as pool:
        for paths in _batches(stores):
            yield from pool.map(look, paths)


def _pictures(store: TileStore, most_tiles: int) -> Iterator[npt.NDArray[np.uint8]]:
    """The thumbnail; of a folder of tiles, whose mosaic depends on the order of its files, those tiles that are stored."""
    if not store.coords_synthetic:
        yield store.thumbnail
        return
    if not store.has_pixels:
        return
    chosen = np.linspace(0, len(store) - 1, min(most_tiles, len(store))).round().astype(int)
    yield from (store[int(index)] for index in chosen)
