"""What is known of a slide besides its features: scanner, scale, focus, ink, losses, stain; plain numbers for comparison.

Taken from the tile store alone (attributes, columns of quality, thumbnail), so that slides whose pixels are not stored have
them too. See ``docs/drift.md``.

Legend: N tiles, D features, P pixels of the thumbnail.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathfm.store.tile_store import TileStore

Floats = NDArray[np.float64]
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical density [R, G, B] of haematoxylin, eosin and DAB (Ruifrok and Johnston 2001)."""
UNMIX = np.linalg.inv(STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True))
LEAST_PIXELS, MOST_PIXELS = 100, 100_000
"""Pixels of the thumbnail: fewer tell nothing, more tell nothing new."""
SMALLEST = 0.1
"""Of numbers of which a logarithm is taken."""
PALE = 0.15
"""Optical density below which a pixel is glass."""
DAMAGED = ("damage", "unreadable")
NO_TISSUE = ("no tissue", "outside")
"""Fates of tiles in the store's counts."""


@dataclass(frozen=True)
class Watched:
    """A number that is compared with the training.

    Attributes:
        name: key of ``SlideFacts.numbers``.
        label: what people call it, with its unit.
        low: what a slide far below the training is; empty: that is no news.
        high: the same above.
        least: a difference that nobody would call one, in units of ``scaled``.
        form: how it is written.
        scale: ``log``: ratios count; ``root``: of shares that are mostly zero, whose few large values would hide others.
    """

    name: str
    label: str
    low: str
    high: str
    least: float
    form: str = ".3g"
    scale: Literal["", "log", "root"] = ""

    def scaled(self, value: float | None) -> float:
        """The number as it is compared; NaN where it is not known."""
        if value is None:
            return math.nan
        if self.scale == "log":
            return math.log(max(value, SMALLEST))
        return math.sqrt(max(value, 0.0)) if self.scale == "root" else value

    def words(self, value: float) -> str:
        """The number as it is written, large ones without an exponent."""
        text = f"{value:{self.form}}"
        return f"{float(text):.0f}" if "e+" in text else text

    def unscaled(self, value: float) -> float:
        """Back from ``scaled``."""
        if self.scale == "root":
            return min(max(value, 0.0) ** 2, 1.0)
        return math.exp(value) if self.scale == "log" else value


SHARE = ".1%"
WATCHED = (
    Watched(
        "sharpness", "sharpness", "blurrier than the training slides", "sharper than the training slides", 0.1, ".3g", "log"
    ),
    Watched("tiles", "tiles with tissue", "little tissue", "", 0.2, ".0f", "log"),
    Watched("pen", "share of pen", "", "much pen", 0.07, SHARE, "root"),
    Watched("dropped", "share of tiles dropped", "", "filters dropped many tiles", 0.1, SHARE, "root"),
    Watched("damage", "share of damaged tiles", "", "many tiles are damaged or unreadable", 0.07, SHARE, "root"),
    Watched("white", "share of white", "", "tissue is paler or more torn than in training", 0.01, SHARE),
    Watched("haematoxylin", "haematoxylin [OD]", "little haematoxylin (blue)", "much haematoxylin (blue)", 0.01),
    Watched("eosin", "eosin [OD]", "little eosin (pink)", "much eosin (pink)", 0.01),
    Watched("other", "other colour [OD]", "hue unlike the training", "hue unlike the training: brown or grey", 0.01),
    Watched(
        "glass", "brightness of glass", "glass is darker than in training", "glass is brighter than in training", 1.0, ".0f"
    ),
    Watched("features", "distance of features", "", "features are far from the training", 0.05),
)
BY_NAME: Mapping[str, Watched] = {watched.name: watched for watched in WATCHED}
"""What is watched, in the order in which it is told. ``features`` is measured by a ``DriftReference``."""


@dataclass(frozen=True)
class SlideFacts:
    """What is known of one slide. What is not known is None.

    Attributes:
        scanner: vendor of the scanner, or kind of the file.
        mpp: of the slide's full resolution [um per px].
        tiles: kept.
        dropped: tiles of tissue that were lost, by reason.
        numbers: by name of ``WATCHED``.
    """

    scanner: str | None
    mpp: float | None
    tiles: int
    dropped: Mapping[str, int]
    numbers: Mapping[str, float | None]

    def record(self) -> dict[str, Any]:
        """JSON values; ``facts_from_record`` gives the same back."""
        return {**vars(self), "dropped": dict(self.dropped), "numbers": dict(self.numbers)}


