"""Tissue detection on drawn thumbnails: tissue in, glass out, whatever the glass's tint."""

from __future__ import annotations

import numpy as np
import pytest

from pathfm.study import TissueSettings
from pathfm.tile.tissue import mask_fractions, otsu_threshold, tissue_mask


def _thumbnail(glass=(245, 243, 246), tissue=(200, 120, 170), noise=2.0):
    rng = np.random.default_rng(0)
    picture = np.empty((200, 300, 3), dtype=np.float32)
    picture[:] = glass
    picture[50:150, 60:200] = np.array(tissue) + rng.normal(0, 25, (100, 140, 1))
    return np.clip(picture + rng.normal(0, noise, picture.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("method", ["otsu", "entropy"])
@pytest.mark.parametrize("glass", [(245, 243, 246), (235, 225, 240)])
def test_tissue_in_glass_out(method, glass):
    mask = tissue_mask(_thumbnail(glass), 8.0, TissueSettings(method=method))
    assert mask[60:140, 70:190].mean() > 0.95
    assert mask[:40].mean() < 0.02


def test_glass_alone_is_no_tissue():
    rng = np.random.default_rng(0)
    glass = np.clip(rng.normal(240, 2, (200, 200, 3)), 0, 255).astype(np.uint8)
    assert tissue_mask(glass, 8.0, TissueSettings()).mean() == 0


def test_off_keeps_everything():
    assert tissue_mask(_thumbnail(), None, TissueSettings(method="off")).all()


def test_small_pieces_go_and_small_holes_close():
    picture = _thumbnail(noise=0)
    picture[10:13, 10:13] = (200, 120, 170)
    picture[98:102, 128:132] = (245, 243, 246)
    mask = tissue_mask(picture, 8.0, TissueSettings(min_area_um2=5_000, max_hole_um2=10_000))
    assert not mask[10:13, 10:13].any()
    assert mask[98:102, 128:132].all()


def test_mask_fractions_match_a_plain_count():
    rng = np.random.default_rng(1)
    mask = rng.random((40, 50)) > 0.5
    boxes = np.array([[0, 0, 10, 10], [5, 7, 25, 31], [40, 30, 60, 50]], dtype=float)
    wanted = [mask[0:10, 0:10].mean(), mask[7:31, 5:25].mean(), mask[30:40, 40:50].mean()]
    np.testing.assert_allclose(mask_fractions(mask, boxes), wanted, rtol=1e-5)


def test_fractional_boxes_weigh_pixels_by_area():
    mask = np.array([[True, False]])
    np.testing.assert_allclose(mask_fractions(mask, np.array([[0.5, 0.0, 2.0, 1.0]])), [1 / 3], rtol=1e-6)


def test_otsu_splits_two_groups():
    values = np.concatenate([np.full(500, 0.1), np.full(300, 0.9)]).astype(np.float32).reshape(20, 40)
    assert 0.1 < otsu_threshold(values) < 0.9
