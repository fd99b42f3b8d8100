"""Finding slides in folders, globs and lists of files."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pathfm.addresses import is_remote, public_name
from pathfm.errors import UsageError
from pathfm.slides.reader import dicom_files, is_tile_name
from pathfm.slides.tile_folder import natural_order

SLIDE_SUFFIXES = frozenset(
    {".svs", ".tif", ".tiff", ".dcm", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".czi", ".qptiff"}
    | {".png", ".jpg", ".jpeg"}
)
"""A file with one of these is a slide, also when it is damaged: it then fails by name, and is not silently left out."""
COMPANIONS = {".vms": {".jpg", ".opt"}, ".vmu": {".ngr", ".jpg"}}
"""Files beside a Hamamatsu key file that are parts of its slide."""

SeriesOf = Callable[[Path], str | None]
"""The series of a DICOM file; None where it cannot be opened."""


class FoundSlide(NamedTuple):
    """A slide and its name in all outputs."""

    slide_id: str
    path: Path


class Discovered(NamedTuple):
    """Slides in the natural order of their ids, and the files that were left out because of their suffix."""

    slides: tuple[FoundSlide, ...]
    ignored: tuple[Path, ...]


class _Candidate(NamedTuple):
    path: Path
    base: Path
    """Folder that the id is relative to."""


def discover(
    sources: Sequence[Path | str],
    folder_of_tiles: bool = False,
    namesakes: bool = False,
    series_of: SeriesOf | None = None,
) -> Discovered:
    """Find the slides of folders (searched recursively), globs and files.

    A ``slide_id`` is the path relative to the searched folder without its suffix, ``/`` written as ``__``; slides that differ
    in the suffix alone keep it. A folder with nothing but one DICOM series is one slide. A file that is named outright is a
    slide whatever its suffix. Links are followed, but not back into a folder on the way to them; hidden folders, tile stores
    and output folders of pathfm are not searched.

    Args:
        sources: folders, globs or files.
        folder_of_tiles: every folder that directly holds pictures is one slide.
        namesakes: slides may have one id.
        series_of: says to which series a DICOM file belongs, for those who look often; None: each file is opened.

    Raises:
        UsageError: a source does not exist or matches nothing, or two slides get one id and must not.
    """
    ignored: list[Path] = []
    candidates: list[_Candidate] = []
    for source in sources:
        if is_remote(source):
            candidates.append(_Candidate(Path(source), Path(source).parent))
            continue
        for path, base in _expand(Path(source)):
            if path.is_dir():
                found = _tile_folders(path, ()) if folder_of_tiles else _search(path, (), ignored, series_of)
                candidates += [_Candidate(each, path if base is None else base) for each in found]
            else:
                candidates.append(_Candidate(path, base or path.parent))
    unique = {candidate.path.absolute(): candidate for candidate in candidates}
    slides = sorted(_named(list(unique.values())), key=lambda slide: natural_order(slide.slide_id))
    if not namesakes:
        _check_names(slides)
    return Discovered(tuple(slides), tuple(sorted(set(ignored))))


def _expand(source: Path) -> Iterator[tuple[Path, Path | None]]:
    """A source's files and folders, each with the folder its id starts at when that is not its own place."""
    if source.exists():
        yield source, None
        return
    text = str(source)
    if not glob.has_magic(text):
        raise UsageError("there is no such file or folder", where=text, fix="check the path")
    plain = next(index for index, part in enumerate(source.parts) if glob.has_magic(part))
    base = Path(*source.parts[:plain])
    matches = sorted(base.glob(str(Path(*source.parts[plain:]))))
    if not matches:
        raise UsageError("nothing matches", where=text, fix="check the pattern, and quote it on the command line")
    for match in matches:
        depth = len(match.relative_to(base).parts)
        if not any(_is_output(path) for path in [match, *match.parents][:depth]):
            yield match, base


