import pytest
import torch

from pathfm.models.lora import LoraLinear, add_lora, merged_state, train_last
from pathfm.models.vit import MaskedViT, build_backbone
from pathfm.pretrain_settings import PretrainSettings

KINDS = [{}, {"mlp": "swiglu"}, {"positions": "rope"}, {"positions": "rope", "mlp": "swiglu"}]


def small(**changes):
    torch.manual_seed(0)
    plain = {"backbone": "vit_tiny", "patch_px": 8, "registers": 2, "layer_scale": 0.1}
    vit = build_backbone(PretrainSettings.model_validate(plain | changes), 32)
    vit.blocks = vit.blocks[:2]
    return MaskedViT(vit)


def stirred(net):
    """As after some training of the additions."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.05)
    return net


IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


@pytest.mark.parametrize("changes", KINDS)
def test_additions_change_nothing_at_first_and_merge_to_the_same_features(changes):
    net, plain = small(**changes), small(**changes)
    with torch.no_grad():
        before = net.tokens(IMAGES)
        add_lora(net.vit, 4)
        assert all(torch.equal(a, b) for a, b in zip(net.tokens(IMAGES), before, strict=True))
        stirred(net)
        trained = net.tokens(IMAGES)
        assert not torch.allclose(trained.cls_ND, before.cls_ND, atol=1e-2)
        merged = merged_state(net.state_dict())
        assert list(merged) == list(plain.state_dict())
        plain.load_state_dict(merged)
        for found, expected in zip(plain.tokens(IMAGES), trained, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(merged_state(net.vit.state_dict()), plain.vit.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("changes", KINDS)
def test_only_the_additions_learn(changes):
    net = small(**changes)
    add_lora(net.vit, 4)
    stirred(net)
    layers = [name for name, module in net.named_modules() if isinstance(module, LoraLinear)]
    assert {name.split(".", 3)[3] for name in layers} >= {"attn.qkv", "attn.proj", "mlp.fc2"}
    assert len(layers) == 2 * (5 if changes == KINDS[3] else 4)
    net.tokens(IMAGES, torch.ones(2, 16, dtype=torch.bool)).cls_ND.sum().backward()
    learning = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert learning == {"mask_token", *(f"{layer}.{part}" for layer in layers for part in ("lora_down", "lora_up"))}
    added = sum(parameter.numel() for name, parameter in net.vit.named_parameters() if "lora" in name)
    thin = [module.in_features + module.out_features for module in net.modules() if isinstance(module, LoraLinear)]
    assert added == 4 * sum(thin)


def test_merging_a_state_without_additions_changes_nothing():
    state = small().state_dict()
    assert merged_state(state).keys() == state.keys() and all(merged_state(state)[name] is state[name] for name in state)


def test_additions_learn_in_half_precision():
    net = small()
    add_lora(net.vit, 4)
    with torch.autocast("cpu", torch.bfloat16):
        net.tokens(IMAGES).cls_ND.sum().backward()
    assert all(p.grad.isfinite().all() for n, p in net.vit.named_parameters() if "lora" in n)


def test_only_the_last_blocks_and_the_norm_learn():
    net = small()
    train_last(net, 1)
    learning = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert {name.rpartition("vit.")[2].partition(".")[0] for name in learning} == {"blocks", "norm", "mask_token"}
    assert all(name.startswith(("vit.blocks.1.", "vit.norm.", "mask_token")) for name in learning)
    assert len(learning) == len(list(net.blocks[1].parameters())) + 3
    train_last(net, 99)
    assert all(parameter.requires_grad for block in net.blocks for parameter in block.parameters())
