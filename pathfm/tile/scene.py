"""A slide at low power: its scale, its tissue, its grids. What tiling and the check before it decide on, in one place."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pathfm.errors import MissingMppError, SlideError
from pathfm.geometry import Mpp
from pathfm.slides.reader import SlideMetadata, SlideReader
from pathfm.store.cohort import SlideRow
from pathfm.store.interop import find_coords, read_coords
from pathfm.store.interop.annotations import Annotations, load_annotations
from pathfm.study import ColourSettings, TileSettings
from pathfm.tile.annotations import apply_annotations, unmatched_classes
from pathfm.tile.colour import Recolour, icc_to_srgb, make_normaliser
from pathfm.tile.grid import Grid, grid_at, plan_grids
from pathfm.tile.task import ASSUMED, UNKNOWN
from pathfm.tile.tissue import Mask, mask_fractions, tissue_mask

Pixels = npt.NDArray[np.uint8]

GIVE_MPP = "set `mpp` for it in the cohort table or pass `--set tile.assume_mpp=MPP`"
"""Every command that reads slides takes both."""
SAME_MPP = 0.02
"""The cohort table and the file may differ by this share in the mpp before it is worth a note."""


class Scale(NamedTuple):
    """Micrometres per level-0 pixel, where they come from, and what contradicts them."""

    mpp: Mpp | None
    source: str
    notes: tuple[str, ...] = ()


class Scene(NamedTuple):
    """A slide at low power: thumbnail [h, w, 3] and its downsample, tissue mask [h, w], what is odd about its annotations."""

    thumbnail: Pixels
    downsample: float
    mask: Mask
    notes: tuple[str, ...] = ()

    def tissue(self, grid: Grid) -> npt.NDArray[np.float32]:
        """Share of each tile of a grid that is tissue [N]."""
        return mask_fractions(self.mask, grid.cells / self.downsample)


class Colours(NamedTuple):
    """What happens to a slide's colours.

    Attributes:
        thumbnail: that of the scene, with the scanner's profile applied if tiles have it applied [h, w, 3].
        recolour: changes of the tiles' colours, in order.
        normalised: the stain normalisation among them: none, reinhard or macenko.
    """

    thumbnail: Pixels
    recolour: tuple[Recolour, ...]
    normalised: str


def slide_scale(facts: SlideMetadata, row: SlideRow, settings: TileSettings) -> Scale:
    """Micrometres per pixel: of the cohort table, the file, or the assumption, in this order.

    Raises:
        MissingMppError: none of them says it, and the tiles need it.
    """
    notes = facts.notes
    if row.mpp:
        if facts.mpp and abs(row.mpp / facts.mpp.mean - 1) > SAME_MPP:
            notes += (f"the cohort table says {row.mpp:.4g} mpp, the file {facts.mpp.mean:.4g}",)
        # The table has one number; pixels that the file says are not square stay so.
        factor = row.mpp / facts.mpp.mean if facts.mpp else 1.0
        mpp = Mpp(facts.mpp.x * factor, facts.mpp.y * factor) if facts.mpp else Mpp(row.mpp, row.mpp)
        return Scale(mpp, "cohort table", notes)
    if facts.mpp:
        return Scale(facts.mpp, facts.mpp_source, notes)
    if settings.assume_mpp:
        return Scale(Mpp(settings.assume_mpp, settings.assume_mpp), ASSUMED, notes)
    if settings.mpp == "native":
        return Scale(None, UNKNOWN, notes)
    found = f" ({facts.mpp_source})" if facts.mpp_source else ""
    raise MissingMppError(f"no mpp in the file{found}", fix=GIVE_MPP)


def look(reader: SlideReader, mpp: Mpp | None, row: SlideRow, settings: TileSettings) -> Scene:
    """The slide at low power, and its tissue by the settings and the slide's annotations.

    Raises:
        SlideError: no picture can be made, or its tissue cannot be told.
    """
    thumbnail, downsample = reader.thumbnail(settings.tissue.thumbnail_px)
    mask = tissue_mask(thumbnail, mpp.mean * downsample if mpp else None, settings.tissue)
    if settings.tissue.annotations is None:
        return Scene(thumbnail, downsample, mask)
    file = annotation_file(row, settings)
    drawn = load_annotations(file) if file else Annotations()
    odd = unmatched_classes(drawn, settings.tissue) if file else "no file of annotations for this slide"
    return Scene(thumbnail, downsample, apply_annotations(mask, drawn, downsample, settings.tissue), (odd,) if odd else ())


def slide_colours(reader: SlideReader, scene: Scene, settings: ColourSettings) -> Colours:
    """How the colours of a slide change: the scanner's profile first, then the normalisation of its stain.

    Raises:
        SlideError: the profile cannot be applied.
    """
    profile = reader.icc_profile() if settings.icc else None
    recolour = (icc_to_srgb(profile),) if profile else ()
    thumbnail = recolour[0](scene.thumbnail) if recolour else scene.thumbnail
    normaliser = make_normaliser(settings, thumbnail, scene.mask)
    if normaliser is None:
        return Colours(thumbnail, recolour, "none")
    return Colours(thumbnail, (*recolour, normaliser), settings.normalise)


def annotation_file(row: SlideRow, settings: TileSettings) -> Path | None:
    """The slide's file of annotated regions, if there is one."""
    file = settings.tissue.annotations / f"{row.slide_id}.geojson" if settings.tissue.annotations else None
    return file if file is not None and file.is_file() else None


def slide_grids(facts: SlideMetadata, mpp: Mpp | None, row: SlideRow, settings: TileSettings) -> list[Grid]:
    """The grids of all wanted resolutions, or the tiles that another tool chose.

    Raises:
        SlideError: tiles would be finer than the slide, or another tool's file is absent.
        StoreError: that file cannot be read.
    """
    if settings.coords is None:
        return plan_grids(facts.levels, mpp, settings)
    file = find_coords(settings.coords, row.slide_id)
    if file is None:
        raise SlideError("no file of coordinates for this slide", where=str(settings.coords), fix="check tile.coords")
    theirs = read_coords(file, mpp)
    if theirs.size_level0 and theirs.size_level0 != facts.size_level0:
        raise SlideError("these coordinates were made on a slide of another size", where=str(file), fix="check tile.coords")
    return [grid_at(facts.levels, mpp, theirs.xy_level0, theirs.side_level0, settings)]
