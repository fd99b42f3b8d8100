"""Torch files with features: those of other tools open with their tiles, nothing in them is run; ours are always the same."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import torch

from pathfm.errors import StoreError
from pathfm.models.pt_files import read_pt_features, write_pt
from pathfm.store.interop.features import read_features
from tests.interop_files import CMU, interop_folder

REAL = {
    f"clam/features/pt_files/{CMU}.pt": ("CLAM", (50, 192), 256, f"clam/features/h5_files/{CMU}.h5"),
    f"slide2vec/pt/tile_embeddings/{CMU}.pt": ("slide2vec", (73, 192), 224, f"slide2vec/npz/tile_embeddings/{CMU}.npz"),
    f"trident_edge/features_one/{CMU}.pt": ("TRIDENT", (1, 192), 256, f"trident_edge/features_one/{CMU}.h5"),
    f"trident_edge/features_float_ratio/{CMU}.pt": (
        *("TRIDENT", (2, 192), 2048 / 3),
        f"trident_edge/features_float_ratio/{CMU}.h5",
    ),
    f"trident_edge/features_empty/{CMU}.pt": ("TRIDENT", (0, 0), 256, f"trident_edge/features_empty/{CMU}.h5"),
}


class Planted:
    def __reduce__(self):
        return print, ("a word from the file",)


@pytest.fixture(scope="module")
def real():
    return interop_folder()


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_what_their_tool_keeps_as_hdf5(real, name):
    tool, shape, side, other = REAL[name]
    read, twin = read_pt_features(real / name), read_features(real / other)
    assert (read.tool, read.features.shape, read.features.dtype, read.level) == (tool, shape, "float32", "tile")
    assert read.side_level0 == pytest.approx(side)
    np.testing.assert_array_equal(read.coords, twin.coords)
    if tool != "slide2vec":  # its two runs had different random networks
        np.testing.assert_allclose(read.features, twin.features, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_any_precision(tmp_path, dtype):
    values = torch.tensor([[1.0, -3.140625], [2.0**14, 0.0]], dtype=dtype, requires_grad=True)
    torch.save(values, tmp_path / "a.pt")
    read = read_pt_features(tmp_path / "a.pt")
    assert (read.tool, read.coords, read.features.dtype) == (
        *("unknown", None),
        "float16" if dtype == torch.float16 else "float32",
    )
    np.testing.assert_array_equal(read.features, values.detach().double().numpy())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_pickled_arrays(tmp_path, dtype):
    torch.save(np.ones((2, 3), dtype), tmp_path / "a.pt")
    np.testing.assert_array_equal(read_pt_features(tmp_path / "a.pt").features, 1)


def test_one_vector_is_that_of_a_slide(tmp_path):
    torch.save(torch.ones(5), tmp_path / "a.pt")
    read = read_pt_features(tmp_path / "a.pt")
    assert (read.level, read.features.shape) == ("slide", (1, 5))


@pytest.mark.parametrize(
    "content",
    [
        Planted(),
        {"features": torch.ones(2, 3)},
        [1, 2],
        torch.ones(2, 3, dtype=torch.int64),
        torch.ones(2, 3, 4),
        torch.tensor([[1.0, float("nan")]]),
        np.array([[Planted()]], dtype=object),
        np.array([["a"]]),
        torch.eye(3).to_sparse(),
    ],
    ids=["code", "dict", "list", "whole numbers", "three axes", "nan", "objects", "text", "sparse"],
)
def test_what_is_no_features_is_refused_and_never_run(tmp_path, capsys, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(StoreError) as caught:
        read_pt_features(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    assert "a word" not in "".join(capsys.readouterr())


def test_damaged_absent_and_other_files_are_refused(tmp_path, real):
    whole = (real / f"clam/features/pt_files/{CMU}.pt").read_bytes()
    for content in (b"", b"hello", pickle.dumps(Planted()), *(whole[: int(len(whole) * share)] for share in (0.1, 0.5, 0.99))):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(StoreError, match="damaged"):
            read_pt_features(tmp_path / "a.pt")
    with pytest.raises(StoreError, match="no feature file"):
        read_pt_features(tmp_path / "absent.pt")


def test_what_lies_beside_must_fit(tmp_path, real):
    shutil.copytree(real / "clam/features/h5_files", tmp_path / "h5_files")
    (tmp_path / "pt_files").mkdir()
    torch.save(torch.ones(50, 191), tmp_path / "pt_files" / f"{CMU}.pt")
    with pytest.raises(StoreError, match=r"\(50, 191\), where .* has \(50, 192\)"):
        read_pt_features(tmp_path / "pt_files" / f"{CMU}.pt")


def test_ours_are_one_float32_tensor_and_the_same_bytes_each_time(tmp_path, real):
    values = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float16)
    for name in ("a.pt", "b.pt"):
        write_pt(tmp_path / name, values)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    theirs = torch.load(real / f"clam/features/pt_files/{CMU}.pt", weights_only=True)
    ours = torch.load(tmp_path / "a.pt", weights_only=True)
    assert (type(ours), ours.dtype, ours.is_contiguous()) == (type(theirs), theirs.dtype, theirs.is_contiguous())
    np.testing.assert_array_equal(ours.numpy(), values)
