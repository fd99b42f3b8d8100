import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from pathfm.errors import UsageError
from pathfm.models.checkpoints import export_encoder
from pathfm.models.vit import MaskedViT, build_backbone
from pathfm.models.weights import OFFICIAL_OFFSET, from_official, load_initial, to_official
from pathfm.pretrain_settings import PretrainSettings

OFFICIAL = ["noreg", "reg"]


@pytest.fixture(scope="session")
def official(golden):
    """The tiny official networks: dimensions, state, inputs and outputs, by kind."""
    with np.load(golden / "dinov2_vit_forward.npz") as file:
        content = {name: torch.tensor(file[name]) for name in file.files if name != "meta"}
        return json.loads(str(file["meta"])), {
            kind: {name.removeprefix(f"{kind}/"): value for name, value in content.items() if name.startswith(f"{kind}/")}
            for kind in OFFICIAL
        }


def state_of(content):
    return {name.removeprefix("state/"): value for name, value in content.items() if name.startswith("state/")}


def network(meta, kind, img_px=None):
    """timm's form of the tiny network, with fresh weights."""
    registers = 4 if kind == "reg" else 0
    shape = {"embed_dim": meta["embed_dim"], "depth": meta["depth"], "num_heads": meta["heads"], "patch_size": meta["patch"]}
    options = {"num_classes": 0, "init_values": 1e-5, "dynamic_img_size": True, "no_embed_class": kind == "reg"}
    return MaskedViT(VisionTransformer(img_px or meta["img_size"], reg_tokens=registers, **shape, **options)).eval()


def settings(**changes):
    plain = {"backbone": "vit_tiny", "patch_px": 8, "registers": 0, "layer_scale": 1e-5}
    return PretrainSettings.model_validate(plain | changes)


