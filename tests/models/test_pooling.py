"""Each pooling rule is the formula it names, and what a network cannot give is refused by name."""

import pytest
import timm
import torch

from pathfm.errors import UsageError
from pathfm.models.pooling import gem, has_class_token, patch_map, patches, pooling


def network(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **options).eval()


@pytest.fixture(scope="module")
def vit():
    return network("test_vit", reg_tokens=3)


def test_rules_of_tokens(vit):
    tokens_BTD = torch.randn(2, 1 + 3 + 100, 64)
    cls_BD, patches_BPD = tokens_BTD[:, 0], tokens_BTD[:, 4:]
    assert torch.equal(pooling(vit, "cls")(tokens_BTD), cls_BD)
    assert torch.equal(pooling(vit, "mean")(tokens_BTD), patches_BPD.mean(1))
    assert torch.equal(pooling(vit, "cls+mean")(tokens_BTD), torch.cat([cls_BD, patches_BPD.mean(1)], dim=1))
    assert torch.equal(pooling(vit, "gem")(tokens_BTD), gem(patches_BPD))
    assert torch.equal(pooling(vit, "average")(tokens_BTD), vit.forward_head(tokens_BTD, pre_logits=True))
    assert torch.equal(patch_map(vit, tokens_BTD)[0, 3, 7], patches_BPD[0, 37])


def test_limits_of_gem():
    values_BPD = torch.rand(3, 50, 8) + 0.1
    torch.testing.assert_close(gem(values_BPD, 1), values_BPD.mean(1))
    torch.testing.assert_close(gem(values_BPD, 1e5), values_BPD.amax(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(gem(values_BPD, 3), values_BPD.pow(3).mean(1).pow(1 / 3))
    assert gem(torch.full((1, 4, 2), -5.0)).isfinite().all()


def test_maps_of_both_orders_are_read_row_by_row():
    swin = network("swin_tiny_patch4_window7_224", depths=(1, 1), num_heads=(2, 2), embed_dim=8, img_size=56, patch_size=4)
    resnet = network("test_resnet")
    with torch.inference_mode():
        swin_BhwD = swin.forward_features(torch.randn(1, 3, 56, 56))
        map_BDhw = resnet.forward_features(torch.randn(1, 3, 64, 64))
    assert torch.equal(patch_map(swin, swin_BhwD), swin_BhwD)
    assert torch.equal(patch_map(resnet, map_BDhw), map_BDhw.permute(0, 2, 3, 1))
    assert torch.equal(pooling(resnet, "mean")(map_BDhw), patches(resnet, map_BDhw).mean(1))
    torch.testing.assert_close(pooling(resnet, "mean")(map_BDhw), pooling(resnet, "average")(map_BDhw))


def test_the_networks_own_attention_pool():
    siglip = network("vit_base_patch16_siglip_224", depth=1, embed_dim=48, num_heads=4, img_size=64)
    tokens_BTD = torch.randn(2, 16, 48)
    with torch.inference_mode():
        assert torch.equal(pooling(siglip, "map-attention")(tokens_BTD), siglip.attn_pool(tokens_BTD))
        assert not torch.allclose(pooling(siglip, "mean")(tokens_BTD), siglip.attn_pool(tokens_BTD))


@pytest.mark.parametrize(
    ("name", "options", "rule", "said"),
    [
        ("test_resnet", {}, "cls", "needs a class token"),
        ("test_resnet", {}, "cls+mean", "needs a class token"),
        ("vit_medium_patch16_reg4_gap_256", {"depth": 1, "embed_dim": 48, "num_heads": 4}, "cls", "needs a class token"),
        ("test_vit", {}, "map-attention", "without an attention pool"),
        ("test_convnext", {}, "map-attention", "without an attention pool"),
    ],
)
def test_what_a_network_lacks_is_refused(name, options, rule, said):
    with pytest.raises(UsageError, match=said) as refused:
        pooling(network(name, **options), rule)
    assert "average" in refused.value.fix and refused.value.where == "extract.pooling"


def test_registers_are_no_class_token(vit):
    assert has_class_token(vit) and not has_class_token(network("test_resnet"))
    assert not has_class_token(network("test_vit", class_token=False, reg_tokens=2, global_pool="avg"))


@pytest.mark.parametrize("name", ["coat_lite_tiny", "volo_d1_224"])
def test_class_tokens_that_are_not_counted_are_no_patches(name):
    model = network(name, img_size=64)
    with torch.inference_mode():
        tokens_BTD = model.forward_features(torch.randn(1, 3, 64, 64))
    assert has_class_token(model) and torch.equal(pooling(model, "cls")(tokens_BTD), tokens_BTD[:, 0])
    assert torch.equal(pooling(model, "mean")(tokens_BTD), tokens_BTD[:, 1:].mean(1))
    assert torch.equal(pooling(model, "cls")(tokens_BTD), pooling(model, "average")(tokens_BTD))


NO_PATCHES = {"pit_ti_distilled_224": "class tokens", "crossvit_tiny_240": "a list of features", "efficientvim_m1": "a list of"}


@pytest.mark.parametrize(("name", "given"), NO_PATCHES.items())
def test_networks_without_patch_tokens_are_read_by_their_own_head_only(name, given):
    model = network(name)
    side = model.default_cfg["input_size"][-1]
    with torch.inference_mode():
        output = model.forward_features(torch.randn(1, 3, side, side))
        assert pooling(model, "average")(output).ndim == 2
        for read in (pooling(model, "mean"), pooling(model, "gem"), lambda output: patch_map(model, output)):
            with pytest.raises(UsageError, match=rf"gives {given}.* per tile and no patches \(use average"):
                read(output)
        if name == "crossvit_tiny_240":
            with pytest.raises(UsageError, match="no row of tokens"):
                pooling(model, "cls")(output)


def test_a_head_that_gives_no_vectors_is_refused(vit, monkeypatch):
    monkeypatch.setattr(vit, "forward_head", lambda output, pre_logits: (output, output))
    with pytest.raises(UsageError, match="the head of VisionTransformer does not give one vector per tile"):
        pooling(vit, "average")(torch.zeros(2, 104, 64))


def test_vectors_and_oblongs_are_no_maps(vit):
    with pytest.raises(UsageError, match="no patches"):
        patches(vit, torch.zeros(2, 64))
    with pytest.raises(UsageError, match="no square grid"):
        patch_map(vit, torch.zeros(2, 4 + 99, 64))
