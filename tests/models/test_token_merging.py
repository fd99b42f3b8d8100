"""Merged tokens: nothing changes where nothing is merged or only what is alike; every patch keeps its place."""

import itertools

import pytest
import timm
import torch

from pathfm.errors import UsageError
from pathfm.models import token_merging
from pathfm.models.token_merging import _Merging, check_mergeable, merged_features


def vit(**options):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True, **options).eval()
    for parameter in model.parameters():  # as initialised, blocks barely change their input
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return model


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}, {"qk_norm": True}])
@torch.inference_mode()
def test_nothing_merged_is_the_plain_network(options):
    model, images = vit(**options), torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(merged_features(model, images, 0.0), model.forward_features(images), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_merging_what_is_alike_changes_nothing():
    model = vit(reg_tokens=2)
    torch.nn.init.zeros_(model.pos_embed)  # equal patches are then equal tokens
    patch = torch.randn(2, 3, 16, 16)
    images = torch.cat([patch.repeat(1, 1, 6, 5), torch.randn(2, 3, 96, 16)], dim=3)
    torch.testing.assert_close(merged_features(model, images, 0.4), model.forward_features(images), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_different_tokens_come_out_changed_but_each_in_its_place():
    model, images = vit(), torch.randn(3, 3, 96, 96)
    plain, merged = model.forward_features(images), merged_features(model, images, 0.3)
    assert merged.shape == plain.shape and not torch.allclose(merged, plain, atol=1e-3)
    alike = torch.nn.functional.normalize(merged[0, 1:], dim=1) @ torch.nn.functional.normalize(plain[0, 1:], dim=1).mT
    assert (alike.argmax(1) == torch.arange(36)).float().mean() > 0.6
    alone = torch.cat([merged_features(model, image[None], 0.3) for image in images])
    torch.testing.assert_close(alone, merged, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@torch.inference_mode()
def test_the_share_is_merged_before_the_last_block(share, monkeypatch):
    lengths, plain = [], token_merging._through

    def spied(block, state, prefix, count):
        lengths.append(state.tokens_BND.shape[1])
        return plain(block, state, prefix, count)

    monkeypatch.setattr(token_merging, "_through", spied)
    merged_features(vit(), torch.randn(1, 3, 160, 160), share)
    assert lengths[0] == 101 and lengths[-1] == 101 - round(100 * share)
    steps = [before - after for before, after in itertools.pairwise(lengths)]
    assert max(steps) - min(steps) <= 1


def test_a_merge_keeps_mass_and_says_where_everybody_went():
    torch.manual_seed(1)
    x_BND, keys_BNC = torch.randn(2, 12, 5), torch.randn(2, 12, 4)
    keys_BNC[0, 2] = keys_BNC[0, 3]  # of one tile, patches 0 and 1 (a goer and a stayer) are alike
    sizes_BN = torch.randint(1, 4, (2, 12)).float()
    home_BT = torch.arange(12).expand(2, -1)
    merged = token_merging._merged(_Merging(x_BND, sizes_BN, home_BT), keys_BNC, 2, 3)
    assert merged.tokens_BND.shape == (2, 9, 5) and merged.home_BT[0, 2] == merged.home_BT[0, 3]
    torch.testing.assert_close(merged.sizes_BN.sum(1), sizes_BN.sum(1))
    for tile in range(2):
        assert set(merged.home_BT[tile].tolist()) == set(range(9)) and merged.home_BT[tile, :2].tolist() == [0, 1]
        for place in range(9):
            members = merged.home_BT[tile] == place
            weights = sizes_BN[tile, members, None]
            expected = (x_BND[tile, members] * weights).sum(0) / weights.sum()
            torch.testing.assert_close(merged.tokens_BND[tile, place], expected)
            assert merged.sizes_BN[tile, place] == weights.sum()


@pytest.mark.parametrize(
    ("name", "options"), [("test_resnet", {}), ("vit_small_patch16_dinov3", {"depth": 1}), ("test_vit_relpos", {})]
)
def test_other_networks_are_refused(name, options):
    with pytest.raises(UsageError, match="cannot be merged"):
        check_mergeable(timm.create_model(name, num_classes=0, **options))
