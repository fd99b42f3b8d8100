"""Stage 3: tile stores x encoders -> feature files. Tiles are decoded once for all encoders, ahead of the device."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pathfm.compute import pick_device, use_threads
from pathfm.config import fingerprint
from pathfm.errors import PathfmError, StoreError
from pathfm.extract.colour import colour_histogram
from pathfm.faults import crash_point
from pathfm.log import get_log, track
from pathfm.models.encoders import Encode, effective_mpp, load_encoder
from pathfm.store.cohort import Cohort
from pathfm.store.commit import sweep
from pathfm.store.feature_file import read_feature_attrs, write_features
from pathfm.store.layout import Layout
from pathfm.store.record import Outcome, StageReport, write_record
from pathfm.store.tile_store import TileStore, open_tiles
from pathfm.study import ExtractSettings, Study

VERSION = 1
"""Raised whenever the features of the same tiles change."""
AHEAD = 4
"""Batches decoded ahead of the device."""
COLOUR = "colour-histogram"

log = get_log(__name__)


@dataclass(frozen=True)
class FeatureSet:
    """One encoder of a run and where its features go.

    Attributes:
        role: main, untrained or colour.
        name: what reports call it.
        recipe: everything that decides the features, for the attributes and the fingerprint.
        folder: feature files of this encoder.
    """

    role: str
    name: str
    recipe: Mapping[str, Any]
    folder: Path

    def fingerprint(self, store: TileStore) -> str:
        """What a feature file depends on."""
        return fingerprint({"version": VERSION, "recipe": dict(self.recipe), "store": store.fingerprint})


@dataclass(frozen=True)
class Extraction:
    """What the stage did and where its feature sets lie, by role."""

    report: StageReport
    sets: Mapping[str, FeatureSet]


def run_extract(
    study: Study, cohort: Cohort, layout: Layout, own_encoder: Path | None = None, stale_tiles: Collection[str] = ()
) -> Extraction:
    """Writes the feature files of every slide that has tiles and whose files are absent or stale.

    Args:
        study: all settings.
        cohort: the slides.
        layout: where stores are and features go.
        own_encoder: folder of the study's own encoder, for ``extract.encoder=pretrained``.
        stale_tiles: slides whose store is not what tiling would make now; they count as failed.
    """
    started = datetime.datetime.now(datetime.UTC)
    use_threads(study.compute)
    encoders = list(_encoders(study, layout, own_encoder))
    for features, _ in encoders:
        sweep(features.folder)
    outcomes: dict[str, Outcome] = {}
    work: list[tuple[TileStore, list[int]]] = []
    for row in cohort.rows:
        store = None if row.slide_id in stale_tiles else _usable(row.slide_id, layout, outcomes)
        if row.slide_id in stale_tiles:
            outcomes[row.slide_id] = Outcome(row.slide_id, "failed", "its tiles are stale (run `pathfm tile`)")
        if store is None:
            continue
        stale = [number for number, (features, _) in enumerate(encoders) if not _is_current(features, store)]
        if stale:
            work.append((store, stale))
        else:
            outcomes[row.slide_id] = Outcome(row.slide_id, "kept", counts={"tiles": len(store)})
    for store, stale in track(work, "extract", len(work)):
        outcomes[store.slide_id] = _extract_slide(store, [encoders[number] for number in stale], study)
    report = StageReport("extract", tuple(outcomes[row.slide_id] for row in cohort.rows))
    sets = {features.role: features for features, _ in encoders}
    if work:
        for features in sets.values():
            write_record(features.folder, report, study.extract, started)
    return Extraction(report, sets)


def _encoders(study: Study, layout: Layout, own: Path | None) -> Iterator[tuple[FeatureSet, Encode]]:
    """The main encoder and the controls, loaded."""
    device = pick_device(study.compute)
    for role, (label, name) in _encoder_names(study.extract, own).items():
        encoder = load_encoder(name, study.extract, device)
        recipe = {**asdict(encoder.recipe), "encoder": label, "dtype": study.extract.dtype}
        yield _feature_set(role, label, recipe, layout), encoder
    if study.extract.controls:
        yield _feature_set("colour", COLOUR, {"encoder": COLOUR, "dtype": study.extract.dtype}, layout), colour_histogram


def _encoder_names(settings: ExtractSettings, own: Path | None) -> dict[str, tuple[str, str]]:
    """By role: what folders and reports call the encoder, and the name it is loaded by."""
    if settings.encoder != "pretrained":
        # A folder is named without its path: where it lies is nobody's business, and its weights are hashed anyway.
        scheme, _, rest = settings.encoder.partition(":")
        label = f"{scheme}:{Path(rest).name}" if scheme == "local-dir" else settings.encoder
        names = {"main": (label, settings.encoder)}
        if settings.controls and settings.encoder.startswith("timm:"):
            untrained = settings.encoder.replace("timm:", "untrained:", 1)
            names["untrained"] = (untrained, untrained)
        return names
    if own is None or not (own / "teacher" / "config.json").is_file():
        raise StoreError(
            "the study has no encoder yet", where=str(own or ""), fix="run `pathfm pretrain`, or set extract.encoder=timm:NAME"
        )
    names = {"main": ("pretrained", f"local-dir:{own / 'teacher'}")}
    if settings.controls:
        names["untrained"] = ("untrained", f"local-dir:{own / 'untrained'}")
    return names


def _feature_set(role: str, name: str, recipe: Mapping[str, Any], layout: Layout) -> FeatureSet:
    return FeatureSet(role, name, recipe, layout.features(name, fingerprint({"version": VERSION, "recipe": dict(recipe)})))


def _usable(slide_id: str, layout: Layout, outcomes: dict[str, Outcome]) -> TileStore | None:
    """The slide's tile store if it has tiles; else its outcome is noted."""
    try:
        store = open_tiles(layout.store(slide_id))
    except StoreError:
        outcomes[slide_id] = Outcome(slide_id, "failed", "no tile store: tiling failed or was not run")
        return None
    if not len(store):
        outcomes[slide_id] = Outcome(slide_id, "empty", str(store.attrs.get("empty_reason") or "no tiles"))
        return None
    return store


