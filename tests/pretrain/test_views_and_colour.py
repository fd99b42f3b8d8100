"""Crops and their colours, against their definitions and against torchvision's."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from torchvision.transforms import functional as reference

from pathfm.errors import UsageError
from pathfm.geometry import Box
from pathfm.models.checkpoints import MEAN, STD
from pathfm.pretrain import colour
from pathfm.pretrain.colour import BLUR_SIGMA_PX, DRAWS, HED_IN_RGB, NEUTRAL, apply_colour, draw_colour
from pathfm.pretrain.views import SYMMETRIES, TRIES, cut, cut_views, draw_box, fitting_crops
from pathfm.pretrain_settings import CropSettings, PretrainSettings

TILE = CropSettings(scale_of="tile", global_scale=(0.32, 1.0), local_scale=(0.05, 0.32), aspect=(3 / 4, 4 / 3))


def random(seed=0):
    return np.random.default_rng(seed)


def boxes_of(side_px, of_px, scale, aspect, count=2000):
    draws = random().random((count, 2 + 2 * TRIES)).tolist()
    return [draw_box(side_px, of_px, scale, aspect, draw) for draw in draws]


def inside(box, side_px):
    return 0 <= box.left < box.right <= side_px and 0 <= box.top < box.bottom <= side_px


# Boxes


@pytest.mark.parametrize(("tile_px", "out_px"), [(256, 224), (246, 223), (392, 224), (256, 96), (224, 192)])
def test_boxes_of_constant_scale_keep_the_area_and_aspect_of_the_crop(tile_px, out_px):
    boxes = boxes_of(tile_px, out_px, (0.9, 1.1), (0.95, 1.05))
    assert all(inside(box, tile_px) for box in boxes)
    shares = np.array([box.size.width * box.size.height for box in boxes]) / out_px**2
    aspects = np.array([box.size.width / box.size.height for box in boxes])
    rounding = 1.1 / out_px  # a side is a whole number of pixels
    assert 0.9 - rounding <= shares.min() < 0.905 + rounding and 1.095 - rounding < shares.max() <= 1.1 + rounding
    assert 0.95 - rounding <= aspects.min() < 0.955 + rounding and 1.045 - rounding < aspects.max() <= 1.05 + rounding
    assert kstest(shares, "uniform", (0.9, 0.2)).statistic < 0.05
    assert kstest(np.log(aspects), "uniform", (math.log(0.95), math.log(1.05 / 0.95))).statistic < 0.03 + 5 * rounding


def test_boxes_of_constant_scale_lie_anywhere_in_the_tile():
    boxes = boxes_of(256, 96, (0.9, 1.1), (0.95, 1.05))
    for start, length in (("left", "width"), ("top", "height")):
        places = [getattr(box, start) / (256 - getattr(box.size, length)) for box in boxes]
        assert min(places) == 0 and max(places) == 1 and kstest(places, "uniform").statistic < 0.04
    assert np.corrcoef([box.left for box in boxes], [box.top for box in boxes])[0, 1] == pytest.approx(0, abs=0.06)


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_boxes_that_zoom_are_drawn_like_those_of_torchvision(scale):
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image, aspect = torch.empty(1, 256, 256), (3 / 4, 4 / 3)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(aspect)) for _ in range(2000)])
    ours = np.array([[box.top, box.left, *reversed(box.size)] for box in boxes_of(256, 256, scale, aspect)])
    assert all(inside(Box(left, top, left + width, top + height), 256) for top, left, height, width in ours.tolist())
    measures = (lambda row: row[0], lambda row: row[1], lambda row: row[2] * row[3], lambda row: row[3] / row[2])
    for measure in measures:
        assert kstest(measure(ours.T), measure(theirs.T)).pvalue > 1e-3


def test_when_no_box_fits_it_is_the_largest_with_an_allowed_aspect_from_the_middle():
    uniforms = [0.3] * (2 + 2 * TRIES)
    assert draw_box(50, 50, (4.0, 4.0), (0.9, 1.1), uniforms) == Box(0, 0, 50, 50)
    assert draw_box(50, 50, (4.0, 4.0), (0.4, 0.5), uniforms) == Box(12, 0, 37, 50)
    assert draw_box(50, 50, (4.0, 4.0), (2.0, 2.5), uniforms) == Box(0, 12, 50, 37)


# Room


@pytest.mark.parametrize(
    ("tile_px", "patch_px", "asked", "sizes"),
    [
        (256, 16, (224, 96), (224, 96)),
        (247, 16, (224, 96), (224, 96)),
        (246, 16, (224, 96), (208, 96)),
        (224, 16, (224, 96), (192, 96)),
        (224, 14, (224, 98), (196, 98)),
        (96, 16, (224, 96), (80, 80)),
        (220, 100, (300, 100), (200, 100)),
        (392, 14, (224, 98), (224, 98)),
    ],
)
def test_tiles_without_room_get_the_largest_crops_of_whole_patches(tile_px, patch_px, asked, sizes):
    crops = CropSettings(global_px=asked[0], local_px=asked[1])
    fitted = fitting_crops(crops, tile_px, patch_px)
    assert (fitted.global_px, fitted.local_px) == sizes
    assert fitted.model_copy(update={"global_px": asked[0], "local_px": asked[1]}) == crops


@given(st.integers(16, 600), st.sampled_from([8, 14, 16]), st.integers(2, 40), st.integers(1, 20))
def test_fitted_crops_always_fit_and_nothing_larger_would(tile_px, patch_px, global_patches, local_patches):
    crops = CropSettings(global_px=global_patches * patch_px, local_px=local_patches * patch_px)
    if tile_px < 2.2 * patch_px - 1e-9:
        with pytest.raises(UsageError, match="no room"):
            fitting_crops(crops, tile_px, patch_px)
        return
    fitted = fitting_crops(crops, tile_px, patch_px)
    for asked, side in ((crops.global_px, fitted.global_px), (crops.local_px, fitted.local_px)):
        assert side % patch_px == 0 and 0 < side <= asked and side * 1.1 <= tile_px + 1e-6
    assert fitted.global_px == crops.global_px or (fitted.global_px + patch_px) * 1.1 > tile_px - 1e-6
    assert fitted.local_px <= fitted.global_px or fitted.global_px == crops.global_px


def test_crops_that_zoom_need_no_room_and_wider_scales_need_more():
    assert fitting_crops(TILE, 100, 16) == TILE
    wide = CropSettings(global_scale=(0.5, 2.0), local_count=0)
    fitted = fitting_crops(wide, 256, 16)
    assert fitted.global_px == 176  # 256 / sqrt(2 / 0.95) = 176.4
    assert all(inside(box, 256) for box in boxes_of(256, fitted.global_px, wide.global_scale, wide.aspect))


@pytest.mark.parametrize("scale_of", ["crop", "tile"])
def test_a_crop_of_one_patch_is_refused(scale_of):
    with pytest.raises(UsageError, match="a crop of 16 px is one patch"):
        fitting_crops(CropSettings(global_px=16, local_px=16, scale_of=scale_of), 256, 16)


def test_crops_of_broken_patches_are_refused_by_name():
    with pytest.raises(UsageError, match=r"pretrain\.crops\.local_px: a crop of 96 px .* 14 px \(take 84 or 98\)"):
        fitting_crops(CropSettings(), 256, 14)
    with pytest.raises(UsageError, match=r"pretrain\.crops\.global_px: .*take 16 or 32"):
        fitting_crops(CropSettings(global_px=24), 256, 16)
    assert fitting_crops(CropSettings(local_count=0), 256, 14).local_px == 96  # there are none


# Pixels


def noise(side, seed=0):
    return random(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)


def cut_out(tile, box, out_px, symmetry=0):
    out = np.empty((out_px, out_px, 3), np.uint8)
    cut(tile, box, symmetry, out)
    return out


def test_cutting_without_scaling_copies_pixels():
    tile = noise(40)
    assert (cut_out(tile, Box(3, 5, 19, 21), 16) == tile[5:21, 3:19]).all()


def test_the_eight_symmetries_are_those_of_a_square_and_form_a_group():
    square = noise(5)
    whole = Box(0, 0, 5, 5)
    images = [cut_out(square, whole, 5, symmetry) for symmetry in SYMMETRIES["d4"]]
    expected = {np.rot90(side, turns).tobytes() for side in (square, square[:, ::-1]) for turns in range(4)}
    assert {image.tobytes() for image in images} == expected and len(expected) == 8
    for image, symmetry in itertools.product(images, SYMMETRIES["d4"]):
        assert cut_out(image, whole, 5, symmetry).tobytes() in expected
    assert (images[0] == square).all() and (images[1] == square[:, ::-1]).all()


@pytest.mark.parametrize(("flips", "elements"), [("d4", 8), ("horizontal", 2), ("none", 1)])
def test_every_allowed_symmetry_comes_equally_often(flips, elements):
    tile = np.zeros((8, 8, 3), np.uint8)
    tile[..., 0], tile[..., 1] = np.arange(8)[:, None] * 30, np.arange(8) * 30
    crops = CropSettings(scale_of="tile", global_px=8, local_px=8, local_count=8, global_scale=(1, 1), local_scale=(1, 1))
    crops = crops.model_copy(update={"aspect": (1.0, 1.0), "flips": flips})
    generator, seen = random(), {}
    for _ in range(400):
        for view in np.concatenate(cut_views(tile, crops, generator)):
            seen[view.tobytes()] = seen.get(view.tobytes(), 0) + 1
    assert len(seen) == elements and tile.tobytes() in seen
    assert elements == 1 or chisquare(list(seen.values())).pvalue > 1e-3
    if flips == "horizontal":
        assert tile[:, ::-1].tobytes() in seen


@pytest.mark.parametrize("crops", [CropSettings(), TILE])
@pytest.mark.parametrize("side", [248, 256, 392])
def test_views_have_their_sizes_and_show_only_the_tile(side, crops):
    seen, local = cut_views(np.full((side, side, 3), 77, np.uint8), crops, random())
    assert seen.shape == (2, 224, 224, 3) and local.shape == (8, 96, 96, 3)
    assert (seen == 77).all() and (local == 77).all()


def test_nuclei_keep_their_size_under_constant_scale_and_do_not_when_crops_zoom():
    """Discs of known area, measured in the crops."""
    rows, columns = np.mgrid[:256, :256] % 32 - 16
    tile = np.where((rows**2 + columns**2 < 64)[..., None], 0, 255).astype(np.uint8).repeat(3, axis=2)

    def spread(crops):
        views = [view for seed in range(30) for view in cut_views(tile, crops, random(seed))[0]]
        edges = [float(np.abs(np.diff((view[..., 0] < 128).astype(int), axis=1)).sum()) for view in views]
        return np.std(edges) / np.mean(edges)

    assert spread(CropSettings(local_count=0)) < 0.1 < spread(TILE.model_copy(update={"local_count": 0}))


def test_views_can_be_written_straight_into_a_batch_and_depend_on_the_generator_only():
    crops, tile = CropSettings(global_px=32, local_px=16, local_count=3), noise(40)
    seen, local = cut_views(tile, crops, random(1))
    batch = np.zeros((2, 5, 32, 32, 3), np.uint8), np.zeros((3, 5, 16, 16, 3), np.uint8)
    cut_views(tile, crops, random(1), (batch[0][:, 3], batch[1][:, 3]))
    assert (batch[0][:, 3] == seen).all() and (batch[1][:, 3] == local).all()
    assert not batch[0][:, :3].any() and not batch[1][:, 4:].any()
    assert (cut_views(tile, crops, random(2))[0] != seen).any()


# Colours


def pixels(count=1, side=16, low=1, high=255):
    return torch.tensor(random().integers(low, high, (count, side, side, 3), dtype=np.uint8))


def plain(image):
    """RGB in 0..1, [N, 3, H, W]."""
    return image.permute(0, 3, 1, 2) / 255


def draws_of(count, **changes):
    draws = torch.tensor(NEUTRAL).repeat(count, 1)
    for column, value in changes.items():
        draws[:, int(column[1:])] = value
    return draws


def applied(image, **changes):
    """Colours of ``apply_colour`` with the normalisation undone."""
    images = apply_colour(image, draws_of(len(image), **changes))
    return images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def assert_same(found, expected, by=2e-6):
    torch.testing.assert_close(found, expected, rtol=0, atol=by)


def test_neutral_colours_only_normalise():
    image = pixels()
    assert len(NEUTRAL) == DRAWS
    assert_same(applied(image), plain(image))
    expected = reference.normalize(plain(image), list(MEAN), list(STD))
    assert_same(apply_colour(image, draws_of(1)), expected, by=1e-5)


def test_brightness_contrast_saturation_grey_blur_and_solarise_are_torchvisions():
    image = pixels(low=60, high=180)  # nothing clips
    colours = plain(image)
    assert_same(applied(image, c0=0.8), reference.adjust_brightness(colours, 0.8))
    # torchvision rounds the weight of red to 0.2989.
    assert_same(applied(image, c1=0.7), reference.adjust_contrast(colours, 0.7), by=1e-4)
    assert_same(applied(image, c2=1.4), reference.adjust_saturation(colours, 1.4), by=1e-4)
    assert_same(applied(image, c4=1), reference.rgb_to_grayscale(colours, 3), by=1e-4)
    for sigma in (0.1, 0.7, 2.0):
        assert_same(applied(image, c11=sigma), reference.gaussian_blur(colours, [9, 9], [sigma, sigma]))
    assert_same(applied(pixels(), c12=1), reference.solarize(plain(pixels()), 0.5))


def test_steps_come_in_the_official_order():
    image = pixels(low=60, high=180)
    colours = reference.adjust_contrast(reference.adjust_brightness(plain(image), 1.15), 0.9)
    colours = reference.rgb_to_grayscale(reference.adjust_saturation(colours, 0.8), 3)
    expected = reference.solarize(reference.gaussian_blur(colours, [9, 9], [1.5, 1.5]), 0.5)
    assert_same(applied(image, c0=1.15, c1=0.9, c2=0.8, c4=1, c11=1.5, c12=1), expected, by=2e-4)


def test_colours_are_clipped_before_the_blur():
    image = torch.full((1, 16, 16, 3), 250, dtype=torch.uint8)
    assert_same(applied(image, c0=1.4, c11=1.0), torch.ones(1, 3, 16, 16))


def test_hue_turns_the_same_way_as_in_hsv_and_keeps_luma():
    image = torch.tensor([[190, 120, 170], [120, 90, 160], [210, 150, 190], [150, 110, 170]], dtype=torch.uint8)
    image = image.repeat(4, 4, 1)[None].reshape(1, 8, 8, 3)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    for share in (-0.1, -0.05, 0.05, 0.1):
        ours, theirs = (applied(image, c3=share * 2 * math.pi), reference.adjust_hue(plain(image), share))
        assert_same((ours * luma).sum(1), (plain(image) * luma).sum(1))
        moved_ours, moved_theirs = (ours - plain(image)).flatten(), (theirs - plain(image)).flatten()
        assert torch.cosine_similarity(moved_ours, moved_theirs, dim=0) > 0.75
        assert 0.5 < moved_ours.norm() / moved_theirs.norm() < 2
    assert_same(applied(image, c3=2 * math.pi), plain(image))


def test_stain_jitter_scales_and_shifts_stains_as_written_out_plainly():
    image = pixels(3, low=20, high=240)
    factor, shift = np.array([1.1, 0.9, 1.05]), np.array([0.02, 0.04, -0.03])
    density = -np.log(image.double().numpy() / 255)
    stains = density @ np.linalg.inv(np.array(HED_IN_RGB))
    expected = np.clip(np.exp(-((stains * factor + shift) @ np.array(HED_IN_RGB))), 0, 1)
    changes = dict(zip(("c5", "c6", "c7", "c8", "c9", "c10"), (*factor, *shift), strict=True))
    assert_same(applied(image, **changes), torch.tensor(expected).permute(0, 3, 1, 2).float(), by=1e-5)


def test_stain_jitter_of_factors_leaves_glass_alone_and_takes_black():
    glass = torch.full((1, 5, 5, 3), 255, dtype=torch.uint8)
    assert_same(applied(glass, c5=1.3, c6=0.7), torch.ones(1, 3, 5, 5))
    assert applied(torch.zeros(1, 5, 5, 3, dtype=torch.uint8), c5=0.9).isfinite().all()


def mixed_batch(count=24, side=32):
    """Real draws of views with every step on in some and off in others."""
    crops = CropSettings(
        local_count=1, gray_probability=0.3, solarize_probability=(0.3, 0.3, 0.3), blur_probability=(0.5, 0.5, 0.5)
    )
    return pixels(3 * count, side), torch.from_numpy(draw_colour(crops, range(count), (0, 1))).flatten(0, 1)


def test_images_do_not_change_each_other():
    image, draws = mixed_batch()
    whole = apply_colour(image, draws)
    assert torch.equal(apply_colour(image[1::2], draws[1::2]), whole[1::2])
    assert torch.equal(torch.cat([apply_colour(image[i : i + 1], draws[i : i + 1]) for i in range(9)]), whole[:9])


def test_batches_larger_than_the_cache_are_the_same(monkeypatch):
    image, draws = mixed_batch()
    whole = apply_colour(image, draws)
    monkeypatch.setattr(colour, "CACHED", 5 * image[0].numel())
    assert torch.equal(apply_colour(image, draws), whole)


def test_taking_every_step_for_all_images_gives_the_same(monkeypatch):
    image, draws = mixed_batch()
    image[:, :4] = 0  # black, which the logarithm does not know
    selected = apply_colour(image, draws)
    monkeypatch.setattr(colour, "_on_cpu", lambda images: False)
    torch.testing.assert_close(apply_colour(image, draws), selected, rtol=0, atol=1e-5)


def test_on_a_gpu_the_host_never_waits_for_a_value():
    """Tensors without values stand in for those on a device: whatever had to look at one would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    colour._constants.cache_clear()
    with FakeTensorMode():
        image = torch.empty(4, 32, 32, 3, dtype=torch.uint8, device="cuda")
        images = apply_colour(image, torch.empty(4, DRAWS, device="cuda"))
    colour._constants.cache_clear()
    assert images.shape == (4, 3, 32, 32) and images.device.type == "cuda"


