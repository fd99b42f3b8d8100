"""``pathfm inspect`` of a feature file, or of a folder of them: are these features sound, and which slides stand out?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathfm.errors import StoreError
from pathfm.log import track
from pathfm.stats.feature_health import LEAST_SLIDES, Health, HealthCheck
from pathfm.store.feature_file import open_features

Facts = list[tuple[str, object]]

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
NAMED_SLIDES = 20
"""Slides that stand out and are named; the others are counted."""


class _Kind(NamedTuple):
    """What all feature files of a folder should agree in."""

    dim: int
    dtype: str
    recipe: tuple[tuple[str, str], ...]


def feature_file_facts(path: Path) -> Facts:
    """What a feature file holds, and its health.

    Raises:
        StoreError: absent, damaged, foreign, or of a newer version.
    """
    file = open_features(path)
    check = HealthCheck(file.features.shape[1])
    check.add(path.stem, file.features, file.valid)
    health = check.finish()
    reasons = [reason for found in health.outliers.values() for reason in found]
    facts: Facts = [("features", f"{health.tiles:,} tiles x {health.dim}, {file.features.dtype}"), *_health_facts(health)]
    facts += [("stands out", reason) for reason in reasons if "unusable" not in reason]
    return [*facts, *sorted(file.attrs.items())]


def feature_folder_facts(folder: Path) -> Facts:
    """What a folder of feature files holds: the health of all together, and the slides that stand out, with the reasons.

    Files that cannot be read, and files of another length, type or recipe than most, are named and left out of the numbers.

    Raises:
        StoreError: none of the files can be read.
    """
    paths = sorted(folder.glob("*.h5"), key=lambda path: path.stem)
    checks: dict[int, HealthCheck] = {}
    kinds: dict[str, _Kind] = {}
    reasons: dict[str, tuple[str, ...]] = {}
    for path in track(paths, "inspect", len(paths)):
        try:
            file = open_features(path)
        except StoreError as error:
            reasons[path.stem] = (error.what,)
            continue
        dim = file.features.shape[1]
        kinds[path.stem] = _Kind(dim, str(file.features.dtype), _recipe(file.attrs))
        checks.setdefault(dim, HealthCheck(dim)).add(path.stem, file.features, file.valid)
    if not kinds:
        raise StoreError("no feature file can be read", where=str(folder), fix="run `pathfm extract` again")
    usual = min(Counter(kinds.values()).items(), key=lambda item: (-item[1], item[0]))[0]
    health = checks[usual.dim].finish()
    for slide_id, kind in kinds.items():
        reasons[slide_id] = (*_differs(kind, usual), *health.outliers.get(slide_id, ()))
    facts: Facts = [
        ("slides", f"{len(health.slides):,}"),
        ("features", f"{health.tiles:,} tiles x {usual.dim}, {usual.dtype}"),
        ("recipe", ", ".join(f"{name} {_short(value)}" for name, value in usual.recipe) or None),
        ("tiles per slide", _quantiles([slide.tiles for slide in health.slides], ",.0f")),
        *_health_facts(health),
    ]
    return facts + list(_outlier_facts(reasons, len(health.slides)))


def _health_facts(health: Health) -> Facts:
    usable = health.tiles - health.unusable
    sampled = f"; of a sample of {health.sampled:,} tiles" if health.sampled < usable else ""
    share = health.slide_share
    return [
        ("unusable rows", f"{health.unusable:,} (NaN, infinity, or marked as invalid)"),
        ("row norms", _quantiles(health.norm_N)),
        ("constant", f"{health.constant} of {health.dim} dimensions, {health.zero} of them zero" if usable > 1 else None),
        ("copies", f"{health.copies:,} rows equal an earlier one"),
        ("near copies", f"{health.near_copies:,} of the other {health.distinct:,} rows nearly equal another{sampled}"),
        ("effective rank", health.rank and f"{health.rank:.1f} of {min(health.dim, health.sampled)} (RankMe){sampled}"),
        ("slide effect", None if share is None else f"{share:.0%} of the variance lies between slides{sampled}"),
    ]


def _outlier_facts(reasons: Mapping[str, Sequence[str]], slides: int) -> Iterator[tuple[str, object]]:
    named = {slide_id: found for slide_id, found in sorted(reasons.items()) if found}
    few = f"; with fewer than {LEAST_SLIDES} slides means and norms are not compared" if slides < LEAST_SLIDES else ""
    yield "stand out", f"{len(named) or 'no'} slide{'s' * (len(named) != 1)}{few}"
    for slide_id, found in list(named.items())[:NAMED_SLIDES]:
        yield f"  {slide_id}", "; ".join(found)
    if len(named) > NAMED_SLIDES:
        yield "  ...", f"and {len(named) - NAMED_SLIDES} more"


def _differs(kind: _Kind, usual: _Kind) -> Iterator[str]:
    """What sets a file apart from most."""
    if kind.dim != usual.dim:
        yield f"{kind.dim} dimensions, most slides have {usual.dim}"
    if kind.dtype != usual.dtype:
        yield f"{kind.dtype}, most slides are {usual.dtype}"
    if kind.recipe != usual.recipe:
        mine, most = dict(kind.recipe), dict(usual.recipe)
        names = sorted(name for name in mine.keys() | most.keys() if mine.get(name) != most.get(name))
        yield f"another recipe than most slides: {', '.join(names)}"


def _recipe(attrs: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """What made the features, without the parts that are empty."""
    parts = {name.removeprefix("recipe_"): str(value) for name, value in attrs.items() if name.startswith("recipe_")}
    return tuple(sorted((name, value) for name, value in parts.items() if value))


def _quantiles(values: Sequence[int] | NDArray[np.float32], form: str = ".4g") -> str | None:
    if not len(values):
        return None
    found = np.quantile(np.asarray(values, dtype=np.float64), QUANTILES)
    return ", ".join(f"{100 * share:.0f} %: {value:{form}}" for share, value in zip(QUANTILES, found, strict=True))


def _short(value: str) -> str:
    """A hash is told by its beginning."""
    return value[:12] if len(value) == 64 else value
