"""Drift says 1 for the same features, less for others, and what probes gained, with an interval over patients."""

import json

import numpy as np
import pytest
import torch

from pathfm.models.drift import Labelled, drift, token_features
from pathfm.models.vit import build_backbone
from pathfm.pretrain_settings import PretrainSettings
from pathfm.stats.probes import PROBES


def network(seed: int):
    torch.manual_seed(seed)
    vit = build_backbone(PretrainSettings(backbone="vit_tiny_patch16_224", layer_scale=0.5), 32)
    vit.blocks = vit.blocks[:2]
    return vit


@pytest.fixture(scope="module")
def tiles():
    coarse = np.random.default_rng(0).integers(0, 255, (300, 5, 5, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)  # 40 px: not whole patches, the middle 32 are taken


def test_the_same_encoder_has_not_drifted_and_another_one_has(tiles):
    vit = network(1)
    same = drift(vit, vit, tiles)
    assert same == {"cka_cls": 1.0, "cka_patch_mean": 1.0, "tiles": 300}
    assert vit.training, "looking changes nothing"
    nudged = network(1)
    with torch.no_grad():
        for parameter in nudged.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    near, far = drift(vit, nudged, tiles), drift(vit, network(2), tiles)
    for name in ("cka_cls", "cka_patch_mean"):
        assert far[name] < near[name] < 1.0


def test_only_the_middle_of_whole_patches_counts(tiles):
    changed = tiles.copy()
    changed[:, :4] = changed[:, -4:] = 0
    for name, features in token_features(network(1), tiles).items():
        assert features.shape == (300, 192)
        np.testing.assert_array_equal(features, token_features(network(1), changed)[name])


def test_probes_tell_what_was_gained(tiles):
    random = np.random.default_rng(1)
    label = random.integers(0, 2, len(tiles))
    shown = tiles.copy()
    shown[label == 1] //= 2  # darker
    labelled = Labelled(shown, label.tolist(), [f"p{number % 30}" for number in range(300)], [n % 30 < 20 for n in range(300)])
    blind = network(1)
    with torch.no_grad():
        blind.norm.weight.zero_()  # every feature is the same
    found = drift(blind, network(1), tiles[:40], labelled)
    assert set(found["probes"]) == set(PROBES)
    for probe in found["probes"].values():
        assert probe["initial"] == pytest.approx(0.5, abs=0.01) and probe["trained"] > 0.8
        assert probe["difference"]["low"] > 0
        assert probe["difference"]["value"] == pytest.approx(probe["trained"] - probe["initial"])
    assert json.loads(json.dumps(found)) == found