def test_autocast_does_not_round_colours_and_no_crops_are_no_crops():
    image, draws = mixed_batch(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply_colour(image, draws), apply_colour(image, draws).float())
        inside = apply_colour(image, draws)
    assert torch.equal(inside, apply_colour(image, draws))
    assert apply_colour(image[:0], draws[:0]).shape == (0, 3, 32, 32)


# Draws


def test_draws_depend_on_the_key_and_the_number_of_the_sample_only():
    crops = CropSettings(local_count=2)
    whole = draw_colour(crops, range(8), (3, 1))
    assert whole.dtype == np.float32 and whole.shape == (4, 8, DRAWS)
    assert (draw_colour(crops, range(4), (3, 1)) == whole[:, :4]).all()
    assert (draw_colour(crops, [7, 2, 5], (3, 1)) == whole[:, [7, 2, 5]]).all()
    assert (draw_colour(crops, range(8), (3, 2)) != whole).any(axis=(1, 2)).all()
    assert len(np.unique(whole.reshape(-1, DRAWS), axis=0)) == 32  # every view of every sample has its own


@pytest.mark.parametrize(
    ("preset", "blurred", "solarized"),
    [
        ("dinov2", (1.0, 0.1, 0.5), (0.0, 0.2, 0.0)),
        ("dinov2-as-released", (0.0, 0.9, 0.5), (0.0, 0.2, 0.0)),
        ("dinov2-path", (0.5, 0.1, 0.5), (0.0, 0.0, 0.0)),
    ],
)
def test_probabilities_of_blur_and_solarise_mean_what_they_say(preset, blurred, solarized):
    crops = PretrainSettings(preset=preset).crops
    draws = draw_colour(crops, range(2000), (0,))
    for column, expected in ((11, blurred), (12, solarized)):
        share = (draws[..., column] > 0).mean(axis=1)
        assert share == pytest.approx([*expected[:2], *[expected[2]] * 8], abs=0.04)
        assert all(found == asked for found, asked in zip(share, expected, strict=False) if asked in (0, 1))
    sigma = draws[..., 11][draws[..., 11] > 0]
    assert kstest(sigma, "uniform", (BLUR_SIGMA_PX[0], BLUR_SIGMA_PX[1] - BLUR_SIGMA_PX[0])).pvalue > 1e-3


