"""Features of other tools: every file they have written opens with its tiles in place, or is refused with the reason."""

from __future__ import annotations

import json
import shutil

import h5py
import numpy as np
import pytest
import zarr

from pathfm.errors import MissingExtraError, StoreError
from pathfm.models.pt_files import read_pt_features
from pathfm.store.feature_file import open_features, read_feature_attrs, write_features
from pathfm.store.interop import read_coords
from pathfm.store.interop.features import place_features, read_features
from tests.interop_files import CMU, CMU_MPP, interop_folder

TRIDENT = "trident/20x_256px_0px_overlap"
REAL = {  # tool, shape, type, first corner, side on level 0, side of the picture, mpp, encoder
    f"clam/features/h5_files/{CMU}.h5": ("CLAM", (50, 192), "float32", (320, 838), 256, 256, None, None),
    f"{TRIDENT}/features_vit_tiny_random/{CMU}.h5": (
        *("TRIDENT", (58, 192), "float32", (768, 0), 256, 256, None),
        "vit_tiny_random",
    ),
    f"{TRIDENT}/features_resnet18_random_fp16/{CMU}.h5": (
        *("TRIDENT", (58, 512), "float16", (768, 0), 256, 256, None),
        "resnet18_random_fp16",
    ),
    f"{TRIDENT}/features_vit_tiny_random_bf16/{CMU}.h5": (
        *("TRIDENT", (58, 192), "float32", (768, 0), 256, 256, None),
        "vit_tiny_random_bf16",
    ),
    f"trident_edge/features_one/{CMU}.h5": ("TRIDENT", (1, 192), "float32", (512, 512), 256, 256, None, "vit_tiny_random"),
    f"trident_edge/features_float_ratio/{CMU}.h5": (
        *("TRIDENT", (2, 192), "float32", (0, 0), 2048 / 3, 256, None),
        "vit_tiny_random",
    ),
    f"trident_edge/features_empty/{CMU}.h5": ("TRIDENT", (0, 0), "float32", None, 256, 256, None, "vit_tiny_random"),
    f"stamp/vit_tiny_random-49b04e14/{CMU}.h5": (
        *("STAMP", (18, 192), "float16", (514, 0), 514, 224, 514 * CMU_MPP / 224),
        "vit_tiny_random",
    ),
    f"slide2vec/npz/tile_embeddings/{CMU}.npz": (
        *("slide2vec", (73, 192), "float32", (49, 959), 224, 224, CMU_MPP),
        "vit-tiny-random",
    ),
    f"lazyslide/{CMU}.zarr": ("LazySlide", (31, 192), "float32", (563, 2369), 256, 256, CMU_MPP, "vit_tiny_random"),
}


@pytest.fixture(scope="module")
def real():
    return interop_folder()


def write_h5(path, attrs=(), coords_attrs=(), **datasets):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name.replace("__", "/")] = values
        if coords_attrs:
            file["coords"].attrs.update(dict(coords_attrs))
        file.attrs.update(dict(attrs))
    return path


@pytest.mark.parametrize("name", REAL)
def test_real_files_open_with_their_tiles(real, name):
    tool, shape, dtype, first, side, tile_px, mpp, encoder = REAL[name]
    if tool == "LazySlide":
        pytest.importorskip("pyarrow", reason="needs pathfm[interop]")
    read = read_features(real / name, CMU_MPP)
    assert (read.tool, read.features.shape, read.features.dtype, read.encoder, read.level) == (
        tool,
        shape,
        dtype,
        encoder,
        "tile",
    )
    assert (read.side_level0, read.tile_px) == (pytest.approx(side), tile_px)
    assert read.mpp == (mpp if mpp is None else pytest.approx(mpp))
    assert read.coords.shape == (shape[0], 2) and read.coords.dtype == np.float64
    if first:
        assert tuple(read.coords[0]) == first
        assert np.abs(read.features).max() > 0.1


