import math

import numpy as np
import pytest
import torch

from pathfm.geometry import Box
from pathfm.models.checkpoints import MEAN, STD
from pathfm.pretrain.colour import DRAWS, NO_BLUR_PX, apply_colour, draw_colour
from pathfm.pretrain.views import cut, cut_views, draw_box, turned
from pathfm.study import CropSettings


def random(seed=0):
    return np.random.default_rng(seed)


def test_boxes_lie_inside_and_have_the_asked_share_and_aspect():
    generator = random()
    boxes = [draw_box(100, (0.2, 0.5), (0.75, 4 / 3), generator) for _ in range(500)]
    assert all(0 <= box.left < box.right <= 100 and 0 <= box.top < box.bottom <= 100 for box in boxes)
    shares = np.array([box.size.width * box.size.height / 1e4 for box in boxes])
    aspects = np.array([box.size.width / box.size.height for box in boxes])
    assert 0.19 < shares.min() < 0.23 and 0.47 < shares.max() < 0.51
    assert aspects.min() > 0.72 and aspects.max() < 1.4
    assert np.log(aspects).mean() == pytest.approx(0, abs=0.03)


def test_a_box_that_cannot_fit_is_the_whole_tile():
    assert draw_box(50, (1.0, 1.0), (0.5, 0.6), random()) == Box(0, 0, 50, 50)


def test_the_eight_turns_are_the_symmetries_of_a_square():
    square = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert len({turned(square, turn).tobytes() for turn in range(8)}) == 8
    assert (turned(square, 0) == square).all() and (turned(square, 4) == square[:, ::-1]).all()


def test_cutting_without_scaling_copies_pixels():
    tile = random().integers(0, 255, (40, 40, 3), dtype=np.uint8)
    assert (cut(tile, Box(3, 5, 19, 21), 16, 0) == tile[5:21, 3:19]).all()


@pytest.mark.parametrize("side", [20, 48, 200])
def test_views_have_their_sizes_whether_tiles_are_smaller_or_larger(side):
    crops = CropSettings(global_px=32, local_px=16, local_count=3)
    seen, local = cut_views(np.full((side, side, 3), 77, np.uint8), crops, random())
    assert [view.shape for view in seen] == [(32, 32, 3)] * 2 and [view.shape for view in local] == [(16, 16, 3)] * 3
    assert all((view == 77).all() for view in (*seen, *local))


def test_without_flips_nothing_turns():
    tile = np.zeros((64, 64, 3), np.uint8)
    tile[:, 32:] = 255  # dark left, bright right
    crops = CropSettings(global_px=32, local_px=16, local_count=0, global_scale=(0.9, 1.0), flips=False)
    for seed in range(20):
        for view in cut_views(tile, crops, random(seed))[0]:
            assert view[:, :8].mean() < 10 and view[:, -8:].mean() > 245


def neutral(count=1):
    draws = torch.zeros(count, DRAWS)
    draws[:, [0, 1, 2, 5, 6, 7]] = 1
    draws[:, 11] = NO_BLUR_PX
    return draws


def pixels(count=1, side=8):
    return torch.tensor(random().integers(1, 255, (count, side, side, 3), dtype=np.uint8))


def colours(images):
    """Undo the normalisation: RGB in 0..1, [N, 3, H, W]."""
    return images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def applied(image, **changes):
    draws = neutral(len(image))
    for column, value in changes.items():
        draws[:, int(column[1:])] = value
    return colours(apply_colour(image, draws))


def test_neutral_colours_only_normalise():
    image = pixels()
    torch.testing.assert_close(applied(image), image.permute(0, 3, 1, 2) / 255, rtol=0, atol=1e-5)


def test_brightness_contrast_and_grey_do_what_they_say():
    image = pixels()
    plain = (image.permute(0, 3, 1, 2) / 255).double()
    luma = (plain * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(applied(image, c0=0.8).double(), plain * 0.8, rtol=0, atol=1e-5)
    torch.testing.assert_close(applied(image, c1=0.7).double(), plain * 0.7 + 0.3 * luma.mean(), rtol=0, atol=1e-5)
    torch.testing.assert_close(applied(image, c2=0.6).double(), plain * 0.6 + 0.4 * luma, rtol=0, atol=1e-5)
    torch.testing.assert_close(applied(image, c4=1).double(), luma.expand(1, 3, 8, 8), rtol=0, atol=1e-5)


def test_hue_keeps_luma_and_a_third_of_a_turn_is_a_third_of_a_turn():
    image = pixels() // 8 + 110  # far from clipping
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    turned_once = applied(image, c3=0.4)
    torch.testing.assert_close((turned_once * weights).sum(1), (applied(image) * weights).sum(1), rtol=0, atol=1e-5)
    full = applied(image, c3=2 * math.pi)
    torch.testing.assert_close(full, applied(image), rtol=0, atol=1e-5)
    assert (turned_once - applied(image)).abs().max() > 0.01


def test_stain_jitter_scales_a_stain_and_leaves_glass_alone():
    haematoxylin = torch.tensor([0.65, 0.70, 0.29])
    concentration = torch.linspace(0, 1.5, 64).view(8, 8, 1)
    image = (255 * torch.exp(-concentration * haematoxylin)).round().to(torch.uint8)[None]
    found = -torch.log(applied(image, c5=1.2))[0].permute(1, 2, 0)
    torch.testing.assert_close(found, 1.2 * concentration * haematoxylin, rtol=0, atol=0.03)
    white = torch.full((1, 4, 4, 3), 255, dtype=torch.uint8)
    torch.testing.assert_close(applied(white, c5=1.3, c6=0.7), torch.ones(1, 3, 4, 4), rtol=0, atol=1e-5)


def test_blur_smooths_as_much_as_its_sigma_says():
    image = torch.zeros(1, 41, 41, 3, dtype=torch.uint8)
    image[0, 20, 20] = 255
    spot = applied(image, c11=2.0)[0, 0]
    assert float(spot.sum()) == pytest.approx(1, abs=1e-3)
    spread = (spot.sum(0) * (torch.arange(41) - 20.0) ** 2).sum()
    assert float(spread) == pytest.approx(4, rel=0.02)
    flat = torch.full((1, 9, 9, 3), 99, dtype=torch.uint8)
    torch.testing.assert_close(applied(flat, c11=2.0), torch.full((1, 3, 9, 9), 99 / 255))


def test_each_image_has_its_own_draws():
    image = pixels().expand(3, 8, 8, 3)
    draws = neutral(3)
    draws[1, 0], draws[2, 11], draws[2, 5] = 0.5, 1.5, 1.2
    alone = torch.cat([apply_colour(image[i : i + 1], draws[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(apply_colour(image, draws), alone, rtol=1e-5, atol=1e-5)


def test_draws_have_the_asked_frequencies():
    crops = CropSettings(local_count=2)
    draws = draw_colour(crops, 4000, random())
    assert draws.shape == (4, 4000, DRAWS)
    blurred = (draws[..., 11] > 0.01).mean(axis=1)
    assert blurred == pytest.approx([0.5, 0.1, 0.5, 0.5], abs=0.03)
    assert draws[..., 4].mean() == pytest.approx(0.2, abs=0.02)
    assert (draws[..., 0] != 1).mean() == pytest.approx(0.8, abs=0.02)
    assert (draws[..., 5] != 1).mean() == pytest.approx(0.5, abs=0.02)
    assert draws[..., 5][draws[..., 5] != 1].std() == pytest.approx(0.05, abs=0.003)
    assert np.abs(draws[..., 3]).max() <= 0.05 * 2 * math.pi