def test_blurred_crops_are_as_many_as_asked():
    """What the official code got wrong shows in pixels, not in draws: count the images that the blur changed."""
    crops = CropSettings(local_count=0, jitter_probability=0, gray_probability=0, hed_probability=0)
    crops = crops.model_copy(update={"blur_probability": (1.0, 0.1, 0.5)})
    image = pixels(1, 8).expand(2000, 8, 8, 3)
    first, second = (apply_colour(image, torch.from_numpy(draws)) for draws in draw_colour(crops, range(2000), (1,)))
    neutral = apply_colour(image[:1], draws_of(1))
    changed = [(images != neutral).flatten(1).any(dim=1).float().mean().item() for images in (first, second)]
    assert changed[0] == pytest.approx(1.0, abs=0.06) and changed[1] == pytest.approx(0.1, abs=0.03)


def test_jitter_stains_and_grey_have_the_asked_frequencies_and_ranges():
    draws = draw_colour(CropSettings(local_count=2), range(2000), (0,)).reshape(-1, DRAWS)
    jittered = draws[:, 0] != 1
    assert jittered.mean() == pytest.approx(0.8, abs=0.02)
    for column, middle, width in ((0, 1, 0.2), (1, 1, 0.2), (2, 1, 0.1), (3, 0, 0.1 * math.pi)):
        assert ((draws[:, column] != middle) == jittered).all()
        assert kstest(draws[jittered, column], "uniform", (middle - width, 2 * width)).pvalue > 1e-3
    stained = draws[:, 5] != 1
    assert stained.mean() == pytest.approx(0.5, abs=0.02) and draws[:, 4].mean() == pytest.approx(0.2, abs=0.02)
    for column in range(5, 11):
        assert ((draws[:, column] != NEUTRAL[column]) == stained).all()
        assert kstest(draws[stained, column], "norm", (NEUTRAL[column], 0.05)).pvalue > 1e-3
    assert np.abs(np.corrcoef(draws[jittered & stained][:, [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]].T) - np.eye(10)).max() < 0.07


def test_ranges_wider_than_one_never_make_colours_negative():
    draws = draw_colour(CropSettings(brightness=3.0, jitter_probability=1.0), range(200), (0,))
    assert draws[..., 0].min() >= 0 and draws[..., 0].max() > 3.5
