"""Tiles are resized, cut and normalised as Pillow, torchvision and timm do it."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.v2 import functional as vision

from pathfm.models.calibration import calibration_tiles
from pathfm.models.preprocess import Preprocessing, middle, resized, resized_by_products, turns_and_flips

MEAN, STD = (0.7, 0.5, 0.65), (0.2, 0.25, 0.18)
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def tissue_and_noise(count, side):
    noise = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return np.concatenate([calibration_tiles(count, side), noise])


def by_pillow(tiles, side, interpolation):
    return np.stack([np.asarray(Image.fromarray(tile).resize((side, side), FILTERS[interpolation])) for tile in tiles])


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("tile_px", "side_px"), [(256, 224), (256, 448), (96, 64), (300, 75)])
@pytest.mark.parametrize("way", ["bytes", "products"])
def test_a_resize_is_pillows_but_for_single_levels(interpolation, tile_px, side_px, way):
    tiles = tissue_and_noise(2, tile_px)
    if way == "bytes":
        ours = resized(torch.from_numpy(tiles), side_px, interpolation)
    else:
        ours = resized_by_products(torch.from_numpy(tiles).permute(0, 3, 1, 2), side_px, interpolation)
    ours = ours.permute(0, 2, 3, 1).numpy()
    off = np.abs(ours.astype(int) - by_pillow(tiles, side_px, interpolation))
    assert np.array_equal(ours, np.round(ours)) and off.max() <= 2
    # Halves are common where sides have a simple ratio; which way they go hangs on Pillow's last bit.
    assert off.mean() < (0.1 if interpolation == "bilinear" else 0.02)


@pytest.mark.parametrize("interpolation", FILTERS)
def test_without_antialiasing_it_is_torchvisions(interpolation):
    tiles = torch.from_numpy(tissue_and_noise(2, 96))
    ours = resized(tiles, 40, interpolation, antialias=False)
    mode = vision.InterpolationMode(interpolation)
    theirs = vision.resize(tiles.permute(0, 3, 1, 2).float(), [40, 40], mode, antialias=False).clamp(0, 255)
    assert (ours - theirs).abs().max() <= 0.501 and not torch.equal(ours, resized(tiles, 40, interpolation).float())


def test_equal_sides_are_left_alone():
    tiles = torch.from_numpy(calibration_tiles(2, 64))
    assert resized(tiles, 64, "bicubic").data_ptr() == tiles.data_ptr()
    assert torch.equal(middle(resized(tiles, 64, "bicubic"), 64), tiles.permute(0, 3, 1, 2))


@pytest.mark.parametrize(("resize_px", "input_px"), [(64, 64), (64, 56), (65, 56), (67, 56), (64, 53)])
def test_crop_and_normalisation_are_timms(resize_px, input_px):
    tiles = calibration_tiles(2, resize_px)
    crop_pct = input_px / resize_px
    theirs = create_transform(input_px, mean=MEAN, std=STD, interpolation="bicubic", crop_pct=crop_pct)
    expected = torch.stack([theirs(Image.fromarray(tile)) for tile in tiles])
    ours = Preprocessing(resize_px, input_px, MEAN, STD)(torch.from_numpy(tiles))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


def test_enlarged_pixels_come_from_the_tile_itself():
    tiles = torch.from_numpy(calibration_tiles(1, 128))
    small = Preprocessing(64, 56, MEAN, STD)
    assert torch.equal(small(tiles, 2), Preprocessing(128, 112, MEAN, STD)(tiles))


def test_eight_views_are_a_group():
    tile = torch.from_numpy(calibration_tiles(1, 32))
    views = turns_and_flips(tile)
    as_bytes = {view.numpy().tobytes() for view in views}
    assert torch.equal(views[0], tile) and len(as_bytes) == 8
    for view in views:
        assert {again.numpy().tobytes() for again in turns_and_flips(view)} == as_bytes
