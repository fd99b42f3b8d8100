"""What happens to a tile between reading and storing: colour, quality, filters, encoding. Runs in decoding threads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pathfm.slides.tile_reading import TileRead
from pathfm.store.tile_store import TileCodec
from pathfm.study import FilterSettings, TileSettings
from pathfm.tile.quality import Quality, measure, removed_by

Pixels = npt.NDArray[np.uint8]

KEPT, NO_TISSUE, OUTSIDE, UNREADABLE = "kept", "no tissue", "outside", "unreadable"


class Finished(NamedTuple):
    """A tile as it is stored: its fate (kept, or the reason it is dropped), its quality columns, its bytes."""

    fate: str
    quality: Sequence[float]
    data: bytes = b""


@dataclass(frozen=True)
class Finisher:
    """Turns tiles that were read into tiles that are stored, or drops them with the reason.

    Attributes:
        settings: edge policy, filters.
        codec: how pixels are encoded; a tile's own JPEG stream goes before it.
        tissue: share of each tile of the grid that is tissue [N].
        recolour: colour transforms, applied in order.
    """

    settings: TileSettings
    codec: TileCodec
    tissue: npt.NDArray[np.float32]
    recolour: Sequence[Callable[[Pixels], Pixels]] = ()

    @property
    def quality_names(self) -> tuple[str, ...]:
        """Columns of the quality array."""
        return Quality._fields if self.settings.filters.measure else ("tissue", "outside")

    @property
    def filters(self) -> FilterSettings:
        """The filters that apply: in fluorescence, black is the background, and every lit pixel has the colour of some ink."""
        filters = self.settings.filters
        dark = self.settings.tissue.background == "dark"
        return filters.model_copy(update={"max_black": 1.0, "max_pen": 1.0}) if dark else filters

    def __call__(self, index: int, tile: TileRead) -> Finished:
        """Finishes tile ``index`` of the grid."""
        tissue = float(self.tissue[index])
        if tile.outside > 0 and self.settings.edge == "drop":
            return Finished(OUTSIDE, ())
        pixels = tile.pixels
        quality: Sequence[float] = (tissue, tile.outside)
        if self.settings.filters.measure and pixels is not None:
            # Before colours change: normalisation turns pen ink into stain.
            quality = measured = measure(pixels, tissue, tile.outside)
            reason = removed_by(measured, self.filters)
            if reason:
                return Finished(reason, quality)
        if tile.stored is not None or self.codec.name == "none" or pixels is None:
            return Finished(KEPT, quality, tile.stored or b"")
        for transform in self.recolour:
            pixels = transform(pixels)
        return Finished(KEPT, quality, self.codec.encode(pixels))


def counted(fates: Sequence[str]) -> dict[str, int]:
    """How many tiles of a grid met which fate: grid, kept, and each reason that occurred."""
    reasons = Counter(fates)
    kept = reasons.pop(KEPT, 0)
    return {"grid": len(fates), KEPT: kept, **dict(sorted(reasons.items()))}


def why_empty(counts: dict[str, int], nothing_fits: str) -> str:
    """Why a slide gave no tile, or nothing when it gave some.

    Args:
        counts: of ``counted``.
        nothing_fits: what to say of a grid without tiles.
    """
    if counts[KEPT]:
        return ""
    if not counts["grid"]:
        return nothing_fits
    dropped = ", ".join(f"{name} {count}" for name, count in counts.items() if name not in {"grid", KEPT} and count)
    return f"no tile of {counts['grid']} was kept: {dropped}"
