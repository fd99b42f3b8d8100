import sys
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.decomposition import PCA

from pathfm.errors import MissingExtraError
from pathfm.stats.projection import as_colours, colour_limits, explained_share, principal_components, umap_2d, unit_rows


def rows(count=200, dim=10, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dim)) @ np.diag(np.arange(1, dim + 1.0)) + rng.normal(size=dim)


@pytest.mark.parametrize(("count", "dim"), [(200, 10), (6, 40)])
def test_components_agree_with_scikit_learn(count, dim):
    values = rows(count, dim)
    mine, theirs = principal_components(values, 3), PCA(3, svd_solver="full").fit(values)
    np.testing.assert_allclose(mine.share_K, theirs.explained_variance_ratio_, rtol=1e-9)
    signs = np.sign((mine.axis_KD * theirs.components_).sum(axis=1))
    np.testing.assert_allclose(mine.axis_KD, theirs.components_ * signs[:, None], atol=1e-9)
    np.testing.assert_allclose(mine.project(values), theirs.transform(values) * signs, atol=1e-7)


def test_signs_are_a_matter_of_the_data():
    values = rows()
    axis = principal_components(values, 4).axis_KD
    assert (np.take_along_axis(axis, np.abs(axis).argmax(axis=1)[:, None], axis=1) > 0).all()
    np.testing.assert_allclose(principal_components(values[::-1], 4).axis_KD, axis, atol=1e-9)


def test_axes_that_do_not_exist_are_zero():
    few = principal_components(rows(2, 10), 3)
    assert (few.share_K[1:] == 0).all() and (few.axis_KD[1:] == 0).all() and few.share_K[0] == pytest.approx(1)
    assert (principal_components(np.ones((5, 4)), 3).axis_KD == 0).all()
    assert principal_components(rows(30, 2), 3).axis_KD.shape == (3, 2)
    assert principal_components(rows(1, 4), 3).project(rows(1, 4)).tolist() == [[0, 0, 0]]
    assert few.project(np.empty((0, 10))).shape == (0, 3)


def test_unit_rows():
    values = np.array([[3, 4], [0, 0], [-1e-3, 0]], dtype=np.float16)
    np.testing.assert_allclose(unit_rows(values), [[0.6, 0.8], [0, 0], [-1, 0]], rtol=1e-6)


def test_colours():
    coordinates = np.stack([np.linspace(-5, 5, 1001), np.zeros(1001), -np.linspace(-5, 5, 1001)], axis=1)
    colours = as_colours(coordinates, colour_limits(coordinates))
    assert colours[0].tolist() == [0, 128, 255] and colours[-1].tolist() == [255, 128, 0]
    assert (np.diff(colours[:, 0].astype(int)) >= 0).all()


def test_explained_share_agrees_with_the_textbook_formula():
    rng = np.random.default_rng(0)
    group = np.repeat(["a", "b", "c"], [10, 20, 30])
    values = rng.normal(size=(60, 4)) + (group == "b")[:, None] * 2
    between = within = 0.0
    for name in "abc":
        mine = values[group == name]
        between += len(mine) * np.square(mine.mean(axis=0) - values.mean(axis=0)).sum()
        within += np.square(mine - mine.mean(axis=0)).sum()
    omega = (between - 2 * within / 57) / (between + within + within / 57)
    assert explained_share(values, group) == pytest.approx(omega)


def test_explained_share_of_chance_is_nothing_and_of_equal_rows_everything():
    rng = np.random.default_rng(1)
    shares = [explained_share(rng.normal(size=(100, 30)), rng.integers(0, 20, 100)) for _ in range(20)]
    assert np.mean(shares) < 0.01
    assert explained_share(np.repeat(np.eye(3), 5, axis=0), np.repeat([0, 1, 2], 5)) == pytest.approx(1)
    assert explained_share(np.eye(3), [0, 0, 0]) is None and explained_share(np.eye(3), [0, 1, 2]) is None
    assert explained_share(np.ones((4, 2)), [0, 0, 1, 1]) is None


def test_umap_is_asked_for_a_repeatable_map(monkeypatch):
    asked = {}

    class Fake:
        def __init__(self, **options):
            asked.update(options)

        def fit_transform(self, values):
            return values[:, :2]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Fake))
    assert umap_2d(rows(40, 80)).shape == (40, 2)
    assert asked == {"n_neighbors": 15, "random_state": 0, "n_jobs": 1}
    assert umap_2d(rows(12, 80)).shape == (12, 2) and asked["n_neighbors"] == 11
    assert umap_2d(rows(9, 80)) is None


def test_without_umap_its_install_line_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pathfm\[umap\]'"):
        umap_2d(rows())
