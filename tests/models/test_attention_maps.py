"""Attention maps: against what the blocks themselves compute, without a change of features; nets without tokens are refused."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from pathfm.errors import UsageError
from pathfm.models.attention_maps import _weights, attention_maps
from pathfm.models.vit import build_backbone
from pathfm.pretrain_settings import PretrainSettings

SMALL = {"num_classes": 0, "depth": 3, "embed_dim": 48, "num_heads": 3}
NETS = {
    "vit": ("vit_tiny_patch16_224", {**SMALL, "img_size": 64}),
    "registers": ("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 56}),
    "rope": ("vit_small_patch16_dinov3", {**SMALL, "img_size": 64}),
    "eva02": ("eva02_tiny_patch14_224", {**SMALL, "img_size": 56}),
    "distilled": ("deit_tiny_distilled_patch16_224", {**SMALL, "img_size": 64}),
    "position biases": ("beit_base_patch16_224", {**SMALL, "img_size": 64}),
}


def built(name: str) -> nn.Module:
    architecture, arguments = NETS[name]
    torch.manual_seed(0)
    net = timm.create_model(architecture, **arguments).eval()
    for parameter in net.parameters():  # untrained queries are so small that attention would be even
        parameter.data = torch.randn_like(parameter) * 0.15 if parameter.ndim > 1 else parameter.data
    return net


def images(net: nn.Module, count: int = 2) -> torch.Tensor:
    side = net.patch_embed.img_size[0]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def slowly(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The matrices [B, H, T, T] that the blocks' own slow path computes, taken where it would drop some of them."""
    seen: list[torch.Tensor] = []
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(lambda module, arguments, result: seen.append(arguments[0]))
    net.forward_features(x)
    return seen


@pytest.mark.parametrize("name", NETS)
def test_maps_are_those_of_the_blocks_and_features_stay(name):
    net = built(name)
    x = images(net)
    with torch.inference_mode():
        before = net.forward_features(x)
    maps = attention_maps(net, x)
    with torch.inference_mode():
        assert torch.equal(net.forward_features(x), before)
    seen = slowly(net, x)
    assert len(seen) == 3
    for block, matrix in enumerate(seen):
        torch.testing.assert_close(maps.class_LBHT[block], matrix[:, :, 0], atol=1e-5, rtol=1e-4)
    rows, columns = maps.grid
    assert maps.prefix + rows * columns == maps.class_LBHT.shape[-1] and maps.heads(1).shape == (2, 3, rows, columns)
    # The slow path of the network gives the same maps: softmax is seen as well.
    torch.testing.assert_close(attention_maps(net, x).class_LBHT, maps.class_LBHT, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "registers", "rope"])
def test_rollout_is_the_product_of_the_papers_matrices(name):
    net = built(name)
    x = images(net)
    maps = attention_maps(net, x)
    product = torch.eye(maps.rollout_BT.shape[1], dtype=torch.float64).expand(2, -1, -1)
    for matrix in slowly(net, x):
        step = 0.5 * matrix.double().mean(dim=1) + 0.5 * torch.eye(matrix.shape[-1], dtype=torch.float64)
        product = step / step.sum(-1, keepdim=True) @ product
    torch.testing.assert_close(maps.rollout_BT.double(), product[:, 0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(maps.rollout().flatten(1), maps.rollout_BT[:, maps.prefix :])


@pytest.mark.parametrize("name", NETS)
def test_attention_sums_to_one_and_tiles_do_not_see_each_other(name):
    net = built(name)
    x = images(net, 3)
    maps = attention_maps(net, x)
    torch.testing.assert_close(maps.class_LBHT.sum(-1), torch.ones(3, 3, 3))
    torch.testing.assert_close(maps.rollout_BT.sum(-1), torch.ones(3))
    alone = attention_maps(net, x[1:2])
    torch.testing.assert_close(alone.class_LBHT[:, 0], maps.class_LBHT[:, 1], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(alone.rollout_BT[0], maps.rollout_BT[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_our_own_networks(positions):
    settings = PretrainSettings(backbone="vit_tiny", positions=positions, registers=4)
    net = build_backbone(settings, 64).eval()
    maps = attention_maps(net, torch.randn(1, 3, 64, 64))
    assert maps.class_LBHT.shape == (12, 1, 3, 21) and (maps.prefix, maps.grid) == (5, (4, 4))


def test_the_weights_are_those_that_the_fused_kernel_applies():
    generator = torch.Generator().manual_seed(0)
    q, v = (torch.randn(2, 4, 7, 5, generator=generator) for _ in range(2))
    k = torch.randn(2, 4, 7, 5, generator=generator)
    mask = torch.rand(2, 1, 7, 7, generator=generator) > 0.3
    mask[..., 0] = True
    calls = [{}, {"attn_mask": mask}, {"attn_mask": mask.float()}, {"is_causal": True}, {"scale": 0.3}, {"dropout_p": 0.0}]
    for call in calls:
        expected = functional.scaled_dot_product_attention(q, k, v, **call)
        torch.testing.assert_close(_weights(q, k, v, **call) @ v, expected, atol=1e-5, rtol=1e-4)
    few = slice(0, 2)
    expected = functional.scaled_dot_product_attention(q, k[:, few], v[:, few], enable_gqa=True)
    weights = _weights(q, k[:, few], v[:, few], enable_gqa=True)
    torch.testing.assert_close(weights @ v[:, few].repeat_interleave(2, 1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "arguments", "words"),
    [
        ("resnet18", {}, "ResNet has no class token"),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2)}, "has no class token"),
        ("vit_base_patch16_siglip_224", SMALL, "has no class token"),
        ("vit_pwee_patch16_reg1_gap_256", SMALL, "has no class token"),
        ("xcit_nano_12_p16_224", {"depth": 1}, "do not attend from every token"),
        ("cait_xxs24_224", {"depth": 1, "embed_dim": 48, "num_heads": 3}, "do not attend from every token"),
    ],
)
def test_networks_without_such_attention_are_refused(architecture, arguments, words):
    net = timm.create_model(architecture, **{"num_classes": 0, **arguments}).eval()
    side = net.pretrained_cfg["input_size"][-1]
    with pytest.raises(UsageError, match=f"{words}.*choose a vision transformer"):
        attention_maps(net, torch.zeros(1, 3, side, side))