def _is_output(path: Path) -> bool:
    """Whether pathfm has made a folder: its pictures are no slides."""
    return path.suffix == ".zarr" or ((path / "study.yaml").is_file() and (path / "tiles").is_dir())


def _folders(entries: Sequence[Path], way: Sequence[Path]) -> Iterator[Path]:
    """The folders to search among the entries of a folder; ``way``: the real places of that folder and of those above it."""
    for path in entries:
        if path.is_dir() and not _is_output(path) and path.resolve() not in way:
            yield path


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _search(folder: Path, above: Sequence[Path], ignored: list[Path], series_of: SeriesOf | None) -> Iterator[Path]:
    """Slides in a folder and below it; ``above``: the real places of the folders that led here."""
    entries, way = _visible(folder), [*above, folder.resolve()]
    # A link to nothing is listed too: it fails by its name.
    files = [path for path in entries if path.is_file() or not path.exists()]
    series = _dicom_slides(folder, files, len(files) == len(entries), series_of)
    suffixes = {path.suffix.lower() for path in files}
    companions: set[str] = set().union(*(COMPANIONS.get(suffix, set()) for suffix in suffixes))
    yield from series
    for path in files:
        suffix = path.suffix.lower()
        if suffix in companions or suffix == ".dcm":
            continue
        if suffix in SLIDE_SUFFIXES:
            yield path
        else:
            ignored.append(path)
    mirax = {path.stem for path in files if path.suffix.lower() == ".mrxs"}
    for path in _folders(entries, way):
        # A MIRAX slide keeps its data in a folder of its own name.
        if path.name not in mirax:
            yield from _search(path, way, ignored, series_of)


def _dicom_slides(folder: Path, files: Sequence[Path], alone: bool, series_of: SeriesOf | None) -> list[Path]:
    """One path per DICOM series: the folder when it holds nothing else, otherwise the series' first file."""
    dicoms = dicom_files(folder)
    if not dicoms:
        return []
    from pathfm.slides.openslide_reader import dicom_series

    firsts: dict[str, Path] = {}
    for path in dicoms:
        # A file that cannot be opened is a slide of its own, and fails by its own name.
        firsts.setdefault((series_of or dicom_series)(path) or f"file {path.name}", path)
    opened = all(not series.startswith("file ") for series in firsts)
    if opened and len(firsts) == 1 and alone and len(files) == len(dicoms):
        return [folder]
    return list(firsts.values())


def _tile_folders(folder: Path, above: Sequence[Path]) -> Iterator[Path]:
    """Folders that directly hold tile pictures, the searched one included; ``above`` as for ``_search``."""
    entries, way = _visible(folder), [*above, folder.resolve()]
    if any(is_tile_name(path.name) and path.is_file() for path in entries):
        yield folder
    for path in _folders(entries, way):
        yield from _tile_folders(path, way)


def _named(candidates: Sequence[_Candidate]) -> Iterator[FoundSlide]:
    """Candidates with their ids; those that share one keep their suffix."""
    plain = [_id(candidate, keep_suffix=False) for candidate in candidates]
    shared = Counter(plain)
    ids = [_id(each, keep_suffix=shared[name] > 1) for each, name in zip(candidates, plain, strict=True)]
    return (FoundSlide(slide_id, candidate.path) for candidate, slide_id in zip(candidates, ids, strict=True))


def _check_names(slides: Sequence[FoundSlide]) -> None:
    owners: dict[str, Path] = {}
    for slide_id, path in slides:
        other = owners.setdefault(slide_id, path)
        if other != path:
            fix = "search their common folder, or list them in a cohort table"
            raise UsageError(f"two slides would be called {slide_id!r}: {other} and {path}", where="cohort", fix=fix)


def _id(candidate: _Candidate, *, keep_suffix: bool) -> str:
    path, base = candidate
    if path == base:
        return path.absolute().name
    inner = Path(Path(public_name(path)).name) if is_remote(path) else path.relative_to(base)
    named = inner if keep_suffix or path.is_dir() else inner.with_suffix("")
    return "__".join(named.parts)
