"""Are these features sound? Missing numbers, dimensions that say nothing, copies, effective rank, slides that stand out.

One pass over the slides, one slide in memory at a time, and a few bytes kept of every tile. Near copies, effective rank and the
share of the slides are, for a large cohort, those of a sample.

Legend: N tiles, D features, S slides.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathfm.stats.probes import rankme
from pathfm.stats.projection import explained_share, unit_rows
from pathfm.stats.row_sample import RowSample, row_blocks

Array = NDArray[np.float64]

SAMPLE_ROWS = 4096
"""Rows that near copies, effective rank and the share of the slides are computed on."""
NEAR_COPY = 0.999
"""Cosine, after the mean of all tiles is taken off, from which two tiles count as nearly equal."""
LEAST_SLIDES, LEAST_TILES = 5, 10
"""With fewer slides there is no telling which one stands out; the norms of fewer tiles vary by themselves."""
FAR_Z, FAR_RATIO, NORM_RATIO = 5.0, 2.0, 1.25
"""A slide stands out when its robust z is beyond the first, and the difference is not a trifle either: so many times as far
from the middle as is usual, or norms so many times as large or small."""
COPIED_SHARE = 0.25
"""Share of a slide's tiles that are copies of another slide's from which it is named."""


@dataclass(frozen=True)
class SlideHealth:
    """One slide.

    Attributes:
        tiles: rows of its file.
        unusable: rows with NaN or infinity, or marked as invalid; the other numbers leave them out.
        norm: median length of the rows, NaN without usable ones.
        mean_D: mean of the rows.
        spread: root mean square distance of the rows from their mean.
        copies_of: slide id -> how many of its rows equal a row of that earlier slide.
    """

    slide_id: str
    tiles: int
    unusable: int
    norm: float
    mean_D: NDArray[np.float32]
    spread: float
    copies_of: Mapping[str, int] = field(default_factory=dict)

    @property
    def usable(self) -> int:
        """Rows that can be used."""
        return self.tiles - self.unusable


@dataclass(frozen=True)
class Health:
    """All slides together.

    Attributes:
        slides: one by one, by slide id.
        dim: D.
        norm_N: lengths of all usable rows.
        constant: dimensions that have the same value in all tiles.
        zero: of these, those that are always zero.
        copies: rows that equal an earlier one.
        near_copies: rows of the sample with another row nearly equal to them, copies left out.
        sampled: rows of the sample; ``distinct`` without copies.
        rank: RankMe of the sample, copies and all; None without usable rows.
        slide_share: share of the variance of the sample that the slide explains, None for a single slide.
        outliers: slide id -> why it stands out.
    """

    slides: tuple[SlideHealth, ...]
    dim: int
    norm_N: NDArray[np.float32]
    constant: int
    zero: int
    copies: int
    near_copies: int
    sampled: int
    distinct: int
    rank: float | None
    slide_share: float | None
    outliers: Mapping[str, tuple[str, ...]]

    @property
    def tiles(self) -> int:
        """Rows of all slides."""
        return sum(slide.tiles for slide in self.slides)

    @property
    def unusable(self) -> int:
        """Rows that cannot be used."""
        return sum(slide.unusable for slide in self.slides)


def usable_rows(feature_ND: NDArray[Any], valid_N: NDArray[Any] | None = None) -> NDArray[np.bool_]:
    """Rows that are finite throughout and not marked as invalid [N]."""
    finite_N: NDArray[np.bool_] = np.isfinite(feature_ND).all(axis=1)
    return finite_N if valid_N is None else finite_N & (np.asarray(valid_N) != 0)


class HealthCheck:
    """Takes slides one after the other, in the order of their ids; ``finish`` gives the numbers. All have D dimensions."""

    def __init__(self, dim: int, sample_rows: int = SAMPLE_ROWS) -> None:
        self._sample = RowSample(sample_rows)
        self._low_D, self._high_D = np.full(dim, np.inf), np.full(dim, -np.inf)
        self._slides: list[SlideHealth] = []
        self._norms: list[NDArray[np.float32]] = []
        self._digests: list[NDArray[np.uint64]] = []

    def add(self, slide_id: str, feature_ND: NDArray[Any], valid_N: NDArray[Any] | None = None) -> None:
        """Looks at the features of one slide, float16 or float32."""
        rows_ND = feature_ND[usable_rows(feature_ND, valid_N)]
        sum_D, norms, digests = np.zeros(len(self._low_D)), [np.empty(0, np.float32)], [np.empty(0, np.uint64)]
        for block in row_blocks(rows_ND):
            row_BD = block.astype(np.float32)
            norms.append(np.sqrt(np.einsum("nd,nd->n", row_BD, row_BD)))
            digests.append(row_digests(row_BD))
            sum_D += row_BD.sum(axis=0, dtype=np.float64)
            self._low_D = np.minimum(self._low_D, row_BD.min(axis=0))
            self._high_D = np.maximum(self._high_D, row_BD.max(axis=0))
        norm_N = np.concatenate(norms)
        norm, spread, mean_D = float("nan"), float("nan"), np.full(len(sum_D), np.nan)
        if len(rows_ND):
            norm, mean_D = float(np.median(norm_N)), sum_D / len(rows_ND)
            spread = math.sqrt(sum(float(np.square(block - mean_D).sum()) for block in row_blocks(rows_ND)) / len(rows_ND))
        unusable = len(feature_ND) - len(rows_ND)
        self._slides.append(SlideHealth(slide_id, len(feature_ND), unusable, norm, mean_D.astype(np.float32), spread))
        self._norms.append(norm_N)
        self._digests.append(np.concatenate(digests))
        self._sample.add(slide_id, rows_ND)

    def finish(self) -> Health:
        """The numbers of everything that was added."""
        first_of_N = first_equal(np.concatenate(self._digests))
        slides = _with_copies(self._slides, first_of_N)
        sample = self._sample.finish()
        distinct_ND = np.unique(sample.values_ND.astype(np.float32), axis=0)
        constant_D = self._low_D == self._high_D
        return Health(
            slides=slides,
            dim=len(self._low_D),
            norm_N=np.concatenate(self._norms),
            constant=int(constant_D.sum()),
            zero=int((constant_D & (self._low_D == 0)).sum()),
            copies=int((first_of_N != np.arange(len(first_of_N))).sum()),
            near_copies=near_copies(distinct_ND),
            sampled=len(sample.values_ND),
            distinct=len(distinct_ND),
            rank=rankme(sample.values_ND) if len(sample.values_ND) else None,
            slide_share=explained_share(sample.values_ND, sample.name_N),
            outliers=slide_outliers(slides),
        )


def row_digests(row_ND: NDArray[np.float32]) -> NDArray[np.uint64]:
    """A hash of 64 bit of every row [N]; equal rows have equal ones, and -0 equals 0."""
    digests = (hashlib.blake2b(row_D.tobytes(), digest_size=8).digest() for row_D in row_ND + np.float32(0))
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def first_equal(value_N: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For every entry the number of the first one that equals it [N]."""
    _, first_U, inverse_N = np.unique(value_N, return_index=True, return_inverse=True)
    return np.asarray(first_U[inverse_N], dtype=np.int64)