def _is_current(features: FeatureSet, store: TileStore) -> bool:
    attrs = read_feature_attrs(features.folder / f"{store.slide_id}.h5")
    return attrs is not None and attrs.get("fingerprint") == features.fingerprint(store)


def _extract_slide(store: TileStore, encoders: list[tuple[FeatureSet, Encode]], study: Study) -> Outcome:
    try:
        rows: list[list[npt.NDArray[np.float32]]] = [[] for _ in encoders]
        for tiles in _batches(store, study.compute.batch_size):
            for collected, (_, encode) in zip(rows, encoders, strict=True):
                collected.append(encode(tiles))
        crash_point("extract.slide")
        for collected, (features, _) in zip(rows, encoders, strict=True):
            _write(features, store, np.concatenate(collected), study)
    except PathfmError as error:
        return Outcome(store.slide_id, "failed", error.reason)
    return Outcome(store.slide_id, "done", counts={"tiles": len(store)})


def _batches(store: TileStore, size: int) -> Iterator[npt.NDArray[np.uint8]]:
    """All tiles in order, decoded by threads a few batches ahead of use (decoding releases the interpreter lock)."""
    starts = iter(range(0, len(store), size))
    # The shard index is cached per reader and not locked: each batch reads through its own, cheap to open.
    read = lambda start: open_tiles(store.path).read(range(start, min(start + size, len(store))))  # noqa: E731
    with ThreadPoolExecutor(2) as pool:
        waiting: list[Future[npt.NDArray[np.uint8]]] = [pool.submit(read, start) for start in islice(starts, AHEAD)]
        while waiting:
            tiles = waiting.pop(0).result()
            waiting += [pool.submit(read, start) for start in islice(starts, 1)]
            yield tiles


def _write(features: FeatureSet, store: TileStore, values: npt.NDArray[np.float32], study: Study) -> None:
    input_px = int(features.recipe.get("input_px", store.tile_px))
    mpp = effective_mpp(store.mpp, store.tile_px, input_px)
    attrs: dict[str, str | int | float | bool] = {
        "slide_id": store.slide_id,
        "fingerprint": features.fingerprint(store),
        "store_fingerprint": store.fingerprint,
        "tile_px": store.tile_px,
        "tile_side_level0": store.tile_side_level0,
        "mpp": store.mpp if store.mpp is not None else float("nan"),
        "effective_mpp": mpp if mpp is not None else float("nan"),
        "coords_synthetic": store.coords_synthetic,
        **{f"recipe_{key}": str(value) for key, value in features.recipe.items()},
    }
    write_features(features.folder / f"{store.slide_id}.h5", values.astype(study.extract.dtype), store.xy_level0, attrs)
