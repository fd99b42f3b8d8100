"""Exported encoders: plain timm rebuilds every kind of backbone, to the bit; the card says whence it comes."""

import json
import subprocess
import sys

import pytest
import timm
import torch

from pathfm.errors import StoreError
from pathfm.models.checkpoints import differences, export_encoder, load_encoder_folder, provenance, read_card
from pathfm.models.vit import build_backbone
from pathfm.pretrain_settings import CropSettings, PretrainSettings
from pathfm.store.commit import content_digest

KINDS = {
    "plain": {"registers": 0, "layer_scale": 0.0},
    "registers and LayerScale": {"registers": 4, "layer_scale": 1e-5},
    "patches of 8": {"patch_px": 8},
    "patches of 14": {"patch_px": 14},
    "SwiGLU": {"mlp": "swiglu"},
    "rope": {"positions": "rope"},
    "rope, SwiGLU, no registers": {"positions": "rope", "mlp": "swiglu", "registers": 0},
    "stochastic depth": {"drop_path": 0.3},
}


def settings(**changes) -> PretrainSettings:
    return PretrainSettings(**{"backbone": "vit_tiny_patch16_224", "layer_scale": 0.1, **changes})


def network(made: PretrainSettings, img_px: int) -> torch.nn.Module:
    torch.manual_seed(1)
    vit = build_backbone(made, img_px)
    with torch.no_grad():
        for parameter in vit.parameters():  # so that nothing is zero or one, as fresh biases and norms are
            parameter.add_(0.05 * torch.randn_like(parameter))
    return vit.eval()


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_plain_timm_gives_the_same_features(tmp_path, changes):
    made = settings(**changes)
    side = 7 * 8 * (1 if "patch_px" in changes else 2)
    vit = network(made, side)
    state = torch.get_rng_state()
    export_encoder(vit, made, side, {"step": 7}, tmp_path / "teacher")
    assert torch.equal(torch.get_rng_state(), state), "exporting in the middle of a run must not change the run"
    loaded = timm.create_model(f"local-dir:{tmp_path / 'teacher'}", pretrained=True).eval()
    for pixels in (side, 2 * side):
        images = torch.randn(2, 3, pixels, pixels)
        with torch.inference_mode():
            ours = vit.forward_features(images)
            assert torch.equal(loaded.forward_features(images), ours)
            assert torch.equal(loaded(images), ours[:, 0]), "the model's output is the class token"
    assert tuple(loaded.pretrained_cfg["input_size"]) == (3, side, side)


def test_timm_alone_loads_it(tmp_path):
    """In a process that never imports pathfm."""
    export_encoder(network(settings(), 32), settings(), 32, {}, tmp_path / "e")
    code = (
        "import sys, timm; timm.create_model('local-dir:' + sys.argv[1], pretrained=True); assert 'pathfm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "e")], check=True, capture_output=True)


def test_the_card_carries_hash_and_provenance(tmp_path):
    made = settings(preset="dinov2", steps=50)
    card = {"fingerprint": "f00d", "step": 50, **provenance(made, {"a": "1", "b": "2"})}
    export_encoder(network(made, 32), made, 32, card, tmp_path / "e")
    read = read_card(tmp_path / "e")
    assert {name: read[name] for name in ("fingerprint", "step", "preset", "slides")} == {
        "fingerprint": "f00d",
        "step": 50,
        "preset": "dinov2",
        "slides": 2,
    }
    assert read["differs"] == {"backbone": "vit_tiny_patch16_224", "layer_scale": 0.1, "steps": 50}
    assert read["stores_digest"] == provenance(made, {"b": "2", "a": "1"})["stores_digest"]
    assert read["stores_digest"] != provenance(made, {"a": "1", "b": "3"})["stores_digest"]
    assert load_encoder_folder(tmp_path / "e").card == read


def test_equal_networks_give_equal_folders(tmp_path):
    for name in ("a", "b"):
        export_encoder(network(settings(), 32), settings(), 32, {"step": 1}, tmp_path / name)
    assert content_digest(tmp_path / "a") == content_digest(tmp_path / "b")


def test_an_export_that_timm_cannot_load_leaves_nothing(tmp_path):
    vit = network(settings(), 32)
    with pytest.raises(StoreError, match="timm"):
        export_encoder(vit, settings(mlp="swiglu"), 32, {}, tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(tmp_path):
    with pytest.raises(StoreError, match="no encoder"):
        load_encoder_folder(tmp_path / "absent")
    export_encoder(network(settings(), 32), settings(), 32, {}, tmp_path / "e")
    weights = tmp_path / "e" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StoreError, match="not those the card was written for"):
        load_encoder_folder(tmp_path / "e")
    (tmp_path / "e" / "card.json").unlink()
    (tmp_path / "e" / "config.json").write_text(json.dumps({"architecture": "nonesuch"}))
    with pytest.raises(StoreError, match="timm cannot load this encoder"):
        load_encoder_folder(tmp_path / "e")


def test_differences_name_what_the_preset_does_not_say():
    assert differences(PretrainSettings()) == {}
    assert differences(PretrainSettings(preset="dinov2")) == {}
    assert differences(PretrainSettings(preset="distill", teacher="timm:x")) == {"teacher": "timm:x"}
    changed = PretrainSettings(preset="dinov2", lr=1e-3, crops=CropSettings(local_count=4))
    assert differences(changed)["lr"] == 1e-3 and differences(changed)["crops.local_count"] == 4
