"""Features are what timm computes from the same pixels, for many families of networks and any batch; the recipe says how."""

import dataclasses
import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from pathfm.errors import UsageError
from pathfm.geometry import effective_mpp
from pathfm.models.calibration import calibration_tiles
from pathfm.models.encoders import Recipe, TileEncoder, load_encoder, weights_sha256
from pathfm.models.networks import Network
from pathfm.models.preprocess import turns_and_flips
from pathfm.models.timm_networks import timm_card
from pathfm.study import ExtractSettings

CPU = torch.device("cpu")
VIT = {"depth": 2, "embed_dim": 96, "num_heads": 3}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", 64, VIT | {"reg_tokens": 2}),
    "dinov3": ("vit_small_patch16_dinov3", 64, VIT),
    "swin": ("swin_tiny_patch4_window7_224", 56, {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32}),
    "convnext": ("convnext_atto", 64, {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}),
    "resnet": ("test_resnet", 64, {}),
    "xcit": ("xcit_nano_12_p16_224", 64, {"depth": 2, "embed_dim": 64, "num_heads": 4}),
    "beit": ("beit_base_patch16_224", 64, VIT),
    "maxvit": ("test_maxvit", 64, {}),
}


def network(family, *, as_timm=False, **card):
    """A small network of a family, with its card; layer scales are turned up, or its blocks would hardly matter."""
    name, side, options = FAMILIES[family]
    sized = {} if family in {"convnext", "resnet"} else {"img_size": side}
    torch.manual_seed(0)
    overlay = {"input_size": (3, side, side)}
    model = timm.create_model(name, num_classes=0, pretrained_cfg_overlay=overlay, **sized, **options).eval()
    for key, parameter in model.named_parameters():
        if "gamma" in key:
            nn.init.constant_(parameter, 0.5)
    return Network(model, dataclasses.replace(timm_card(model, family, as_timm=as_timm), **card), family)


def encoder(family="vit", card=None, **settings):
    return TileEncoder(network(family, **(card or {})), ExtractSettings(**{"precision": "fp32"} | settings), CPU)


def by_timm(model, tiles, **changes):
    """timm's own preprocessing of PIL images, and its ``forward_features``."""
    facts = resolve_model_data_config(model) | changes
    transform = create_transform(**facts)
    with torch.inference_mode():
        return model.forward_features(torch.stack([transform(Image.fromarray(tile)) for tile in tiles]))


def cosines(left, right):
    return torch.nn.functional.cosine_similarity(torch.as_tensor(left), torch.as_tensor(right))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_timms_where_nothing_is_resized(family):
    found = network(family)
    tiles = calibration_tiles(3, FAMILIES[family][1])
    output = by_timm(found.model, tiles, crop_pct=1.0)
    with torch.inference_mode():
        expected = found.model.forward_head(output, pre_logits=True)
    if family in {"vit", "dinov3", "xcit", "beit"}:
        expected = torch.cat([output[:, 0], output[:, found.model.num_prefix_tokens :].mean(1)], dim=1)
    ours = TileEncoder(found, ExtractSettings(precision="fp32"), CPU)
    np.testing.assert_allclose(ours(tiles), expected, atol=1e-5)
    assert ours.dim == expected.shape[1] == found.card.dim and ours.fidelity is None


@pytest.mark.parametrize("family", FAMILIES)
def test_timms_recipe_is_timms_resize_crop_and_head(family):
    found, tiles = network(family, as_timm=True), calibration_tiles(3, 96)
    with torch.inference_mode():
        expected = found.model.forward_head(by_timm(found.model, tiles), pre_logits=True)
    ours = TileEncoder(found, ExtractSettings(precision="fp32"), CPU)
    assert cosines(ours(tiles), expected).min() > 0.99999


