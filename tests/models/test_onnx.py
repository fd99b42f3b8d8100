"""ONNX files give torch's features for any batch, say nothing about the machine, and are asked for by the extra."""

import importlib.util

import numpy as np
import pytest
import torch

from pathfm.errors import MissingExtraError, StoreError
from pathfm.models import onnx_export
from pathfm.models.onnx_export import TOLERANCE, check_libraries, write_onnx
from pathfm.models.vit import build_backbone
from pathfm.pretrain_settings import PretrainSettings

HAS_ONNX = all(importlib.util.find_spec(name) for name in onnx_export.LIBRARIES)
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="the extra onnx is not installed")
# Inside the exporter and its libraries; nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def tiny(**changes):
    torch.manual_seed(3)
    vit = build_backbone(PretrainSettings(backbone="vit_tiny_patch16_224", layer_scale=0.1, **changes), 32)
    vit.blocks = vit.blocks[:2]
    return vit.eval()


@pytest.mark.long
@needs_onnx
@pytest.mark.parametrize("changes", [{"registers": 4}, {"positions": "rope"}], ids=["registers", "rope"])
def test_any_batch_gives_the_features_of_torch(tmp_path, changes):
    import onnxruntime

    vit = tiny(**changes)
    assert write_onnx(vit, 32, tmp_path / "m.onnx") < TOLERANCE
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = np.random.default_rng(batch).standard_normal((batch, 3, 32, 32), dtype=np.float32)
        cls_ND, mean_ND = session.run(["cls", "patch_mean"], {"images": images})
        with torch.inference_mode():
            tokens = vit.forward_features(torch.from_numpy(images))
        np.testing.assert_allclose(cls_ND, tokens[:, 0], atol=1e-5)
        np.testing.assert_allclose(mean_ND, tokens[:, vit.num_prefix_tokens :].mean(1), atol=1e-5)


@pytest.mark.long
@needs_onnx
def test_the_file_repeats_and_names_no_place(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        write_onnx(tiny(), 32, tmp_path / name)
    content = (tmp_path / "a.onnx").read_bytes()
    assert content == (tmp_path / "b.onnx").read_bytes()
    assert b".py" not in content and b"site-packages" not in content


@needs_onnx
def test_large_networks_get_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "ONE_FILE_BYTES", 0)
    assert write_onnx(tiny(), 32, tmp_path / "m.onnx") < TOLERANCE
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}


@needs_onnx
def test_a_network_that_differs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_difference", lambda *_: 2e-4)
    with pytest.raises(StoreError, match=r"differs from torch by 0\.0002"):
        write_onnx(tiny(), 32, tmp_path / "m.onnx")
    monkeypatch.setattr(onnx_export, "_difference", lambda *_: float("nan"))
    with pytest.raises(StoreError, match="differs from torch by nan"):
        write_onnx(tiny(), 32, tmp_path / "m.onnx")


def test_missing_libraries_are_named_with_their_install_line(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find(name, *rest))
    with pytest.raises(MissingExtraError, match=r"pip install 'pathfm\[onnx\]'"):
        check_libraries()
