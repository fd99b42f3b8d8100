"""What is taken over from another tool's file: where the tiles lie, and nothing about people, machines or dates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pathfm.geometry import Size

MAX_TILES = 10_000_000
"""More rows than this in a file are damage, not tiles."""
MAX_PLACE = 2.0**31
"""No slide has coordinates beyond this [level-0 px]."""


class UnfitError(ValueError):
    """Why tiles cannot be taken from a file; ``read_coords`` makes a ``StoreError`` of it, which names the file."""


@dataclass(frozen=True)
class ForeignTiles:
    """The tiles that another tool chose on a slide.

    Attributes:
        tool: who wrote the file.
        xy_level0: [N, 2] upper left corners in level-0 pixels, in the order of the file. Orders differ between tools and
            between runs, and tiles may overhang the slide: join by coordinate.
        side_level0: side of the square that one tile covers [level-0 px].
        tile_px: side of the picture that the tool makes of it [px], None when the file does not say.
        mpp: micrometres per pixel of that picture by the tool's own account, None when the file does not say.
        size_level0: size of the slide by the tool's account, None when the file does not say.
    """

    tool: str
    xy_level0: npt.NDArray[np.float64]
    side_level0: float
    tile_px: int | None = None
    mpp: float | None = None
    size_level0: Size | None = None

    def __post_init__(self) -> None:
        if self.xy_level0.ndim != 2 or self.xy_level0.shape[1] != 2:
            raise UnfitError(f"coordinates of shape {self.xy_level0.shape}")
        if not np.all(np.abs(self.xy_level0) < MAX_PLACE):
            raise UnfitError("coordinates that are no numbers, or lie on no slide")
        if not 0 < self.side_level0 < MAX_PLACE:
            raise UnfitError(f"tiles of {self.side_level0:g} level-0 px")


def number(facts: Mapping[str, Any], name: str) -> float | None:
    """A finite number from a file's attributes; None when it is absent, or a word such as 'None' stands for it."""
    try:
        value = float(np.asarray(facts[name]).item())
    except (KeyError, TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def positive(facts: Mapping[str, Any], name: str) -> float | None:
    """A positive number from a file's attributes; None when there is none."""
    value = number(facts, name)
    return value if value is not None and value > 0 else None


def needed(facts: Mapping[str, Any], name: str) -> float:
    """A positive number that the file must have.

    Raises:
        UnfitError: it has none.
    """
    value = positive(facts, name)
    if value is None:
        raise UnfitError(f"no usable {name}")
    return value


def whole(value: float | None) -> int | None:
    """A count of pixels, if there is one."""
    return None if value is None else round(value)
