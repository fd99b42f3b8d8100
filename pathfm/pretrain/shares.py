"""How many draws each slide gets per epoch: tiles ** slide_power x weights of groups, held below ``max_repeats``.

Shapes: E entries (a slide at one resolution), G groups of a column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pathfm.config import did_you_mean
from pathfm.errors import UsageError
from pathfm.log import get_log
from pathfm.pretrain.order import UNIT, Indices
from pathfm.pretrain_settings import SamplingSettings

Reals = npt.NDArray[np.float64]

MPP = "mpp"
UNKNOWN = "unknown"
MPP_TOLERANCE = 0.05
"""Tiles this close to a resolution that is named in the settings belong to it: levels of slides are rarely exact."""
ROUNDS = 200
NEAR = 1e-6
TELL = 0.01
"""A group whose share misses the asked one by more than this part of it is worth a warning."""


class Grouping(NamedTuple):
    """The groups of one column: each entry's group by number, and the groups' names and wanted shares (of any sum)."""

    column: str
    code_E: Indices
    names: tuple[str, ...]
    share_G: Reals


def grouping(column: str, value_E: Sequence[str], weights: Mapping[str, float]) -> Grouping:
    """Groups by the values of a column. A value that is not named counts one unit.

    Raises:
        UsageError: a named value that no slide has.
    """
    names, code_E = np.unique(np.asarray(value_E, dtype=object), return_inverse=True)
    known = [str(name) for name in names]
    for value in weights:
        if value not in known:
            hint, has = did_you_mean(value, known), ", ".join(known[:10])
            raise UsageError(
                f"no slide has {column} {value!r}{hint}", where="pretrain.sampling.weights", fix=f"there are {has}"
            )
    share_G = np.array([weights.get(name, 1.0) for name in known])
    return Grouping(column, code_E.reshape(-1).astype(np.int64), tuple(known), share_G)


def mpp_names(mpp_E: Reals, named: Iterable[str]) -> list[str]:
    """The resolution that each entry belongs to: a named one when it is near, else itself to two digits.

    Raises:
        UsageError: a name that is no number.
    """
    try:
        values = {float(name): name for name in named}
    except ValueError as error:
        raise UsageError("mpp must be numbers", where="pretrain.sampling.weights.mpp", fix='as {"0.5": 1}') from error

    def name(mpp: float) -> str:
        if np.isnan(mpp):
            return UNKNOWN
        nearest = min(values, key=lambda value: abs(value - mpp), default=np.inf)
        return values[nearest] if abs(nearest - mpp) <= MPP_TOLERANCE * mpp else f"{mpp:.2g}"

    names = {mpp: name(mpp) for mpp in np.unique(mpp_E).tolist()}
    return [names.get(mpp, UNKNOWN) for mpp in mpp_E.tolist()]


def filled(share_E: Reals, limit_E: Reals, code_E: Indices, total_G: Reals) -> Reals:
    """Divides each group's total among its entries in proportion to their shares, none above its limit [E].

    What an entry cannot take goes to the others of its group in proportion; when all are full, the rest of the total is lost.
    """
    groups, is_open = len(total_G), share_E > 0
    full_E = np.where(is_open, limit_E, 0.0)
    while True:
        taken_G = np.bincount(code_E, np.where(is_open, 0.0, full_E), groups)
        open_G = np.bincount(code_E, np.where(is_open, share_E, 0.0), groups)
        factor_G = np.divide(np.maximum(total_G - taken_G, 0), open_G, out=np.zeros(groups), where=open_G > 0)
        given_E = np.where(is_open, share_E * factor_G[code_E], full_E)
        over = is_open & (given_E > limit_E)
        if not over.any():
            return given_E
        is_open &= ~over


def draws_per_epoch(tiles_E: Indices, groupings: Sequence[Grouping], sampling: SamplingSettings) -> Reals:
    """Draws that every entry gets per epoch [E]; an epoch has as many draws as there are tiles with a chance.

    With ``max_repeats`` below 1 an epoch has that many fewer. Several columns are reconciled by scaling to each in turn
    (iterative proportional fitting, Deming & Stephan 1940). Where limits or columns contradict each other, a warning says which
    group gets what.

    Args:
        tiles_E: used tiles.
        groupings: columns with wanted shares.
        sampling: ``slide_power``, ``max_repeats``.
    """
    share_E = np.where(tiles_E > 0, tiles_E.astype(np.float64) ** sampling.slide_power, 0.0)
    for column in groupings:
        share_E = np.where(column.share_G[column.code_E] > 0, share_E, 0.0)
    used_E = np.where(share_E > 0, tiles_E, 0).astype(np.float64)
    limit_E, everyone = sampling.max_repeats * used_E, np.zeros(len(tiles_E), dtype=np.int64)
    total = np.floor(min(used_E.sum(), limit_E.sum()))
    given_E = share_E
    wanted = [_possible(column, limit_E, total) for column in groupings]
    for _ in range(ROUNDS):
        before_E = given_E
        for column, total_G in zip(groupings, wanted, strict=True):
            given_E = filled(given_E, limit_E, column.code_E, total_G)
        if np.abs(given_E - before_E).max(initial=0) <= NEAR * total / max(1, len(tiles_E)):
            break
    given_E = filled(given_E, limit_E, everyone, np.array([total]))
    for column in groupings:
        _tell(column, limit_E > 0, given_E, sampling.max_repeats)
    return given_E


def _possible(column: Grouping, limit_E: Reals, total: float) -> Reals:
    """Draws of every group: in the wanted ratio, as far as the limits of its slides allow."""
    groups = len(column.share_G)
    limit_G = np.bincount(column.code_E, limit_E, groups).astype(np.float64)
    return filled(np.where(limit_G > 0, column.share_G, 0.0), limit_G, np.zeros(groups, dtype=np.int64), np.array([total]))


def _tell(column: Grouping, has_E: npt.NDArray[np.bool_], given_E: Reals, max_repeats: float) -> None:
    groups = len(column.share_G)
    present_G = np.bincount(column.code_E, has_E, groups) > 0
    wanted_G = np.where(present_G, column.share_G, 0.0)
    given_G = np.bincount(column.code_E, given_E, groups)
    wanted_G, given_G = wanted_G / max(wanted_G.sum(), 1e-300), given_G / max(given_G.sum(), 1e-300)
    missed = [
        f"{name} {given:.1%} instead of {wanted:.1%}"
        for name, given, wanted in zip(column.names, given_G.tolist(), wanted_G.tolist(), strict=True)
        if abs(given - wanted) > TELL * wanted
    ]
    if missed:
        what = "pretrain.sampling.weights: %s gets %s of the draws, because of max_repeats %g or another column"
        get_log(__name__).warning(what, column.column, ", ".join(missed), max_repeats)


def line(draws_E: Reals) -> Indices:
    """Where each entry's stretch of the line ends, in units [E]; the line is a whole number of draws long."""
    total = round(float(draws_E.sum()))
    width_E = np.where(draws_E > 0, np.maximum(np.rint(draws_E * UNIT), 1), 0).astype(np.int64)
    if len(width_E):
        # Rounding leaves a few units over or short; the widest does not notice.
        width_E[np.argmax(width_E)] += total * UNIT - int(width_E.sum())
    return np.cumsum(width_E)