def _with_copies(slides: Sequence[SlideHealth], first_of_N: NDArray[np.int64]) -> tuple[SlideHealth, ...]:
    """The slides, knowing of which earlier ones their rows are copies."""
    slide_N = np.repeat(np.arange(len(slides)), [slide.usable for slide in slides])
    told = []
    for number, slide in enumerate(slides):
        sources = slide_N[first_of_N[slide_N == number]]
        found = Counter(slides[source].slide_id for source in sources[sources != number].tolist())
        told.append(replace(slide, copies_of=dict(sorted(found.items()))))
    return tuple(told)


def near_copies(row_ND: NDArray[Any], block_rows: int = 512) -> int:
    """Rows whose cosine with another row, the mean of all rows taken off, is at least ``NEAR_COPY``."""
    unit_ND = unit_rows(row_ND - row_ND.mean(axis=0, dtype=np.float64)) if len(row_ND) else row_ND
    count = 0
    for start in range(0, len(unit_ND), block_rows):
        cosine_BN = unit_ND[start : start + block_rows] @ unit_ND.T
        rows = np.arange(len(cosine_BN))
        cosine_BN[rows, start + rows] = -1
        count += int((cosine_BN.max(axis=1) >= NEAR_COPY).sum())
    return count


def slide_outliers(slides: Sequence[SlideHealth]) -> dict[str, tuple[str, ...]]:
    """Slides that stand out, with the reasons in words; unusable rows and copies are told of any number of slides."""
    reasons: dict[str, list[str]] = {slide.slide_id: _faults(slide) for slide in slides}
    judged = [slide for slide in slides if slide.usable]
    if len(judged) >= LEAST_SLIDES:
        ratio_S, far_S = mean_distances(judged)
        norm_S = np.array([max(slide.norm, np.finfo(np.float32).tiny) for slide in judged])
        factor_S, norm_z_S = norm_S / np.median(norm_S), np.abs(robust_z(np.log(norm_S)))
        for slide, ratio, z, factor, norm_z in zip(judged, ratio_S, far_S, factor_S, norm_z_S, strict=True):
            if z > FAR_Z and ratio >= FAR_RATIO:
                reasons[slide.slide_id].append(
                    f"its mean is {ratio:.1f} times as far from the middle as usual (robust z {z:.0f})"
                )
            if slide.usable >= LEAST_TILES and norm_z > FAR_Z and not 1 / NORM_RATIO < factor < NORM_RATIO:
                reasons[slide.slide_id].append(f"its norms are {factor:.2g} times the usual (robust z {norm_z:.0f})")
    return {slide_id: tuple(found) for slide_id, found in reasons.items() if found}