def test_every_file_opens_or_is_refused_with_the_reason(real):
    pytest.importorskip("pyarrow", reason="needs pathfm[interop]")
    opened, reasons = set(), {}
    places = [path for path in sorted(real.rglob("*")) if path.is_file() or path.suffix == ".zarr"]
    for path in places:
        name = path.relative_to(real).as_posix()
        try:
            read = read_pt_features(path) if path.suffix == ".pt" else read_features(path, CMU_MPP)
        except StoreError as error:
            assert "\n" not in str(error)
            reasons[name] = error.what
        else:
            assert read.coords is not None or read.level == "slide"
            opened.add(name)
    slide = f"{TRIDENT}/slide_features_mean-vit_tiny_random/{CMU}.h5"
    assert opened == {*REAL, slide, *(name for name in map(str, {p.relative_to(real) for p in places}) if name.endswith(".pt"))}
    assert set(reasons.values()) == {"no file of features", "coordinates without features"}
    # What has coordinates only opens as such.
    coordinates = [name for name, reason in reasons.items() if reason.startswith("coordinates")]
    assert len(coordinates) == 10
    assert all(read_coords(real / name, CMU_MPP).side_level0 > 0 for name in coordinates)


def test_vectors_of_slides_are_told_from_features_of_tiles(real, tmp_path):
    read = read_features(real / f"{TRIDENT}/slide_features_mean-vit_tiny_random/{CMU}.h5")
    assert (read.tool, read.level, read.features.shape, read.coords) == ("TRIDENT", "slide", (1, 192), None)
    tiles = read_features(real / f"{TRIDENT}/features_vit_tiny_random/{CMU}.h5")
    np.testing.assert_allclose(read.features[0], tiles.features.mean(0), atol=1e-5)
    for kind in ("slide", "patient"):
        read = read_features(write_h5(tmp_path / "s.h5", {"feat_type": kind, "encoder": "titan"}, feats=np.ones(5, np.float32)))
        assert (read.tool, read.level, read.features.shape, read.encoder) == ("STAMP", kind, (1, 5), "titan")


def test_stamp_needs_the_mpp_of_the_slide(real):
    with pytest.raises(StoreError, match="mpp is unknown"):
        read_features(real / f"stamp/vit_tiny_random-49b04e14/{CMU}.h5")


def test_features_of_clam_have_the_size_of_tiles_only_from_coordinates_that_are_the_same(real, tmp_path):
    for part in ("features/h5_files", "patches"):
        (tmp_path / part).mkdir(parents=True)
        shutil.copy(real / "clam" / part / f"{CMU}.h5", tmp_path / part)
    path = tmp_path / "features/h5_files" / f"{CMU}.h5"
    assert read_features(path).side_level0 == 256
    (tmp_path / "patches" / f"{CMU}.h5").chmod(0o600)
    with h5py.File(tmp_path / "patches" / f"{CMU}.h5", "a") as file:
        file["coords"][0] += 1
    other = read_features(path)
    assert (other.side_level0, other.tile_px, len(other.coords)) == (None, None, 50)
    (tmp_path / "patches" / f"{CMU}.h5").write_text("damaged")
    assert read_features(path).side_level0 is None


def test_atlaspatch_has_features_of_several_encoders(tmp_path):
    facts = {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20, "mpp": 0.25}
    tiles = np.int32([[512, 1024, 256, 256, 1], [0, 0, 256, 256, 1]])
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = write_h5(tmp_path / "a.h5", facts, coords=tiles, features__uni=values, features__conch=values[:, :2])
    read = read_features(path, encoder="uni")
    assert (read.tool, read.encoder, read.side_level0, read.mpp, read.coords.tolist()) == (
        *("AtlasPatch", "uni", 512, 0.5),
        [[512, 1024], [0, 0]],
    )
    np.testing.assert_array_equal(read.features, values)
    for wanted, match in ((None, "several encoders: choose one of conch, uni"), ("x", "no encoder 'x': choose one of conch")):
        with pytest.raises(StoreError, match=match):
            read_features(path, encoder=wanted)
    one = write_h5(tmp_path / "b.h5", facts, coords=tiles, features__uni=values)
    assert read_features(one).encoder == "uni"


def test_bfloat16_is_read_exactly(tmp_path):
    values = np.float32([[1.0, -3.140625], [2.0**100, 2.0**-100]])
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_precision(16)
    kind.set_size(2)
    kind.set_ebias(127)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        space = h5py.h5s.create_simple(values.shape)
        h5py.h5d.create(file.id, b"features", kind, space).write(h5py.h5s.ALL, h5py.h5s.ALL, values)
        file["coords"] = np.zeros((2, 2), np.int64)
        file["coords"].attrs.update({"patch_size": 256, "patch_size_level0": 256, "target_magnification": 20})
    assert (tmp_path / "a.h5").stat().st_size < 10_000
    np.testing.assert_array_equal(read_features(tmp_path / "a.h5").features, values)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_types_are_kept_or_become_float32(tmp_path, dtype):
    path = write_h5(tmp_path / "a.h5", features=np.ones((2, 3), dtype), coords=np.zeros((2, 2), np.int32))
    assert read_features(path).features.dtype == ("float16" if dtype == "float16" else "float32")
    np.testing.assert_array_equal(read_features(path).features, 1)


