"""What something on disk is, in a few lines: a study, an artifact of any stage, an output folder, or a slide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pathfm.errors import UnreadableSlideError, UsageError
from pathfm.store.commit import read_json

KNOWN = (
    "a study file (YAML), slide, folder of tiles, tile store (.zarr), feature file (.h5) or a folder of them, encoder folder "
    "or output folder"
)
STUDY_SUFFIXES = frozenset({".yaml", ".yml"})
FEATURE_SUFFIXES = frozenset({".h5", ".hdf5"})
QUANTILES = (0.05, 0.5, 0.95)


def inspect_path(path: Path) -> str:
    """Text that says what ``path`` is and what it holds.

    Raises:
        UsageError: there is nothing, or nothing that pathfm knows.
        StoreError: an artifact that is damaged, foreign, or of a newer version.
        UnreadableSlideError: a slide that cannot be read.
    """
    if not path.exists():
        raise UsageError("there is no such file or folder", where=str(path), fix=f"name {KNOWN}")
    path = path.absolute()  # so that also `.` has a name
    return (_folder_kind(path) if path.is_dir() else _file_kind(path))(path)


def _folder_kind(path: Path) -> Callable[[Path], str]:
    if (path / "zarr.json").is_file():
        return _tile_store
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        return _encoder
    if (path / "study.yaml").is_file():
        return _output_folder
    return _feature_folder if any(path.glob("*.h5")) else _slide_folder


def _file_kind(path: Path) -> Callable[[Path], str]:
    suffix = path.suffix.lower()
    if suffix in STUDY_SUFFIXES:
        return _study
    return _features if suffix in FEATURE_SUFFIXES else _slide


def _lines(title: str, facts: Iterable[tuple[str, object]]) -> str:
    """A title and aligned facts; facts that are None are left out."""
    known = [(name, value) for name, value in facts if value is not None]
    width = max((len(name) for name, _ in known), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in known)])


def _study(path: Path) -> str:
    from pathfm.config import dump_study, load_study

    return dump_study(load_study(path)).rstrip("\n")


def _tile_store(path: Path) -> str:
    import numpy as np

    from pathfm.store.tile_store import open_tiles

    store = open_tiles(path)
    facts: list[tuple[str, object]] = [
        ("slide", store.slide_id),
        ("tiles", f"{len(store)} of {store.tile_px} px"),
        ("mpp", "unknown" if store.mpp is None else f"{store.mpp:g} um per px"),
        ("side", f"{store.tile_side_level0:g} level-0 px"),
        ("slide size", f"{store.size_level0.width} x {store.size_level0.height} level-0 px"),
        ("coordinates", "synthetic (a mosaic)" if store.coords_synthetic else "level 0"),
        ("codec", _codec(store.attrs)),
        ("bytes", f"{sum(file.stat().st_size for file in path.rglob('*') if file.is_file()):,}"),
        ("fingerprint", store.fingerprint),
    ]
    if len(store):
        columns = np.quantile(store.quality, QUANTILES, axis=0).T
        facts += [(f"quality {name}", _quantiles(column)) for name, column in zip(store.quality_names, columns, strict=True)]
    return _lines(f"tile store {path.name}", facts)


def _codec(attrs: dict[str, Any]) -> str:
    quality = attrs.get("jpeg_quality")
    return f"{attrs['codec']}, quality {quality}" if quality else str(attrs["codec"])


def _quantiles(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * share:.0f} %: {value:.4g}" for share, value in zip(QUANTILES, values, strict=True))


def _features(path: Path) -> str:
    from pathfm.feature_inspection import feature_file_facts

    return _lines(f"feature file {path.name}", feature_file_facts(path))


def _feature_folder(path: Path) -> str:
    from pathfm.feature_inspection import feature_folder_facts

    return _lines(f"features {path.name}", feature_folder_facts(path))


def _encoder(path: Path) -> str:
    config = read_json(path / "config.json")
    card = read_json(path / "card.json") if (path / "card.json").is_file() else {"origin": "no card: not made by pathfm"}
    facts = {"architecture": config.get("architecture"), "num_features": config.get("num_features"), **card}
    prepared = config.get("pretrained_cfg") or {}
    facts |= {name: prepared.get(name) for name in ("input_size", "mean", "std", "interpolation")}
    said = {name: _flat(value) for name, value in facts.items() if value not in ({}, "") and name != "preprocessing"}
    size = (path / "model.safetensors").stat().st_size
    return _lines(f"encoder {path.name}", [*sorted(said.items()), ("weights", f"{size:,} bytes")])


def _flat(value: object) -> object:
    """A nested table on one line."""
    if not isinstance(value, dict):
        return value
    return ", ".join(f"{name}: {_flat(inner)}" for name, inner in sorted(value.items()))


def _output_folder(path: Path) -> str:
    """Stages with what became of the slides, and fingerprints."""
    blocks = [f"output folder {path.name}"]
    for folder in _artifacts(path):
        name = folder.relative_to(path).as_posix()
        facts = [("slides", _outcomes(folder)), ("fingerprint", _fingerprint_of(folder))]
        blocks.append(_lines(name, facts))
    if len(blocks) == 1:
        blocks.append("no stage has finished here")
    return "\n".join(blocks)


def _artifacts(path: Path) -> list[Path]:
    """Folders of finished stages, in the order of the stages."""
    records = [folder for pattern in ("tiles/*", "features/*/*", "mil", "report") for folder in sorted(path.glob(pattern))]
    made = {"tiles": 0, "encoder": 1, "features": 2, "mil": 3, "report": 4}
    encoders = [card.parent for card in sorted(path.glob("encoder/**/card.json"))]
    found = [folder for folder in records if (folder / "record.json").is_file()] + encoders
    return sorted(found, key=lambda folder: (made[folder.relative_to(path).parts[0]], folder.as_posix()))


def _outcomes(folder: Path) -> str | None:
    from pathfm.store.record import read_record

    record = read_record(folder)
    if record is None:
        return None
    counts = Counter("done" if outcome.status == "kept" else outcome.status for outcome in record.outcomes)
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "none"


def _fingerprint_of(folder: Path) -> str | None:
    for name in ("card.json", "metrics.json", "summary.json"):
        if (folder / name).is_file():
            found = read_json(folder / name).get("fingerprint")
            return None if found is None else str(found)
    return None


def _slide_folder(path: Path) -> str:
    from pathfm.slides.reader import is_tile_folder
    from pathfm.slides.tile_folder import TileFolder

    if not is_tile_folder(path):
        return _slide(path)
    try:
        tiles = TileFolder(path)
    except UnreadableSlideError as error:
        raise UsageError("nothing that pathfm knows", where=str(path), fix=f"name {KNOWN}") from error
    return _lines(f"folder of tiles {path.name}", [("tiles", len(tiles)), ("first", tiles.names[0]), ("last", tiles.names[-1])])


def _slide(path: Path) -> str:
    from pathfm.slides.discover import SLIDE_SUFFIXES
    from pathfm.slides.reader import open_slide

    try:
        with open_slide(path) as slide:
            reader, facts = slide.name, slide.metadata
    except UnreadableSlideError as error:
        if path.suffix.lower() in SLIDE_SUFFIXES:
            raise
        raise UsageError(f"nothing that pathfm knows ({error.what})", where=str(path), fix=f"name {KNOWN}") from error
    levels = ", ".join(f"{level.size.width} x {level.size.height} (1/{level.downsample:.4g})" for level in facts.levels)
    mpp = f"{facts.mpp.x:.4g} x {facts.mpp.y:.4g} um per px ({facts.mpp_source})" if facts.mpp else None
    unknown = f"unknown{': ' + facts.mpp_source if facts.mpp_source else ''}; give it in the cohort table or by tile.assume_mpp"
    return _lines(
        f"slide {path.name}",
        [
            ("reader", reader),
            ("kind", facts.vendor),
            ("size", f"{facts.size_level0.width} x {facts.size_level0.height} px"),
            ("levels", levels),
            ("mpp", mpp or unknown),
            ("objective", None if facts.objective is None else f"{facts.objective:g}x"),
            ("colour profile", "embedded" if facts.icc_sha256 else "none"),
        ],
    )