@pytest.mark.parametrize("family", FAMILIES)
def test_the_batch_does_not_matter(family):
    ours, tiles = encoder(family), calibration_tiles(16, 64).repeat(4, axis=0)
    whole = ours(tiles)
    for size in (1, 3, 8):
        parts = np.concatenate([ours(tiles[at : at + size]) for at in range(0, 16, size)])
        np.testing.assert_allclose(parts, whole[: len(parts)], atol=1e-5)


def test_read_only_tiles_are_taken_and_left_alone():
    tiles = calibration_tiles(2, 64)
    tiles.flags.writeable = False
    assert np.array_equal(encoder()(tiles), encoder()(tiles.copy()))


def test_turns_and_flips_of_a_tile_have_the_same_d4_features():
    ours = encoder(symmetry="d4", card={"resize_px": 67})  # an odd rim, and a resize that is not the same for rows and columns
    views = turns_and_flips(torch.from_numpy(calibration_tiles(2, 96)))
    features = [ours.features(view) for view in views]
    for other in features[1:]:
        torch.testing.assert_close(other, features[0], atol=1e-5, rtol=0)
    plain = encoder(card={"resize_px": 67})
    torch.testing.assert_close(features[0], sum(plain.features(view) for view in views) / 8, atol=1e-5, rtol=0)
    assert not torch.allclose(plain.features(views[1]), plain.features(views[0]), atol=1e-3)


def test_larger_scales_are_means_over_pieces():
    tiles = calibration_tiles(2, 128)
    plain, joined = encoder(), encoder(scales=(1, 2))
    pieces = [plain(tiles[:, top : top + 64, left : left + 64]) for top in (0, 64) for left in (0, 64)]
    expected = np.concatenate([plain(tiles), np.mean(pieces, axis=0)], axis=1)
    np.testing.assert_allclose(joined(tiles), expected, atol=1e-5)
    assert joined.dim == 2 * plain.dim == joined.recipe.dim
    assert np.array_equal(encoder(scales=(1,))(tiles), plain(tiles))


def test_dense_features_are_the_patches_where_they_lie():
    found, tiles = network("vit"), calibration_tiles(2, 64)
    with torch.inference_mode():
        tokens = by_timm(found.model, tiles, crop_pct=1.0)
    dense = encoder(symmetry="d4", scales=(1, 2)).dense(torch.from_numpy(tiles))
    assert dense.shape == (2, 4, 4, 96) and dense.dtype == torch.float32
    torch.testing.assert_close(dense.flatten(1, 2), tokens[:, 3:], atol=1e-5, rtol=0)


def test_what_the_network_sees_can_be_looked_at():
    ours = encoder()
    images = ours.images(torch.from_numpy(calibration_tiles(2, 96)))
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.float32
    with torch.inference_mode():
        cls = ours.model.forward_features(images)[:, 0]
    assert np.array_equal(cls, ours(calibration_tiles(2, 96))[:, :96])


def test_the_recipe_holds_what_decides_features_and_no_float_noise():
    one = encoder(card={"resize_px": 71})
    kept = json.loads(json.dumps(dataclasses.asdict(one.recipe)))
    assert (kept["resize_px"], kept["input_px"], kept["dim"]) == (71, 64, 192) and kept["scales"] == [1]
    half = encoder(precision="bf16", card={"resize_px": 71})
    assert dataclasses.replace(one.recipe, precision="bf16", arithmetic="mixed") == half.recipe
    assert {field.name for field in dataclasses.fields(Recipe)}.isdisjoint({"fidelity", "device"})


def test_the_weights_hash_sees_every_number_and_no_arithmetic():
    model = network("resnet").model
    before = weights_sha256(model)
    assert encoder("resnet", precision="bf16").recipe.weights_sha256 == before
    with torch.no_grad():
        next(model.parameters()).flatten()[3] += 1e-3
    assert weights_sha256(model) != before and len(weights_sha256(model.bfloat16())) == 64


