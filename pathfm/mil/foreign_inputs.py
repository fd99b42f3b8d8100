"""Feature files that were made elsewhere: where those of a slide lie in the folders of other tools, and how they are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from pathfm.errors import StoreError, UsageError
from pathfm.mil.feature_cache import SlideFacts
from pathfm.models.pt_files import read_pt_features
from pathfm.store.cohort import Cohort
from pathfm.store.feature_file import read_feature_attrs
from pathfm.store.interop.features import read_features
from pathfm.store.interop.foreign_features import ForeignFeatures
from pathfm.store.interop.label_tables import folded, named, without_endings
from pathfm.store.interop.stamp_features import read_stamp_features

ENDINGS = (".h5", ".npz", ".zarr", ".pt")
"""Of feature files, and stores (folders) of LazySlide."""
COORDINATES = frozenset({"patches", "tiles"})
"""Folders with coordinates; AtlasPatch has features there, which count where there are no others."""
SLIDE_VECTORS = "slide_features_"
"""Folders of TRIDENT with one vector per slide: taken when they are named, never found inside another folder."""
CLAM = frozenset({"h5_files", "pt_files"})
"""CLAM writes each slide twice: without and with coordinates."""
MAX_DEPTH = 6
"""Folders are searched this deep, through links too: it ends where links go round."""

Reader = Callable[[Path], ForeignFeatures]


class ForeignFolder:
    """The feature files of a folder, whichever tool laid it out, listed once.

    Files are known by the slide_id that their names begin with: of ``<slide_id>.h5``, ``.npz``, ``.pt`` and ``.zarr``, in the
    folder itself or anywhere below, whatever the case of the letters. Of a ``.h5`` and a ``.pt`` that lie together the ``.h5``
    counts: it has coordinates.

    Args:
        folder: as a tool wrote it, or one above.

    Raises:
        UsageError: no such folder, or nothing in it that could be features.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UsageError("there is no such folder", where=f"mil.features={folder}", fix="check the path")
        self.folder = folder
        self._files: dict[str, list[Path]] = {}
        for path in _feature_files(folder, MAX_DEPTH):
            self._files.setdefault(folded(without_endings(path.name)), []).append(path)
        if not self._files:
            fix = f"wanted: files that end in {', '.join(ENDINGS)}, named by slide_id"
            raise UsageError("no feature files in this folder", where=f"mil.features={folder}", fix=fix)

    def find(self, slide_id: str) -> Path | None:
        """The feature file (or LazySlide store) of a slide, None where there is none.

        Raises:
            UsageError: there are several, and which one is meant cannot be known.
        """
        found = self._files.get(folded(without_endings(slide_id)), [])
        exact = [path for path in found if path.name.removesuffix(path.suffix) == slide_id]
        found = exact or found
        found = [path for path in found if path.parent.name not in COORDINATES or path.parent == self.folder] or found
        # The .pt files of CLAM and TRIDENT are copies of the .h5 beside them.
        better = {_place(path) for path in found if path.suffix == ".h5"}
        found = [path for path in found if path.suffix != ".pt" or _place(path) not in better]
        if len(found) > 1:
            names = [path.relative_to(self.folder).as_posix() for path in found]
            what = f"slide {slide_id} has {len(found)} feature files: {named(names)}"
            raise UsageError(what, where=f"mil.features={self.folder}", fix="point it at one encoder's folder, or remove one")
        return found[0] if found else None

    def notes(self, slide_ids: Collection[str]) -> list[str]:
        """What a reader should know: files that belong to no slide, and names that differ in more than their ending."""
        known = {folded(without_endings(slide_id)) for slide_id in slide_ids}
        extra = sorted(min(paths).name for name, paths in self._files.items() if name not in known)
        found = {slide_id: path for slide_id in sorted(slide_ids) if (path := self.find(slide_id))}
        other = [f"{slide_id} for {path.name}" for slide_id, path in found.items() if not path.name.startswith(slide_id)]
        notes = [f"{len(extra)} feature files are of slides that are not in the table: {named(extra)}"] if extra else []
        return notes + ([f"{len(other)} slides are written differently in the table, as {other[0]}"] if other else [])


