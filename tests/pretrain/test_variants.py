"""Every preset, phase and kind of training through the whole stage, a few steps each; and what comes out loads anywhere."""

import json

import pytest
import timm
import torch

from pathfm.errors import UsageError
from pathfm.models.checkpoints import load_encoder_folder
from pathfm.presets import PRESETS
from pathfm.pretrain.stage import run_pretrain
from pathfm.store.manifest import manifest_of
from tests.pretrain.conftest import study
from tests.pretrain.test_stage import rows

TEACHER = "untrained:vit_tiny_patch16_224"


def trained(tmp_path, stores, **changes):
    """A run of three steps, and its curve."""
    run_pretrain(study(**changes), stores, tmp_path / "e", "print")
    curve = rows(tmp_path / "e")
    assert [row["step"] for row in curve] == ["0", "1", "2"]
    return load_encoder_folder(tmp_path / "e/teacher"), curve


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_and_plain_timm_loads_what_it_makes(tmp_path, stores, preset):
    plain = study().pretrain
    small = {name: getattr(plain, name) for name in ("prototypes", "head_hidden", "head_bottleneck", "health")}
    crops = {"global_px": 32, "local_px": 16, "local_count": 0 if preset == "distill" else 2}
    changes = {"preset": preset, **small, "crops": crops, "teacher": TEACHER if preset == "distill" else None}
    settings = study().model_copy(
        update={
            "pretrain": type(plain)(
                **changes, backbone="vit_tiny_patch16_224", steps=3, batch_size=4, warmup_steps=1, gram={"start": 0.4}
            )
        }
    )
    run_pretrain(settings, stores, tmp_path / "e", "print")
    curve = rows(tmp_path / "e")
    assert float(curve[2]["loss"]) > 0
    model = timm.create_model(f"local-dir:{tmp_path / 'e/teacher'}", pretrained=True, num_classes=0)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 192)
    assert manifest_of(tmp_path / "e/teacher") is not None
    untrained = load_encoder_folder(tmp_path / "e/untrained").model.state_dict()
    assert any(not torch.equal(untrained[name], tensor) for name, tensor in model.state_dict().items())
    if preset not in ("distill", "dinov3"):
        assert all(float(row["gram_weight"]) == 0 for row in curve[:1])


def test_gram_anchoring_begins_after_its_share_of_the_steps_and_moves_the_student(tmp_path, stores):
    _, curve = trained(tmp_path, stores, gram={"start": 0.67, "weight": 3.0, "local_weight": 0.25})
    assert [float(row["gram_weight"]) for row in curve] == [0.0, 0.0, 3.0]
    assert [float(row["local_weight"]) for row in curve] == [1.0, 1.0, 0.25]
    assert [float(row["gram"]) > 0 for row in curve] == [False, False, True]
    last = {name: float(curve[2][name]) for name in ("loss", "dino_global", "dino_local", "ibot", "koleo", "gram")}
    parts = last["dino_global"] + 0.25 * last["dino_local"] + last["ibot"] + 0.1 * last["koleo"] + 3 * last["gram"]
    assert last["loss"] == pytest.approx(parts, rel=1e-4)


def test_larger_crops_and_a_lower_rate_in_the_high_resolution_phase(tmp_path, stores):
    crops = {"global_px": 16, "local_px": 16, "local_count": 1, "scale_of": "crop"}
    high = {"start": 0.34, "global_px": 32, "local_px": 16, "lr_factor": 0.1}
    changes = {"crops": crops, "high_resolution": high, "patch_px": 8, "schedule": "constant"}
    _, curve = trained(tmp_path, stores, **changes)
    assert float(curve[1]["lr"]) == pytest.approx(0.1 * float(curve[0]["lr"]))