SIZE = {"patch_size": 256, "patch_size_level0": 256}


@pytest.mark.parametrize(
    ("datasets", "match"),
    [
        ({"features": np.full((2, 3), np.nan), "coords": np.zeros((2, 2))}, "not finite: 2 of 2 rows, the first is 0"),
        ({"features": np.full((2, 3), 1e300), "coords": np.zeros((2, 2))}, "not finite"),
        ({"features": np.ones((2, 3)), "coords": np.zeros((3, 2))}, "2 features for 3 tiles"),
        ({"features": np.ones((0,)), "coords": np.zeros((3, 2))}, "0 features for 3 tiles"),
        ({"features": np.ones((2, 3, 4)), "coords": np.zeros((2, 2))}, r"shape \(2, 3, 4\)"),
        ({"features": np.ones((2, 3), np.int32), "coords": np.zeros((2, 2))}, "no floating-point numbers"),
        ({"features": np.ones((2, 3), "S2"), "coords": np.zeros((2, 2))}, "no floating-point numbers"),
        ({"features": np.ones((2, 3)), "coords": np.ones((2, 2)) * np.nan}, "no numbers"),
        ({"other": np.ones((2, 3))}, "no file of features"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_features_that_cannot_be_used_are_refused_in_one_line(tmp_path, datasets, match):
    with pytest.raises(StoreError, match=match) as caught:
        read_features(write_h5(tmp_path / "a.h5", (), SIZE if "coords" in datasets else (), **datasets))
    assert "\n" not in str(caught.value)


def test_features_that_were_never_written_are_not_zeros(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        features = file.create_dataset("features", (4, 3), "f4", chunks=(1, 3), maxshape=(None, 3))
        features[:3] = 1
        file["coords"] = np.zeros((4, 2), np.int64)
    with pytest.raises(StoreError, match="not written to the end"):
        read_features(tmp_path / "a.h5")


@pytest.mark.parametrize("name", [name for name in REAL if name.endswith((".h5", ".npz"))])
def test_cut_off_files_are_refused(real, tmp_path, name):
    whole = (real / name).read_bytes()
    folder = tmp_path / (real / name).parent.name
    folder.mkdir()
    if name.endswith(".npz"):
        shutil.copy((real / name).with_suffix(".meta.json"), folder)
    for share in (0.0, 0.02, 0.5, 0.97):
        (folder / (real / name).name).write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(StoreError) as caught:
            read_features(folder / (real / name).name, CMU_MPP)
        assert "\n" not in str(caught.value)


def _slide2vec(real, tmp_path, kind="npz"):
    shutil.copytree(real / "slide2vec" / kind, tmp_path / "run")
    for path in (tmp_path / "run").rglob("*"):
        path.chmod(0o700)
    return tmp_path / "run/tile_embeddings" / f"{CMU}.{kind}"


def test_slide2vec_joins_by_the_number_of_the_tile(real, tmp_path):
    path = _slide2vec(real, tmp_path)
    before = read_features(path)
    with np.load(path) as arrays:
        values = dict(arrays)
    order = np.random.default_rng(0).permutation(73)
    np.savez(path, features=values["features"][order], tile_index=values["tile_index"][order])
    read = read_features(path)
    np.testing.assert_array_equal(read.features, before.features[order])
    np.testing.assert_array_equal(read.coords, before.coords[order])
    np.savez(path, features=values["features"], tile_index=values["tile_index"] + 1)
    with pytest.raises(StoreError, match="tiles that the coordinates do not have"):
        read_features(path)


def test_slide2vec_without_its_last_file_is_not_finished(real, tmp_path):
    path = _slide2vec(real, tmp_path)
    meta = path.with_suffix(".meta.json")
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps({**content, "num_tiles": 74}))
    with pytest.raises(StoreError, match=r"\(73, 192\), where .* says \(74, 192\)"):
        read_features(path)
    meta.unlink()
    with pytest.raises(StoreError, match="not finished"):
        read_features(path)
    meta.write_text(json.dumps(content))
    shutil.rmtree(path.parents[1] / "tiles")
    assert read_features(path).coords is None


def test_lazyslide_joins_by_the_number_of_the_tile(real, tmp_path):
    pytest.importorskip("pyarrow", reason="needs pathfm[interop]")
    store = tmp_path / f"{CMU}.zarr"
    shutil.copytree(real / "lazyslide" / store.name, store)
    for path in store.rglob("*"):
        path.chmod(0o700)
    before = read_features(store)
    table = zarr.open_group(store / "tables/vit_tiny_random_tiles", mode="a", use_consolidated=False)
    order = np.random.default_rng(0).permutation(31)
    table["X"][:] = table["X"][:][order]
    table["obs/tile_id"][:] = table["obs/tile_id"][:][order]
    read = read_features(store)
    np.testing.assert_array_equal(read.features, before.features[order])
    np.testing.assert_array_equal(read.coords, before.coords[order])
    shutil.copytree(store / "tables/vit_tiny_random_tiles", store / "tables/uni_tiles")
    assert read_features(store, encoder="uni").encoder == "uni"
    with pytest.raises(StoreError, match="features of 2 encoders, wanted: one of uni, vit_tiny_random"):
        read_features(store)
    table["obs/tile_id"][:] = table["obs/tile_id"][:] + 1
    with pytest.raises(StoreError, match="does not have"):
        read_features(store, encoder="vit_tiny_random")


def test_a_lazyslide_store_gives_away_nobody(real):
    pytest.importorskip("pyarrow", reason="needs pathfm[interop]")
    words = repr(read_features(real / f"lazyslide/{CMU}.zarr"))
    assert "b414003d" not in words and "12/29/09" not in words


def test_lazyslide_without_pyarrow_names_the_extra(real, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pathfm\[interop\]"):
        read_features(real / f"lazyslide/{CMU}.zarr")


def test_our_own_files_are_read_too(tmp_path):
    attrs = {"fingerprint": "f", "encoder": "uni2-h", "tile_side_level0": 448.5, "tile_px": 224, "mpp": 0.5}
    features = np.arange(6, dtype=np.float16).reshape(2, 3)
    write_features(tmp_path / "a.h5", features, np.int64([[0, 0], [448, 0]]), attrs)
    read = read_features(tmp_path / "a.h5")
    assert (read.tool, read.side_level0, read.tile_px, read.mpp, read.encoder) == ("pathfm", 448.5, 224, 0.5, "uni2-h")
    np.testing.assert_array_equal(read.features, features)
    write_features(tmp_path / "a.h5", features, np.int64([[0, 0], [448, 0]]), {**attrs, "coords_synthetic": True})
    assert read_features(tmp_path / "a.h5").coords is None


def test_no_foreign_file_passes_for_ours(real):
    for name in REAL:
        if name.endswith(".h5"):
            assert read_feature_attrs(real / name) is None
            with pytest.raises(StoreError, match="not a pathfm feature file"):
                open_features(real / name)


def test_absent_files_and_folders_of_others_are_refused(tmp_path):
    (tmp_path / "x.zarr").mkdir()
    for place in (tmp_path / "absent.h5", tmp_path, tmp_path / "x.zarr"):
        with pytest.raises(StoreError):
            read_features(place)
    for name in ("a.h5", "a.npz"):
        for content in (b"", b"hello", b"PK\x03\x04 nothing", b"\x89HDF\r\n\x1a\n"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(StoreError):
                read_features(tmp_path / name)


def test_values_are_placed_by_what_lies_beside_them(real, tmp_path):
    values = np.arange(58 * 3, dtype=np.float32).reshape(58, 3)
    folder = tmp_path / "run"
    shutil.copytree(real / TRIDENT / "patches", folder / "patches")
    read = place_features(folder / "features_x" / f"{CMU}.pt", values)
    assert (read.tool, read.side_level0, tuple(read.coords[0])) == ("TRIDENT", 256, (768, 0))
    assert (place_features(tmp_path / "x.pt", values).tool, place_features(tmp_path / "x.pt", values).coords) == (
        "unknown",
        None,
    )
    with pytest.raises(StoreError, match="57 features for 58 tiles"):
        place_features(folder / "features_x" / f"{CMU}.pt", values[1:])
