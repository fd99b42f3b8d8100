"""What surrounds the extract stage: slides that were never tiled, and stores that leave their pixels in the slides."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pathfm.errors import UsageError
from pathfm.log import say
from pathfm.store.cohort import SlideRow
from pathfm.store.tile_store import TileStore
from pathfm.study import ExtractSettings, Study, TileSettings
from pathfm.workflow import STUDY_SUFFIXES, Run, open_study, own_encoder, stores_of, study_from_sources

if TYPE_CHECKING:
    from pathfm.extract.sets import FeatureSets
    from pathfm.extract.stage import Extraction

OF_ENCODER = (
    "encoder_sha256",
    "also",
    "weights",
    "pooling",
    "input_px",
    "precision",
    "symmetry",
    "scales",
    "merge_tokens",
    "dense",
    "slide_vectors",
)
"""Settings that are asked of one encoder."""


def study_for_extraction(sources: Sequence[str], overrides: Sequence[str]) -> tuple[Study, bool]:
    """The study that ``pathfm extract SOURCES`` means, and whether its slides are to be tiled first.

    Slides and tables, unlike a study or an output folder, are tiled as the encoder wants them, and their pixels are not kept.

    Raises:
        UsageError: slides without an encoder or an output folder.
    """
    if len(sources) == 1 and (Path(sources[0]).suffix.lower() in STUDY_SUFFIXES or (Path(sources[0]) / "study.yaml").is_file()):
        return _kept_study(Path(sources[0]), overrides), False
    given = dict(override.partition("=")[::2] for override in overrides)
    if given.get("extract.encoder", "pretrained") == "pretrained":
        raise UsageError(
            "slides need an encoder", where="extract.encoder", fix="add --encoder NAME (`pathfm encoders` lists them)"
        )
    if not (Path(given.get("out", "")) / "study.yaml").is_file():
        from pathfm.models.cards import find_card

        card, wanted = find_card(given["extract.encoder"]), {"tile.codec": "none"}
        if card is not None and card.tile_px and card.mpp:
            wanted |= {"tile.tile_px": str(card.tile_px), "tile.mpp": str(card.mpp[0])}
        overrides = [*(f"{name}={value}" for name, value in wanted.items() if name not in given), *overrides]
    return study_from_sources(sources, overrides, "extract"), True


def _kept_study(source: Path, overrides: Sequence[str]) -> Study:
    """The study of a file or folder. Another encoder does not inherit what was asked of the one before.

    Raises:
        UsageError: another output folder for a folder that has its own.
    """
    given = dict(override.partition("=")[::2] for override in overrides)
    if source.is_dir() and "out" in given and Path(given["out"]).absolute() != source.absolute():
        raise UsageError("the features of an output folder go into it", where="--out", fix="leave it out, or name the slides")
    kept = open_study(source)
    if not source.is_dir() or given.get("extract.encoder", kept.extract.encoder) == kept.extract.encoder:
        return open_study(source, overrides, "extract")
    plain = ExtractSettings()
    forgotten = [name for name in OF_ENCODER if getattr(kept.extract, name) != getattr(plain, name)]
    left = [f"extract.{name}={json.dumps(plain.model_dump(mode='json')[name])}" for name in forgotten]
    told = [name for name in forgotten if f"extract.{name}" not in given]
    if told:
        say(f"note: what was set for {kept.extract.encoder} does not hold for another encoder: {', '.join(told)}")
    return open_study(source, [*left, *overrides], "extract")


def check_encoders(run: Run) -> None:
    """Loads all encoders once, so that what is wrong with them is known before slides are tiled.

    Raises:
        UsageError: there is no such encoder, or its weights are not to be had here.
    """
    from pathfm.compute import pick_device
    from pathfm.extract.sets import load_sets

    load_sets(run.study, run.layout, own_encoder(run), pick_device(run.study.compute))


def run_extraction(run: Run, sets: FeatureSets | None = None) -> Extraction:
    """The extract stage on up-to-date stores, noted; ``sets``: encoders that are loaded already."""
    from pathfm.extract.stage import run_extract

    stores_of(run)
    rows = {row.slide_id: row for row in run.cohort.rows}
    pixels_of = partial(_slide_pixels, rows, run.study.tile)
    extraction = run_extract(run.study, run.cohort, run.layout, own_encoder(run), run.stale, pixels_of, sets)
    run.note(extraction.report)
    if extraction.report.statuses["done"]:
        say(f"features: {extraction.sets['main'].folder}")
    if extraction.vectors:
        run.note(extraction.vectors)
    return extraction


def read_tile(run: Run, store: TileStore, tile: int) -> npt.NDArray[np.uint8] | None:
    """A tile [H, W, 3] of a store without pixels, from its slide; None where it cannot be read."""
    from pathfm.tile.pixels import slide_pixels

    row = next(row for row in run.cohort.rows if row.slide_id == store.slide_id)
    return next(slide_pixels(row, run.study.tile, store, 1, [tile]), None)


def _slide_pixels(
    rows: Mapping[str, SlideRow], settings: TileSettings, store: TileStore, threads: int
) -> Iterator[npt.NDArray[np.uint8] | None]:
    """Tiles of a store without pixels, read from its slide."""
    from pathfm.tile.pixels import slide_pixels

    return slide_pixels(rows[store.slide_id], settings, store, threads)