def reader_of(path: Path, mpp_level0: float | None = None) -> Reader | None:
    """What ``FeatureCache.add`` reads a file with: None for files of pathfm, which it knows itself.

    Args:
        path: as ``ForeignFolder.find`` found it.
        mpp_level0: the slide's micrometres per pixel where the cohort table tells; STAMP's coordinates need it.
    """
    if path.suffix == ".h5" and read_feature_attrs(path) is not None:
        return None
    return lambda file: read_foreign(file, mpp_level0)


def read_foreign(path: Path, mpp_level0: float | None = None) -> ForeignFeatures:
    """Features of tiles, or the one vector of a slide, with the encoder by the name of the folder where the file says none.

    Raises:
        MissingExtraError: a LazySlide store, and pyarrow is not installed.
        StoreError: damaged, unfinished, not finite, of patients, or of no known tool.
    """
    if path.suffix == ".pt":
        found = read_pt_features(path)
    else:
        found = (read_stamp_features(path) if mpp_level0 is None else None) or read_features(path, mpp_level0)
    if found.level == "patient":
        raise StoreError("features of a patient, not of a slide", where=str(path), fix="give the features of tiles")
    tool, encoder = found.tool, _folder_encoder(path)
    if tool == "unknown":
        tool = "CLAM" if path.parent.name in CLAM else "TRIDENT" if encoder else tool
    tool = f"{tool} slide vector" if found.level == "slide" else tool
    return replace(found, tool=tool, encoder=found.encoder or encoder)


def foreign_notes(folder: ForeignFolder, cohort: Cohort, slides: Mapping[str, SlideFacts]) -> list[str]:
    """What a reader should know of features and tables that were made elsewhere.

    Args:
        folder: where the features lie.
        cohort: all slides.
        slides: facts of those with usable features, by slide_id.
    """
    unknown = [slide_id for slide_id, slide in slides.items() if slide.encoder.get("encoder") == ""]
    nowhere = [slide_id for slide_id, slide in slides.items() if slide.xy_level0 is None]
    twice = {slide_id: count for slide_id, slide in slides.items() if (count := repeated_tiles(slide))}
    notes = {
        f"the encoder of {len(unknown)} slides is unknown: only the length of their features says that it is one": unknown,
        f"nothing says where the tiles of {len(nowhere)} slides lie: {named(sorted(nowhere))}": nowhere,
        f"{sum(twice.values())} tiles of {len(twice)} slides are there twice, and count twice: {named(sorted(twice))}": twice,
    }
    return [*cohort.notes, *folder.notes([row.slide_id for row in cohort.rows]), *(note for note, of in notes.items() if of)]


def repeated_tiles(slide: SlideFacts) -> int:
    """How many tiles lie where another one lies and have its features: other tools may store a tile twice."""
    if slide.xy_level0 is None or not len(slide):
        return 0
    rows = np.column_stack([np.ascontiguousarray(slide.xy_level0).view(np.uint64), slide.row_hashes])
    return len(slide) - len(np.unique(rows, axis=0))


def _feature_files(folder: Path, depth: int) -> list[Path]:
    found: list[Path] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if path.suffix.lower() in ENDINGS and not entry.name.endswith(".coordinates.npz"):
            found.append(path)
        elif depth and entry.is_dir() and not entry.name.startswith(SLIDE_VECTORS):
            found += _feature_files(path, depth - 1)
    return found


def _place(path: Path) -> Path:
    """The folder that a tool wrote."""
    return path.parent.parent if path.parent.name in CLAM else path.parent


def _folder_encoder(path: Path) -> str | None:
    """TRIDENT names the folder by the encoder."""
    for start in (SLIDE_VECTORS, "features_"):
        if path.parent.name.startswith(start):
            return path.parent.name.removeprefix(start)
    return None
