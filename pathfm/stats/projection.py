"""Features of many dimensions on few axes: principal components, UMAP, and how much of the variance a grouping explains.

Legend: N rows (tiles or slides), D features, K components, G groups.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

from pathfm.errors import MissingExtraError
from pathfm.stats.row_sample import row_blocks

Array = NDArray[np.float64]

UMAP_NEIGHBOURS, UMAP_LEAST_ROWS, UMAP_COMPONENTS = 15, 10, 50
"""Neighbours that UMAP looks at (its default), rows it needs to mean anything, and components it is given."""
COLOUR_SHARES = (0.01, 0.99)
"""Quantiles of a component that become no colour and full colour: the ends would be set by a few odd tiles."""


def unit_rows(feature_ND: ArrayLike) -> NDArray[np.float32]:
    """Rows scaled to length one, so that distances follow the cosine; rows of zeros stay."""
    values = np.asarray(feature_ND, dtype=np.float32)
    norm_N1 = np.sqrt(np.einsum("nd,nd->n", values, values, dtype=np.float64))[:, None]
    return np.asarray(values / np.maximum(norm_N1, np.finfo(np.float32).tiny), dtype=np.float32)


@dataclass(frozen=True)
class Components:
    """Principal components.

    Attributes:
        mean_D: what is taken off first.
        axis_KD: orthonormal rows, the one with most variance first; of each the entry of largest size is positive, which makes
            the sign a matter of the data. Rows beyond D or N-1 are zero.
        share_K: share of the variance along each.
    """

    mean_D: Array
    axis_KD: Array
    share_K: Array

    def project(self, feature_ND: ArrayLike) -> Array:
        """Coordinates [N, K] of rows."""
        blocks = [(block.astype(np.float64) - self.mean_D) @ self.axis_KD.T for block in row_blocks(np.asarray(feature_ND))]
        return np.concatenate(blocks) if blocks else np.empty((0, len(self.axis_KD)))


def principal_components(feature_ND: ArrayLike, count: int) -> Components:
    """The ``count`` leading principal components of the rows, by the eigenvectors of their covariance."""
    values = np.asarray(feature_ND, dtype=np.float64)
    rows, dim = values.shape
    mean_D = values.mean(axis=0)
    centred_ND = values - mean_D
    covariance_DD = centred_ND.T @ centred_ND
    total, there = float(np.trace(covariance_DD)), min(count, dim, max(rows - 1, 0))
    axis_KD, share_K = np.zeros((count, dim)), np.zeros(count)
    if there and total > 0:
        value_k, vector_Dk = scipy.linalg.eigh(covariance_DD, subset_by_index=(dim - there, dim - 1))
        axis_KD[:there], share_K[:there] = vector_Dk.T[::-1], np.maximum(value_k[::-1], 0) / total
        largest = np.take_along_axis(axis_KD, np.abs(axis_KD).argmax(axis=1)[:, None], axis=1)
        axis_KD *= np.where(largest < 0, -1.0, 1.0)
        axis_KD[share_K < 1e-12] = 0.0  # rounding, not data: such an axis points anywhere
    return Components(mean_D, axis_KD, share_K)


def colour_limits(coordinate_NK: Array) -> Array:
    """Lowest and highest value [2, K] that colours tell apart (``COLOUR_SHARES``)."""
    limits_2K: Array = np.quantile(coordinate_NK, COLOUR_SHARES, axis=0)
    return limits_2K


def as_colours(coordinate_N3: Array, limits_23: Array) -> NDArray[np.uint8]:
    """Three components as red, green and blue [N, 3]; a component that never varies is mid-grey."""
    low_3, width_3 = limits_23[0], limits_23[1] - limits_23[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        share_N3 = np.where(width_3 > 0, (coordinate_N3 - low_3) / width_3, 0.5)
    return np.asarray(np.rint(255 * share_N3.clip(0, 1)), dtype=np.uint8)


def umap_2d(feature_ND: ArrayLike, seed: int = 0) -> Array | None:
    """UMAP (McInnes et al. 2018) of the rows' leading principal components [N, 2], in one thread; None for too few rows.

    The same rows and seed give the same map with the same versions of the libraries.

    Raises:
        MissingExtraError: umap-learn is not installed.
    """
    values = np.asarray(feature_ND, dtype=np.float32)
    if len(values) < UMAP_LEAST_ROWS:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about TensorFlow on import, and about disconnected neighbours
        model = _umap_class()(n_neighbors=min(UMAP_NEIGHBOURS, len(values) - 1), random_state=seed, n_jobs=1)
        components = principal_components(values, min(UMAP_COMPONENTS, *values.shape))
        return np.asarray(model.fit_transform(components.project(values).astype(np.float32)), dtype=np.float64)


def _umap_class() -> type[Any]:
    try:
        from umap import UMAP
    except ImportError as error:
        raise MissingExtraError("UMAP needs umap-learn", extra="umap") from error
    found: type[Any] = UMAP
    return found


def explained_share(feature_ND: ArrayLike, group_N: ArrayLike) -> float | None:
    """Share of the variance of the rows that their group explains, without what chance alone explains (omega squared).

    0: groups do not differ; 1: rows of a group are equal. None with one group, with a group for every row, or without variance.
    """
    values, (names, group) = np.asarray(feature_ND, dtype=np.float64), np.unique(np.asarray(group_N), return_inverse=True)
    rows, groups = len(values), len(names)
    if not 1 < groups < rows:
        return None
    centred = values - values.mean(axis=0)
    total = float(np.square(centred).sum())
    counts_G = np.bincount(group, minlength=groups)
    sums_GD = np.zeros((groups, values.shape[1]))
    np.add.at(sums_GD, group, centred)
    between = float((np.square(sums_GD).sum(axis=1) / counts_G).sum())
    within = max(0.0, total - between) / (rows - groups)
    return max(0.0, (between - (groups - 1) * within) / (total + within)) if total > 0 else None