def backbone(img_px=32, **changes):
    """A network whose weights all matter."""
    net = MaskedViT(build_backbone(settings(**changes), img_px)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return net


def assert_features(net, content, name, images, mask=None):
    with torch.no_grad():
        found = net.tokens(images, mask)
    torch.testing.assert_close(found.cls_ND, content[f"{name}/cls"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.patches_NPD, content[f"{name}/patches"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", OFFICIAL)
def test_features_are_those_of_the_official_network_at_every_grid_and_masked(official, kind):
    meta, contents = official
    content, net = contents[kind], network(meta, kind)
    converted = from_official(state_of(content))
    net.vit.load_state_dict(converted.vit)
    net.mask_token.data.copy_(converted.mask_token)
    net.position_offset = OFFICIAL_OFFSET if kind == "noreg" else 0.0
    assert_features(net, content, "x56", content["x56"])
    assert_features(net, content, "x84", content["x84"])
    assert_features(net, content, "x56_masked", content["x56"], content["masks"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", OFFICIAL)
def test_a_checkpoint_file_is_fitted_to_another_grid_as_the_official_code_does(official, kind, suffix, tmp_path):
    meta, contents = official
    content, path = contents[kind], tmp_path / f"official{suffix}"
    if suffix == ".pth":
        torch.save(state_of(content), path)
    else:
        save_file(state_of(content), path)
    for side in (56, 84):
        net = network(meta, kind, side)
        found = load_initial(net, f"dinov2:{path}")
        assert_features(net, content, f"x{side}", content[f"x{side}"])
        assert found == {
            "source": path.name.join(["dinov2:", ""]),
            "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        torch.testing.assert_close(net.mask_token, content["state/mask_token"][0])


def wrapped(state, kind):
    """A state as training code writes it."""
    if kind == "teacher":
        heads = {"dino_head.last_layer.weight_v": torch.zeros(3)}
        return {"teacher": {f"backbone.{name}": value for name, value in state.items()} | heads, "iteration": 3}
    if kind == "module":
        return {f"module.{name}": value for name, value in state.items()}
    if kind == "student too":
        both = {
            f"{who}.backbone.{name}": value + (who == "student")
            for name, value in state.items()
            for who in ("student", "teacher")
        }
        return {"model": both}
    chunk = {"0": "0", "1": "1"}
    return {
        ".".join([name.split(".")[0], chunk[name.split(".")[1]], *name.split(".")[1:]])
        if name.startswith("blocks.")
        else name: value
        for name, value in state.items()
    }


@pytest.mark.parametrize("form", ["teacher", "module", "student too", "chunked"])
def test_prefixes_chunks_and_heads_are_understood(official, form, tmp_path):
    meta, contents = official
    torch.save(wrapped(state_of(contents["reg"]), form), tmp_path / "c.pth")
    net = network(meta, "reg")
    load_initial(net, f"dinov2:{tmp_path / 'c.pth'}")
    assert_features(net, contents["reg"], "x56", contents["reg"]["x56"])


@pytest.mark.parametrize("kind", OFFICIAL)
def test_official_to_timm_and_back_is_the_official_network(official, kind):
    _, contents = official
    before = from_official(state_of(contents[kind]))
    after = to_official(*before)
    assert after.keys() == state_of(contents[kind]).keys()
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in state_of(contents[kind]).items()}
    again = from_official(after)
    assert all(torch.equal(again.vit[name], tensor) for name, tensor in before.vit.items())


@pytest.mark.parametrize("changes", [{}, {"registers": 4}, {"mlp": "swiglu", "registers": 2}, {"layer_scale": 0}])
def test_timm_to_official_and_back_is_exact(changes):
    net = backbone(**changes)
    official = to_official(net.vit.state_dict(), net.mask_token)
    assert official["pos_embed"].shape == (1, 17, 192) and official["mask_token"].shape == (1, 192)
    assert ("blocks.0.mlp.w12.weight" in official) == ("mlp" in changes)
    back = from_official(official)
    assert back.vit.keys() == net.vit.state_dict().keys() and torch.equal(back.mask_token, net.mask_token)
    assert all(torch.equal(back.vit[name], tensor) for name, tensor in net.vit.state_dict().items())


def test_names_are_those_that_timm_itself_gives_official_checkpoints(official):
    from timm.models.vision_transformer import checkpoint_filter_fn

    meta, contents = official
    net = network(meta, "reg")
    theirs = checkpoint_filter_fn(state_of(contents["reg"]), net.vit)
    ours = from_official(state_of(contents["reg"])).vit
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_giant_checkpoint_fits():
    with torch.device("meta"):
        ours = build_backbone(settings(backbone="vit_giant", patch_px=None, registers=4), 518)
    official = to_official(ours.state_dict())
    shapes = {"blocks.39.mlp.w12.weight": (8192, 1536), "blocks.39.mlp.w3.weight": (1536, 4096), "pos_embed": (1, 1370, 1536)}
    assert {name: tuple(official[name].shape) for name in shapes} == shapes


def test_rotary_positions_have_no_official_form():
    with pytest.raises(UsageError, match="rotary positions"):
        to_official(backbone(positions="rope").vit.state_dict())


@pytest.mark.parametrize("changes", [{"registers": 2}, {"positions": "rope", "mlp": "swiglu"}])
def test_our_export_starts_another_run(tmp_path, changes):
    source = backbone(**changes)
    export_encoder(source.vit, settings(**changes), 32, {}, tmp_path / "e")
    net = backbone(48, **changes)
    found = load_initial(net, f"local-dir:{tmp_path / 'e'}")
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(net.tokens(images).cls_ND, source.tokens(images).cls_ND, rtol=0, atol=1e-5)
    assert found["source"] == "local-dir:e" and len(found["weights_sha256"]) == 64


@pytest.mark.parametrize("theirs", [False, True])
def test_a_class_token_keeps_its_position_wherever_it_is_kept(tmp_path, theirs):
    """Some of timm's networks have no position of the class token apart, where the official ones have one."""
    options = {"patch_size": 8, "img_size": 32, "num_classes": 0, "init_values": 1e-5, "dynamic_img_size": True}
    source, target = (
        MaskedViT(timm.create_model("vit_tiny_patch16_224", no_embed_class=apart, **options)).eval()
        for apart in (theirs, not theirs)
    )
    torch.save(source.vit.state_dict(), tmp_path / "w.pth")
    load_initial(target, f"dinov2:{tmp_path / 'w.pth'}")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(target.tokens(images), source.tokens(images), rtol=0, atol=1e-6)


def test_timm_weights_come_with_a_hash(monkeypatch):
    """The download itself is timm's matter."""
    created = timm.create_model
    source = created("vit_tiny_patch16_224", num_classes=0)
    monkeypatch.setattr(
        timm, "create_model", lambda name, **options: source if options.get("pretrained") else created(name, **options)
    )
    monkeypatch.setattr("pathfm.models.timm_networks.hub_file", lambda hub_id, names, encoder: Path("hub") / names[0])
    net = backbone(224, patch_px=16, layer_scale=0)
    found = load_initial(net, "timm:vit_tiny_patch16_224.augreg_in21k")
    assert found["source"] == "timm:vit_tiny_patch16_224.augreg_in21k" and len(found["weights_sha256"]) == 64
    assert all(torch.equal(net.vit.state_dict()[name], tensor) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"patch_px": 16}, "patch_embed.proj.weight.*set pretrain.patch_px: 8"),
        ({"registers": 4}, "reg_token nothing where .1, 4, 192. is needed.*set pretrain.registers: 0"),
        ({"layer_scale": 0}, "ls1.gamma .192. where nothing is needed.*set pretrain.layer_scale: 1e-05"),
        ({"mlp": "swiglu"}, "set pretrain.mlp: gelu"),
        ({"positions": "rope"}, "set pretrain.positions: learned"),
        ({"backbone": "vit_small"}, "set pretrain.backbone to the network that they are of"),
        ({"registers": 2, "patch_px": 4}, "set pretrain.patch_px: 8, pretrain.registers: 0"),
    ],
)
def test_weights_that_do_not_fit_say_which_setting_would(tmp_path, changes, advice):
    torch.save(to_official(backbone().vit.state_dict()), tmp_path / "w.pth")
    with pytest.raises(UsageError, match=advice) as error:
        load_initial(backbone(**changes), f"dinov2:{tmp_path / 'w.pth'}")
    assert (
        "\n" not in str(error.value) and len(str(error.value)) < 400 and "weights dinov2:w.pth do not fit" in str(error.value)
    )


def test_what_is_no_checkpoint_is_named(tmp_path):
    net = backbone()
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    for name in ("absent.pth", "empty.pth", "text.pth", "text.safetensors", "module.pth"):
        with pytest.raises(UsageError, match=f"pretrain.init: {name}: not a checkpoint that can be read"):
            load_initial(net, f"dinov2:{tmp_path / name}")
    with pytest.raises(UsageError, match="no DINOv2 network"):
        load_initial(net, f"dinov2:{tmp_path / 'other.pth'}")
    for init in ("resnet", "dinov2:", "untrained:vit_tiny"):
        with pytest.raises(UsageError, match=r"unknown weights.*use timm:NAME"):
            load_initial(net, init)
    with pytest.raises(UsageError, match=r"pretrain.init: timm has no model 'vit_nonsense'"):
        load_initial(net, "timm:vit_nonsense")
    with pytest.raises(UsageError, match=r"pretrain\.init: .*no encoder"):
        load_initial(net, f"local-dir:{tmp_path}")
