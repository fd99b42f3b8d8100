"""An exported encoder is whole or absent, says what it is and what it has seen, and replaces nothing that is not itself."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import timm
import torch

from pathfm.errors import MissingExtraError, StoreError, UsageError
from pathfm.exporting import Wanted, export_encoder_folder, find_encoder
from pathfm.inspection import inspect_path
from pathfm.models.checkpoints import export_encoder, provenance
from pathfm.models.vit import build_backbone
from pathfm.pretrain_settings import PretrainSettings
from pathfm.store.commit import content_digest
from pathfm.store.manifest import manifest_of, write_manifest
from pathfm.store.tile_store import write_tiles
from pathfm.verification import verify

SETTINGS = PretrainSettings(backbone="vit_tiny_patch16_224", steps=9)
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """An output folder with a finished encoder that has seen two slides of one patient."""
    out = tmp_path_factory.mktemp("out")
    (out / "study.yaml").write_text("name: x\n")
    encoder = out / "encoder" / "vit_tiny-abcd"
    for slide_id in ("s1", "s2"):
        write_tiles(out / f"{slide_id}.zarr", np.full((2, 16, 16, 3), 9, np.uint8), slide_id=slide_id, mpp=0.5)
    stores = [out / "s1.zarr", out / "s2.zarr"]
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        digest = write_manifest(out / "manifest.csv", stores, {"s1": "p", "s2": "p"})
        card = {"fingerprint": "f00d", "step": 9, "mpp": 0.5, "tile_px": 16, "manifest_sha256": digest}
        card |= provenance(SETTINGS, {"s1": "1", "s2": "2"})
        export_encoder(build_backbone(SETTINGS, 32), SETTINGS, 32, card, encoder / name)
        shutil.copy(out / "manifest.csv", encoder / name / "manifest.csv")
    return out


def encoder(study):
    return study / "encoder" / "vit_tiny-abcd"


def test_the_folder_says_what_the_encoder_is(study, tmp_path, capsys):
    assert export_encoder_folder(study, tmp_path / "e", Wanted(licence="cc-by-4.0")) == 0
    assert "EMA teacher" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "e").iterdir()}
    assert names == {"config.json", "model.safetensors", "card.json", "README.md", "manifest.csv", "record.json"}
    card = json.loads((tmp_path / "e" / "card.json").read_text())
    assert card["preprocessing"]["input_px"] == 32 and card["mpp"] == 0.5 and card["licence"] == "cc-by-4.0"
    assert card["seen"] == {"slides": 2, "patients": 1}
    readme = (tmp_path / "e" / "README.md").read_text()
    for words in (
        "license: cc-by-4.0",
        "dinov2-path",
        "0.5 um per px",
        card["weights_sha256"],
        "slides: 2, patients: 1",
        "32 px",
    ):
        assert words in readme
    assert manifest_of(tmp_path / "e") == tmp_path / "e" / "manifest.csv"
    told = inspect_path(tmp_path / "e")
    for words in ("f00d", "dinov2-path", "cc-by-4.0", "slides: 2", "backbone: vit_tiny_patch16_224"):
        assert words in told
    vit = timm.create_model(f"local-dir:{tmp_path / 'e'}", pretrained=True)
    assert vit(torch.zeros(1, 3, 32, 32)).shape == (1, 192)


def test_every_file_of_an_export_is_hashed(study, tmp_path, capsys):
    out = tmp_path / "e"
    export_encoder_folder(study, out, Wanted())
    assert set(json.loads((out / "card.json").read_text())["files"]) == {
        *("config.json", "model.safetensors", "README.md", "manifest.csv")
    }
    assert verify(out) == 0
    for name in ("config.json", "README.md", "manifest.csv", "card.json"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole.replace(b"1", b"2", 1))
        capsys.readouterr()
        assert verify(out) == 3
        assert f"  {name}: differs from what was made" in capsys.readouterr().out
        (out / name).write_bytes(whole)
    (out / "README.md").unlink()
    assert verify(out) == 3
    assert "  README.md: missing" in capsys.readouterr().out


def test_the_code_on_the_card_runs(study, tmp_path):
    export_encoder_folder(study, tmp_path / "e", Wanted())
    code = (tmp_path / "e" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("THIS_FOLDER", str(tmp_path / "e")), names)
    assert tuple(names["features"].shape) == (1, 384)
    assert f"# {list(names['tokens'].shape)}" in code


def test_teacher_student_and_every_way_to_name_them(study, tmp_path):
    weights = {}
    for name, student in (("teacher", False), ("student", True)):
        for source in (study, encoder(study), encoder(study) / name, study / "study.yaml"):
            if source.name == "study.yaml":
                source.write_text("name: x\nout: .\n")
            assert find_encoder(source, student) == encoder(study) / name
        export_encoder_folder(study, tmp_path / name, Wanted(student=student))
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["teacher"] != weights["student"]
    assert "student" in (tmp_path / "student" / "README.md").read_text()
    # An export of an export is the same encoder, and keeps its name.
    export_encoder_folder(tmp_path / "student", tmp_path / "again", Wanted())
    assert content_digest(tmp_path / "again") == content_digest(tmp_path / "student")


def test_what_is_not_there_or_not_unique_is_named(study, tmp_path):
    (tmp_path / "study.yaml").write_text("name: x\n")
    with pytest.raises(UsageError, match=r"no teacher of a pretrained encoder.*pathfm pretrain"):
        find_encoder(tmp_path)
    with pytest.raises(UsageError, match="no such study file"):
        find_encoder(tmp_path / "nowhere")
    for name in ("a", "b"):
        shutil.copytree(encoder(study), tmp_path / "encoder" / name)
    with pytest.raises(UsageError, match=r"2 encoders.*encoder/a, .*encoder/b"):
        find_encoder(tmp_path)
    shutil.rmtree(tmp_path / "encoder" / "a" / "student")
    with pytest.raises(UsageError, match="no student"):
        find_encoder(tmp_path / "encoder" / "a", student=True)
    (tmp_path / "encoder" / "a" / "teacher" / "card.json").unlink()
    with pytest.raises(UsageError, match="without a card"):
        export_encoder_folder(tmp_path / "encoder" / "a", tmp_path / "out", Wanted())


def test_nothing_is_replaced_but_itself(study, tmp_path):
    (tmp_path / "e").mkdir()
    export_encoder_folder(study, tmp_path / "e", Wanted())
    export_encoder_folder(study, tmp_path / "e", Wanted(licence="mit"))
    assert json.loads((tmp_path / "e" / "card.json").read_text())["licence"] == "mit"
    before = content_digest(tmp_path / "e")
    for source, student in ((study, True), (tmp_path / "e", False)):
        with pytest.raises(UsageError, match="something else is there"):
            export_encoder_folder(source, tmp_path / "e", Wanted(student=student))
    assert content_digest(tmp_path / "e") == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="something else is there"):
        export_encoder_folder(study, tmp_path / "file", Wanted())


def test_damage_leaves_nothing_behind(study, tmp_path):
    shutil.copytree(encoder(study), tmp_path / "x")
    weights = tmp_path / "x" / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    with pytest.raises(StoreError, match="not those the card was written for"):
        export_encoder_folder(tmp_path / "x", tmp_path / "e", Wanted())
    (tmp_path / "x" / "student" / "manifest.csv").write_text("")
    with pytest.raises(StoreError, match="list of slides"):
        export_encoder_folder(tmp_path / "x", tmp_path / "e", Wanted(student=True))
    assert {path.name for path in tmp_path.iterdir()} == {"x"}


@pytest.mark.skipif(HAS_ONNX, reason="the extra onnx is installed")
def test_onnx_without_its_extra_is_refused_before_any_work(study, tmp_path):
    with pytest.raises(MissingExtraError, match=r"pathfm\[onnx\]"):
        export_encoder_folder(study, tmp_path / "e", Wanted(onnx=True))
    assert not (tmp_path / "e").exists()


@pytest.mark.skipif(not HAS_ONNX, reason="the extra onnx is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_comes_with_its_hash_and_its_difference(study, tmp_path, capsys):
    export_encoder_folder(study, tmp_path / "e", Wanted(onnx=True))
    assert "ONNX within" in capsys.readouterr().out
    card, record = (json.loads((tmp_path / "e" / name).read_text()) for name in ("card.json", "record.json"))
    assert set(card["onnx"]["sha256"]) == {"model.onnx"} and (tmp_path / "e" / "model.onnx").is_file()
    assert record["onnx_max_difference"] < 1e-4
    assert card["onnx"]["sha256"]["model.onnx"] in (tmp_path / "e" / "README.md").read_text()