def test_encoders_load_by_name_and_side():
    ours = load_encoder("untrained:test_vit", ExtractSettings(input_px=64, precision="fp32", pooling="cls"), CPU)
    assert (ours.recipe.encoder, ours.recipe.input_px, ours.recipe.resize_px) == ("untrained:test_vit", 64, 64)
    assert ours(calibration_tiles(2, 80)).shape == (2, 64) and ours.recipe.pooling == "cls"
    with pytest.raises(UsageError, match="whole number"):
        load_encoder("untrained:test_vit", ExtractSettings(input_px=70), CPU)
    with pytest.raises(UsageError, match="needs a class token"):
        load_encoder("untrained:test_resnet", ExtractSettings(pooling="cls"), CPU)


def test_effective_mpp():
    assert effective_mpp(0.5, 256, 224) == pytest.approx(0.5714, abs=1e-4)
    assert effective_mpp(None, 256, 224) is None and effective_mpp(math.nan, 256, 224) is None


def test_tiles_that_fit_are_told_what_the_encoder_sees():
    trained = encoder(card={"mpp": (0.5,), "resize_px": 64})
    assert trained.check_tiles(0.5, 64) == "tiles 64 px at 0.5 mpp: the encoder sees 0.5 mpp; trained for 0.5"
    said = "tiles 73 px at 0.5 mpp, resized to 64: the encoder sees 0.57 mpp; trained for 0.5"
    assert trained.check_tiles(0.5, 73) == said
    assert "is not known" in trained.check_tiles(None, 73) and "is not known" in trained.check_tiles(math.nan, 73)
    anything = encoder(card={"resize_px": 73})
    assert anything.check_tiles(8.0, 73) == "tiles 73 px at 8 mpp, the middle 64 of it: the encoder sees 8 mpp"


def test_tiles_of_another_resolution_are_refused_with_what_would_fit():
    many = {"mpp": (0.25, 0.5, 1.0), "resize_px": 64}
    assert encoder(card=many).check_tiles(0.5, 32)
    with pytest.raises(UsageError, match=r"sees 0\.75 mpp; trained for") as refused:
        encoder(card=many).check_tiles(0.5, 96)
    assert "tile.tile_px: 128 or tile.mpp: 0.667" in refused.value.fix
    tile_px, mpp = 128, 0.667
    assert encoder(card=many).check_tiles(0.5, tile_px) and encoder(card=many).check_tiles(mpp, 96)
    assert encoder(card=many, mpp_tolerance=0.4).check_tiles(0.5, 96)
    assert "0.5 where enlarged by 2" in encoder(card={"mpp": (0.5,)}, scales=(2,)).check_tiles(0.5, 128)


def test_a_network_that_cannot_be_compiled_runs_as_it_is(monkeypatch, capsys):
    def failing(*args, **options):
        def run(images):
            raise RuntimeError("No working C++ compiler found")

        return run

    monkeypatch.setattr(torch, "compile", failing)
    ours = TileEncoder(network("vit"), ExtractSettings(precision="fp32"), CPU, compiled=True)
    tiles = calibration_tiles(2, 64)
    assert np.array_equal(ours(tiles), encoder()(tiles)) and ours.recipe == encoder().recipe
    assert "cannot be compiled here" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "passes"), [(1e-6, True), (10.0, False)])
def test_a_compiled_network_is_judged_before_it_is_used(monkeypatch, capsys, error, passes):
    """A compiler that makes errors stands in for torch's."""
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: lambda x: forward(x) + error * torch.arange(192))
    ours = TileEncoder(network("vit"), ExtractSettings(precision="fp32"), CPU, compiled=True)
    tiles = calibration_tiles(2, 64)
    assert ours.recipe == dataclasses.replace(encoder().recipe, compiled=passes)
    assert np.array_equal(ours(tiles), encoder()(tiles)) != passes
    assert ("features of the compiled network agree with fp32 only" in capsys.readouterr().out) != passes
    assert (ours.fidelity is None) != passes