def facts_from_record(record: Mapping[str, Any]) -> SlideFacts:
    """What ``SlideFacts.record`` recorded."""
    known = {watched.name: record["numbers"].get(watched.name) for watched in WATCHED}
    return SlideFacts(record["scanner"], record["mpp"], record["tiles"], record["dropped"], known)


def measure(store: TileStore) -> SlideFacts:
    """Everything but the distance of the features.

    Raises:
        StoreError: an array of the store is damaged.
    """
    counts: Mapping[str, int] = store.attrs.get("counts") or {}
    # Tiles of further resolutions are counted as "kept at ...".
    lost = {
        name: count
        for name, count in sorted(counts.items())
        if name not in {"grid", "kept", "files", *NO_TISSUE} and not name.startswith("kept at ")
    }
    mpp = store.attrs.get("slide_mpp") or [store.mpp]
    numbers = {**dict.fromkeys(watched.name for watched in WATCHED), **_of_tiles(store, lost), **_of_thumbnail(store)}
    rounded = {name: None if value is None else float(f"{value:.6g}") for name, value in numbers.items()}
    known_mpp = None if mpp[0] is None else float(f"{float(np.mean(mpp)):.4g}")
    return SlideFacts(store.attrs.get("vendor"), known_mpp, len(store), lost, rounded)


def mean_of(features_ND: ArrayLike) -> Floats:
    """Mean feature [D] of tiles [N, D]; a mean that is given as [1, D] or [D] is its own."""
    return np.asarray(np.atleast_2d(np.asarray(features_ND)).mean(axis=0, dtype=np.float64))


def _of_tiles(store: TileStore, lost: Mapping[str, int]) -> dict[str, float | None]:
    """Of the tiles that were kept and those that the filters dropped."""
    total = len(store) + sum(lost.values())
    found: dict[str, float | None] = {"tiles": float(len(store))}
    if not total or "counts" not in store.attrs:
        return found
    found["dropped"] = 1 - len(store) / total
    found["damage"] = sum(lost.get(name, 0) for name in DAMAGED) / total
    if not len(store):
        return found
    column = {name: store.quality[:, place] for place, name in enumerate(store.quality_names)}
    for name, source in (("sharpness", "blur"), ("white", "white")):
        if source in column:
            found[name] = float(np.median(column[source]))
    if "pen" in column:
        found["pen"] = (float(column["pen"].sum(dtype=np.float64)) + lost.get("pen", 0)) / total
    return found


def _of_thumbnail(store: TileStore) -> dict[str, float | None]:
    """Mean amounts of stain in the tissue, relative to the glass, and how bright the glass is."""
    rgb_P3 = store.thumbnail.reshape(-1, 3)
    tissue_P = np.ones(len(rgb_P3), dtype=bool) if store.tissue is None else store.tissue.ravel()
    # Every other pixel or so: the mean of a hundred thousand is as good as that of a million.
    step = max(1, len(rgb_P3) // MOST_PIXELS)
    rgb_P3, tissue_P = rgb_P3[::step], tissue_P[::step]
    glass_P3, found = rgb_P3[~tissue_P], dict[str, float | None]()
    glass_3 = np.full(3, 255.0)
    if len(glass_P3) >= LEAST_PIXELS:
        glass_3 = np.maximum(np.median(glass_P3, axis=0), 1.0)
        found["glass"] = float(glass_3.mean())
    level_256 = np.maximum(np.arange(256.0), 1.0)
    density_P3 = np.stack([np.log10(glass_3[c] / level_256)[rgb_P3[tissue_P, c]] for c in range(3)], axis=1)
    density_P3 = density_P3[density_P3.max(axis=1) >= PALE]
    if len(density_P3) >= LEAST_PIXELS:
        amounts = density_P3.mean(axis=0) @ UNMIX
        found |= {name: float(value) for name, value in zip(("haematoxylin", "eosin", "other"), amounts, strict=True)}
    return found