def _faults(slide: SlideHealth) -> list[str]:
    """What is wrong with a slide by itself."""
    found = [f"{slide.unusable} of {slide.tiles} rows are unusable"] if slide.unusable else []
    if slide.usable > 1 and slide.spread <= 1e-6 * slide.norm:
        found.append("all its tiles have the same features")
    for other, count in slide.copies_of.items():
        if count >= COPIED_SHARE * slide.usable:
            found.append(f"{count} of {slide.usable} tiles have the very features of tiles of {other}")
    return found


def mean_distances(slides: Sequence[SlideHealth]) -> tuple[Array, Array]:
    """How far slides lie from the middle (the median of the slides' means), all with usable rows.

    The mean of few tiles varies by itself, so each distance is divided by what is usual for a slide of so many tiles.

    Returns:
        That ratio [S], about 1 for an ordinary slide, and its robust z [S].
    """
    mean_SD = np.stack([slide.mean_D for slide in slides]).astype(np.float64)
    tiles_S = np.array([slide.usable for slide in slides])
    square_S = np.array([slide.spread for slide in slides]) ** 2 * tiles_S
    within = float(square_S.sum()) / max(1, int((tiles_S - 1).sum()))
    distance_S = np.square(mean_SD - np.median(mean_SD, axis=0)).sum(axis=1)
    between = float(np.median(np.maximum(distance_S - within / tiles_S, 0)))
    usual_S = between + within / tiles_S
    ratio_S = np.sqrt(distance_S / np.maximum(usual_S, np.finfo(np.float64).tiny))
    return ratio_S, robust_z(ratio_S)


def robust_z(value_S: Array) -> Array:
    """Distance from the median in robust standard deviations (1.4826 times the median absolute deviation)."""
    off_S = value_S - np.median(value_S)
    deviation = 1.4826 * float(np.median(np.abs(off_S)))
    z_S: Array = off_S / max(deviation, 1e-9 * float(np.abs(value_S).max()), np.finfo(np.float64).tiny)
    return z_S
