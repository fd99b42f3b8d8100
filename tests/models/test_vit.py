import json

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from pathfm.errors import StoreError, UsageError
from pathfm.models.checkpoints import export_encoder, load_encoder_folder, read_card
from pathfm.models.vit import MaskedViT, build_backbone

RENAMED = {"register_tokens": "reg_token"}


def small(**changes):
    torch.manual_seed(0)
    vit = build_backbone("vit_tiny_patch16_224", 32, 8, **changes).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return vit


@pytest.mark.parametrize("kind", ["noreg", "reg"])
def test_features_match_the_official_network(golden, kind):
    with np.load(golden / "dinov2_vit_forward.npz") as file:
        meta = json.loads(str(file["meta"]))
        content = {name.removeprefix(f"{kind}/"): torch.tensor(file[name]) for name in file.files if name.startswith(kind)}
    state = {RENAMED.get(name[6:], name[6:]): value for name, value in content.items() if name.startswith("state/")}
    mask_token = state.pop("mask_token")[0]
    if kind == "reg":  # timm keeps positions of patches only; the class token's own is part of the token
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    vit = VisionTransformer(
        img_size=meta["img_size"],
        patch_size=meta["patch"],
        embed_dim=meta["embed_dim"],
        depth=meta["depth"],
        num_heads=meta["heads"],
        num_classes=0,
        init_values=1e-5,
        dynamic_img_size=True,
        reg_tokens=4 if kind == "reg" else 0,
        no_embed_class=kind == "reg",
    )
    vit.load_state_dict(state)
    net = MaskedViT(vit).eval()
    with torch.no_grad():
        net.mask_token.copy_(mask_token)
        # The official network without registers resizes positions in another way (offset 0.1), which timm does not have.
        for name in ["x56"] + ["x84"] * (kind == "reg"):
            found = net.tokens(content[name])
            torch.testing.assert_close(found.cls_ND, content[f"{name}/cls"], rtol=1e-5, atol=2e-5)
            torch.testing.assert_close(found.patches_NPD, content[f"{name}/patches"], rtol=1e-5, atol=2e-5)
        found = net.tokens(content["x56"], content["masks"])
    torch.testing.assert_close(found.cls_ND, content["x56_masked/cls"], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found.patches_NPD, content["x56_masked/patches"], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("registers", [0, 3])
def test_tokens_without_a_mask_are_those_of_timm(registers):
    vit = small(registers=registers)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = vit.forward_features(images)
        found = MaskedViT(vit).tokens(images)
    torch.testing.assert_close(found.cls_ND, expected[:, 0])
    torch.testing.assert_close(found.patches_NPD, expected[:, 1 + registers :])


def test_crops_of_several_sizes_are_independent():
    net = MaskedViT(small())
    large, little = torch.randn(2, 3, 32, 32), torch.randn(4, 3, 16, 16)
    mask = torch.rand(2, 16) > 0.5
    with torch.no_grad():
        both = net([large, little], [mask, None])
        alone = [net.tokens(large, mask), net.tokens(little)]
    assert [tokens.patches_NPD.shape for tokens in both] == [(2, 16, 192), (4, 4, 192)]
    assert all(torch.equal(a.cls_ND, b.cls_ND) for a, b in zip(both, alone, strict=True))


def test_a_mask_replaces_embeddings_by_the_mask_token():
    net = MaskedViT(small())
    net.mask_token.data.normal_()
    images, everything = torch.randn(2, 3, 32, 32), torch.ones(2, 16, dtype=torch.bool)
    with torch.no_grad():
        hidden, plain = net.tokens(images, everything), net.tokens(images)
        torch.testing.assert_close(hidden.cls_ND[0], hidden.cls_ND[1])
        assert torch.equal(net.tokens(images, ~everything).cls_ND, plain.cls_ND)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("vit_tiny_patch16_223", 32),
            r"pretrain.backbone: timm has no model 'vit_tiny_patch16_223' \(perhaps vit_tiny_patch16_224",
        ),
        (("resnet18", 32), "not a vision transformer"),
        (("vit_tiny_patch16_224", 40), "patches of 16 px do not divide an image of 40 px"),
    ],
)
def test_an_impossible_backbone_is_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        build_backbone(*arguments)


@pytest.mark.parametrize("changes", [{}, {"registers": 2, "layer_scale": 1e-5, "drop_path": 0.1}])
def test_an_exported_encoder_gives_the_same_features_in_plain_timm(tmp_path, changes):
    vit = small(**changes).eval()
    export_encoder(vit, "vit_tiny_patch16_224", 32, {"fingerprint": "f", "mpp": 0.5, "tile_px": 40, "step": 3}, tmp_path / "e")
    plain = timm.create_model(f"local-dir:{tmp_path / 'e'}", pretrained=True).eval()
    ours = load_encoder_folder(tmp_path / "e")
    for side in (32, 48):
        images = torch.randn(2, 3, side, side)
        with torch.no_grad():
            expected = vit(images)
            assert expected.shape == (2, 192)
            torch.testing.assert_close(plain(images), expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(ours.model(images), expected, rtol=0, atol=1e-6)
    config = timm.data.resolve_model_data_config(plain)
    assert (tuple(config["input_size"]), config["crop_pct"], config["interpolation"]) == ((3, 32, 32), 1.0, "bicubic")
    assert ours.card["fingerprint"] == "f" and ours.card["step"] == 3 and len(ours.card["weights_sha256"]) == 64


def test_an_export_is_the_same_bytes_every_time(tmp_path):
    for name in "ab":
        export_encoder(small(), "vit_tiny_patch16_224", 32, {"step": 1}, tmp_path / name)
    for name in ("model.safetensors", "config.json", "card.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_damage_and_absence_are_named(tmp_path):
    with pytest.raises(StoreError, match="no encoder"):
        load_encoder_folder(tmp_path)
    assert read_card(tmp_path) is None
    export_encoder(small(), "vit_tiny_patch16_224", 32, {}, tmp_path / "e")
    weights = tmp_path / "e" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)
    with pytest.raises(StoreError, match="not those the card was written for"):
        load_encoder_folder(tmp_path / "e")
    (tmp_path / "e" / "card.json").unlink()
    weights.write_bytes(b"nonsense" * 8)
    with pytest.raises(StoreError, match="timm cannot load"):
        load_encoder_folder(tmp_path / "e")