@pytest.mark.parametrize("train", ["lora", *(pytest.param(train, marks=pytest.mark.long) for train in ("all", "last"))])
def test_continued_pretraining_changes_what_it_is_told_to_and_reports_the_drift(tmp_path, stores, train):
    run_pretrain(study(steps=2), stores, tmp_path / "first", "first")
    init = f"local-dir:{tmp_path / 'first/teacher'}"
    encoder, _ = trained(tmp_path, stores, init=init, train=train, train_blocks=2, lora_rank=2, lr=0.1, ema=(0.5, 0.5))
    before = load_encoder_folder(tmp_path / "first/teacher").model.state_dict()
    assert all(torch.equal(before[name], value) for name, value in untrained_of(tmp_path).items())
    changed = {name for name, value in encoder.model.state_dict().items() if not torch.equal(before[name], value)}
    blocks = {name.split(".")[1] for name in changed if name.startswith("blocks.")}
    assert blocks == ({"10", "11"} if train == "last" else {str(block) for block in range(12)})
    assert ("patch_embed.proj.weight" in changed) == (train == "all")
    if train == "lora":
        assert all(name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")) for name in changed)
    drift = json.loads((tmp_path / "e/drift.json").read_text())
    assert 0 < drift["cka_cls"] < 1 and drift["cka_patch_mean"] > 0.1
    assert encoder.card["init"]["source"]


def untrained_of(tmp_path):
    return load_encoder_folder(tmp_path / "e/untrained").model.state_dict()


def test_a_start_that_does_not_fit_is_named(tmp_path, stores):
    run_pretrain(study(steps=2), stores, tmp_path / "first", "first")
    with pytest.raises(UsageError, match=r"pretrain\.init"):
        run_pretrain(
            study(backbone="vit_small_patch16_224", init=f"local-dir:{tmp_path / 'first/teacher'}"),
            stores,
            tmp_path / "e",
            "print",
        )


@pytest.mark.long
def test_distillation_nears_the_features_of_its_teacher(tmp_path, stores):
    settings = study().pretrain.model_copy(update={"health": study().pretrain.health})
    changes = {"preset": "distill", "teacher": TEACHER, "steps": 30, "lr": 0.02, "warmup_steps": 5, "crops": {"global_px": 32}}
    small = type(settings)(**changes, backbone="vit_tiny_patch16_224", batch_size=8, health=settings.health, layer_scale=0.0)
    run_pretrain(study().model_copy(update={"pretrain": small}), stores, tmp_path / "e", "print")
    curve = rows(tmp_path / "e")
    assert {"cls", "patches"} <= set(curve[0]) and float(curve[-1]["loss"]) < 0.8 * float(curve[0]["loss"])
    assert not [name for name in load_encoder_folder(tmp_path / "e/teacher").model.state_dict() if "cls_head" in name]


@pytest.mark.long
# Inside dynamo, about tensors of its own.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_are_looked_at_too(tmp_path, stores, monkeypatch):
    """Compiled blocks call no hooks on their parts, which the attention maps need. The eager backend suffices to see that."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled(self, backend="eager", **options))
    plain = study(health={"tiles": 16, "maps": 1}, steps=2)
    study_of = plain.model_copy(update={"compute": plain.compute.model_copy(update={"compile": True})})
    run_pretrain(study_of, stores, tmp_path / "compiled", "print")
    run_pretrain(plain, stores, tmp_path / "plain", "print")
    ours, theirs = (rows(tmp_path / name) for name in ("compiled", "plain"))
    assert [float(row["loss"]) for row in ours] == pytest.approx([float(row["loss"]) for row in theirs], rel=1e-5)
    assert len(list((tmp_path / "compiled/health").glob("step-*.png"))) == 2


def test_recomputed_activations_change_nothing(tmp_path, stores):
    plain = study(steps=2, drop_path=0.3)
    again = plain.model_copy(update={"compute": plain.compute.model_copy(update={"checkpoint_activations": True})})
    for name, settings in (("plain", plain), ("again", again)):
        run_pretrain(settings, stores, tmp_path / name, "print")
    assert (tmp_path / "plain/metrics.csv").read_text() == (tmp_path / "again/metrics.csv").read_text()
