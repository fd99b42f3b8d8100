"""Extraction: rows match tiles, nothing is done twice, and neither batches nor kills change a feature."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from pathfm.config import load_study
from pathfm.errors import UsageError
from pathfm.extract.stage import run_extract
from pathfm.models.encoders import load_encoder
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.store.commit import content_digest
from pathfm.store.feature_file import open_features
from pathfm.store.layout import Layout
from pathfm.store.tile_store import open_tiles, write_tiles
from pathfm.study import ExtractSettings

ENCODER = "untrained:vit_tiny_patch16_224"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    layout = Layout(out, "64px-0.5mpp-test")
    rng = np.random.default_rng(0)
    rows = []
    for number, count in enumerate([5, 1, 9]):
        coarse = rng.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
        write_tiles(layout.store(f"s{number}"), coarse, slide_id=f"s{number}", codec="zstd")
        rows.append(SlideRow(f"s{number}", out / f"s{number}.svs"))
    return layout, Cohort((*rows, SlideRow("untiled", out / "untiled.svs")))


def _study(layout, *settings):
    return load_study(None, [f"out={layout.out}", f"extract.encoder={ENCODER}", "extract.dtype=float32", *settings])


def test_rows_are_the_tiles_and_failures_are_named(tiled):
    layout, cohort = tiled
    done = run_extract(_study(layout), cohort, layout)
    assert {outcome.slide_id: outcome.status for outcome in done.report.outcomes} == {
        "s0": "done",
        "s1": "done",
        "s2": "done",
        "untiled": "failed",
    }
    features = open_features(done.sets["main"].folder / "s2.h5")
    encoder = load_encoder(ENCODER, ExtractSettings(), CPU)
    store = open_tiles(layout.store("s2"))
    np.testing.assert_allclose(features.features, encoder(store.read(range(9))), atol=1e-5)
    np.testing.assert_array_equal(features.coords, store.xy_level0)
    assert features.attrs["effective_mpp"] == pytest.approx(0.5 * 64 / 224)
    again = run_extract(_study(layout), cohort, layout).report
    assert [outcome.status for outcome in again.outcomes] == ["kept", "kept", "kept", "failed"]


def test_batch_size_changes_no_feature_by_more_than_rounding(tiled, tmp_path):
    layout, _ = tiled
    values = []
    for size in (1, 4, 64):
        encoder = load_encoder(ENCODER, ExtractSettings(), CPU)
        tiles = open_tiles(layout.store("s2")).read(range(9))
        values.append(np.concatenate([encoder(tiles[start : start + size]) for start in range(0, 9, size)]))
    np.testing.assert_allclose(values[0], values[1], atol=1e-5)
    np.testing.assert_allclose(values[0], values[2], atol=1e-5)


def test_a_damaged_feature_file_is_made_again(tiled):
    layout, cohort = tiled
    done = run_extract(_study(layout), cohort, layout)
    path = done.sets["colour"].folder / "s0.h5"
    before = content_digest(path)
    path.write_bytes(path.read_bytes()[:200])
    again = run_extract(_study(layout), cohort, layout)
    assert [outcome.status for outcome in again.report.outcomes][:2] == ["done", "kept"]
    assert content_digest(path) == before


def test_features_equal_plain_timm():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0).eval()
    tiles = np.random.default_rng(0).integers(0, 255, (2, 224, 224, 3), dtype=np.uint8)
    images = (torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        tokens = model.forward_features(images)
    wanted = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1).numpy()
    np.testing.assert_allclose(load_encoder(ENCODER, ExtractSettings(), CPU)(tiles), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_nets_that_are_no_plain_vit_are_averaged(name):
    encoder = load_encoder(f"untrained:{name}", ExtractSettings(input_px=224), CPU)
    features = encoder(np.zeros((2, 64, 64, 3), dtype=np.uint8))
    assert features.shape == (2, encoder.recipe.dim)
    assert encoder.recipe.pooling == "average"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("magic", "unknown encoder"),
        ("timm:vit_small_patch99", "did you mean"),
        ("local-dir:/nowhere", "config.json is missing"),
        ("untrained:nonsense", "no model"),
    ],
)
def test_an_encoder_that_is_not_there_is_named(name, said):
    with pytest.raises(UsageError, match=said):
        load_encoder(name, ExtractSettings(), CPU)


def test_another_input_side_works_for_every_kind_and_keeps_the_weights():
    for name, side in (("vit_tiny_patch16_224", 64), ("resnet10t", 50), ("swin_tiny_patch4_window7_224", 112)):
        encoder = load_encoder(f"untrained:{name}", ExtractSettings(input_px=side), CPU)
        assert encoder(np.zeros((1, 64, 64, 3), dtype=np.uint8)).shape == (1, encoder.recipe.dim)
    whole, half = (load_encoder(ENCODER, ExtractSettings(input_px=side), CPU).recipe for side in (224, 112))
    assert whole.weights_sha256 == half.weights_sha256


def test_an_input_side_of_broken_patches_is_refused():
    with pytest.raises(UsageError, match="not a whole number of the encoder's patches"):
        load_encoder(ENCODER, ExtractSettings(input_px=50), CPU)


def test_tiles_that_are_stale_are_not_used(tiled):
    layout, cohort = tiled
    done = run_extract(_study(layout), cohort, layout, stale_tiles={"s1"})
    assert {outcome.slide_id: outcome.status for outcome in done.report.outcomes}["s1"] == "failed"
