"""Exported features: key by key like the files of CLAM, TRIDENT and STAMP, repeatable, never over somebody else's files."""

from __future__ import annotations

import math
import shutil

import h5py
import numpy as np
import pytest
import torch

from pathfm.errors import ExitCode, UsageError
from pathfm.feature_export import FORMATS, export_features
from pathfm.models.pt_files import read_pt_features
from pathfm.store.commit import content_digest
from pathfm.store.feature_file import FeatureWriter
from pathfm.store.interop.features import read_features
from tests.interop_files import CMU, interop_folder

ROWS, DIM = 58, 192
ATTRS = {
    "fingerprint": "f",
    "encoder": "timm:vit_tiny",
    "recipe_hash": "49b04e14aabbccdd",
    "tile_px": 256,
    "tile_side_level0": 256.0,
    "tile_height_level0": 256.0,
    "slide_width_level0": 2220,
    "slide_height_level0": 2967,
    "mpp": 0.499,
    "coords_synthetic": False,
}
FILES = {
    "clam": ["h5_files/{}.h5", "pt_files/{}.pt"],
    "trident": ["features_timm-vit_tiny/{}.h5"],
    "stamp": ["timm-vit_tiny-49b04e14/{}.h5"],
}
THEIRS = {
    "clam": f"clam/features/h5_files/{CMU}.h5",
    "trident": f"trident/20x_256px_0px_overlap/features_vit_tiny_random/{CMU}.h5",
    "stamp": f"stamp/vit_tiny_random-49b04e14/{CMU}.h5",
}


@pytest.fixture
def make(tmp_path):
    """Writes a feature file of a grid of tiles, and returns its features."""

    def write(name="a", rows=ROWS, dtype="float32", folder="features", valid=None, **facts):
        features = np.random.default_rng(len(name)).normal(size=(rows, DIM)).astype(np.float32)
        coords = np.stack([np.arange(rows) % 8, np.arange(rows) // 8], axis=1) * 256
        path, attrs = tmp_path / folder / f"{name}.h5", {**ATTRS, "slide_id": name, **facts}
        with FeatureWriter(path, rows, DIM, dtype, coords, attrs) as writer:
            writer.write(0, features, valid)
        return features.astype(dtype)

    return write


def layout(path):
    """Names, types, chunks and attributes' types of everything in a file."""
    found = {}

    def look(name, item):
        attrs = {key: (item.attrs.get_id(key).dtype, item.attrs.get_id(key).shape) for key in item.attrs}
        data = (
            (item.dtype, item.ndim, item.chunks and item.chunks[1:], item.maxshape[0] is None, item.compression) if name else ()
        )
        found[name] = (*data, attrs)

    with h5py.File(path) as file:
        look("", type("Root", (), {"attrs": file.attrs}))
        file.visititems(look)
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_files_have_the_keys_types_and_attributes_of_theirs(tmp_path, make, format):
    theirs = interop_folder() / THEIRS[format]
    make(dtype="float16" if format == "stamp" else "float32")
    assert export_features(tmp_path / "features", tmp_path / "out", format) == ExitCode.DONE
    assert layout(tmp_path / "out" / FILES[format][0].format("a")) == layout(theirs)
    if format == "clam":
        with h5py.File(theirs) as one, h5py.File(tmp_path / "out/h5_files/a.h5") as other:
            assert one["features"].chunks == other["features"].chunks


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_reads_back(tmp_path, make, format):
    valid = np.arange(ROWS) % 5 != 3
    features = make(dtype="float16", valid=valid)[valid]
    coords = np.stack([np.arange(ROWS) % 8, np.arange(ROWS) // 8], axis=1)[valid] * 256.0
    assert export_features(tmp_path / "features/a.h5", tmp_path / "out", format) == ExitCode.DONE
    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert written == [name.format("a") for name in FILES[format]]
    for name in written:
        path = tmp_path / "out" / name
        read = read_pt_features(path) if name.endswith(".pt") else read_features(path, 0.499)
        assert read.tool.lower() == format
        np.testing.assert_array_equal(read.features, features)
        np.testing.assert_array_equal(read.coords, coords)


def test_clam_reads_a_tensor(tmp_path, make):
    features = make(dtype="float16")
    export_features(tmp_path / "features", tmp_path / "out", "clam")
    bag = torch.load(tmp_path / "out/pt_files/a.pt", weights_only=True)
    assert bag.dtype == torch.float32
    np.testing.assert_array_equal(bag.numpy(), features)


def test_trident_gets_the_squares_and_names_for_the_magnifications(tmp_path, make):
    make("b c", mpp=0.5, tile_px=224, tile_side_level0=448.989, tile_height_level0=448.989)
    export_features(tmp_path / "features", tmp_path / "out", "trident")
    with h5py.File(tmp_path / "out/features_timm-vit_tiny/b c.h5") as file:
        said, about = dict(file["coords"].attrs), dict(file["features"].attrs)
    assert about == {"encoder": "timm-vit_tiny", "name": "b c", "savetodir": ""}
    assert (said["patch_size"], said["patch_size_level0"], said["level0_magnification"]) == (224, 449, 40)
    assert (said["level0_width"], said["level0_height"], said["name"]) == (2220, 2967, "b c")
    # What TRIDENT reads for a tile: the ratio of the two magnifications.
    assert said["patch_size"] * said["level0_magnification"] / said["target_magnification"] == pytest.approx(448.989)


def test_stamp_finds_the_resolution_and_the_places(tmp_path, make):
    make(mpp=0.5, tile_px=224, tile_side_level0=448.989, tile_height_level0=448.989)
    export_features(tmp_path / "features", tmp_path / "out", "stamp")
    with h5py.File(tmp_path / "out/timm-vit_tiny-49b04e14/a.h5") as file:
        attrs, coords_um = dict(file.attrs), file["coords"][:]
    assert attrs["tile_size_um"] / attrs["tile_size_px"] == pytest.approx(0.5)
    assert (attrs["unit"], attrs["feat_type"], attrs["code_hash"]) == ("um", "tile", "49b04e14")
    np.testing.assert_allclose(coords_um[9], 256 * 0.5 * 224 / 448.989, rtol=1e-6)
    # STAMP refuses what a newer version than its own has written.
    assert tuple(map(int, attrs["stamp_version"].split("."))) <= (2, 5, 0)


@pytest.mark.parametrize("format", FORMATS)
def test_again_and_elsewhere_the_same_bytes_and_nothing_is_touched(tmp_path, make, format):
    make("a")
    make("Ünï 😀", rows=5)
    for out in ("one", "two", "one"):
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / out).rglob("*.*")}
        assert export_features(tmp_path / "features", tmp_path / out, format) == ExitCode.DONE
        assert not before or before == {path: path.stat().st_mtime_ns for path in (tmp_path / out).rglob("*.*")}
    assert content_digest(tmp_path / "one") == content_digest(tmp_path / "two")
    for file in (path for path in (tmp_path / "one").rglob("*") if path.is_file()):
        assert not file.name.startswith(".")
        assert str(tmp_path).encode() not in file.read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_what_others_have_put_there_stays(tmp_path, make, format, capsys):
    make("a")
    make("b")
    theirs = tmp_path / "out" / FILES[format][0].format("a")
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    assert export_features(tmp_path / "features", tmp_path / "out", format) == ExitCode.SOME_FAILED
    assert theirs.read_text() == "precious"
    assert (tmp_path / "out" / FILES[format][-1].format("b")).is_file()
    assert "something else is here already" in "".join(capsys.readouterr())


@pytest.mark.parametrize("format", FORMATS)
def test_one_bad_file_does_not_stop_the_others(tmp_path, make, format, capsys):
    make("a")
    make("b")
    make("c", coords_synthetic=True)
    path = tmp_path / "features/a.h5"
    path.write_bytes(path.read_bytes()[:-100])
    shutil.copy(interop_folder() / THEIRS["trident"], tmp_path / "features/d.h5")
    assert export_features(tmp_path / "features", tmp_path / "out", format) == ExitCode.SOME_FAILED
    assert {file.stem for file in (tmp_path / "out").rglob("*.*")} == {"b"}
    told = "".join(capsys.readouterr())
    for words in ("damaged", "no coordinates on a slide", "not a pathfm feature file", "1 done, 3 failed"):
        assert words in told


@pytest.mark.parametrize(
    ("format", "facts", "match"),
    [
        ("trident", {"slide_width_level0": math.nan}, "sizes of tiles and slide"),
        ("trident", {"mpp": math.nan}, "neither mpp nor objective"),
        ("stamp", {"mpp": math.nan}, "mpp is unknown"),
        ("trident", {"tile_height_level0": 300.0}, "not square"),
        ("stamp", {"tile_height_level0": 300.0}, "not square"),
        ("clam", {"slide_id": "../x"}, "slash"),
    ],
)
def test_what_a_tool_needs_and_the_features_do_not_have_is_named(tmp_path, make, format, facts, match, capsys):
    make(**facts)
    assert export_features(tmp_path / "features", tmp_path / "out", format) == ExitCode.SOME_FAILED
    assert match in "".join(capsys.readouterr())
    assert not list((tmp_path / "out").rglob("*.*"))


def test_features_too_large_for_stamp_are_refused(tmp_path, capsys):
    with FeatureWriter(tmp_path / "a.h5", 1, 2, "float32", np.zeros((1, 2), np.int64), {**ATTRS, "slide_id": "a"}) as writer:
        writer.write(0, np.full((1, 2), 1e6))
    assert export_features(tmp_path / "a.h5", tmp_path / "out", "stamp") == ExitCode.SOME_FAILED
    assert "too large" in "".join(capsys.readouterr())


@pytest.mark.parametrize("format", FORMATS)
def test_a_slide_without_tiles(tmp_path, make, format):
    make(rows=0)
    assert export_features(tmp_path / "features", tmp_path / "out", format) == ExitCode.DONE
    assert read_features(tmp_path / "out" / FILES[format][0].format("a"), 0.499).features.shape == (0, DIM)


def test_of_a_study_the_features_of_its_encoder_are_taken_and_missing_slides_named(tmp_path, make, monkeypatch, capsys):
    for slide_id in ("s1", "s2"):
        (tmp_path / "slides" / slide_id).mkdir(parents=True)
        (tmp_path / "slides" / slide_id / "x.png").touch()
    study = f"name: x\nout: {tmp_path / 'out'}\ncohort: {{slides: [{tmp_path / 'slides'}], folder_of_tiles: true}}\n"
    (tmp_path / "study.yaml").write_text(study)
    make("s1", folder="made")
    asked = []
    monkeypatch.setattr("pathfm.feature_export.find_features", lambda run, name: asked.append(name) or tmp_path / "made")
    assert export_features(tmp_path / "study.yaml", tmp_path / "clam", "clam", "uni") == ExitCode.SOME_FAILED
    assert asked == ["uni"]
    assert {file.stem for file in (tmp_path / "clam").rglob("*.*")} == {"s1"}
    assert "no features (run `pathfm extract`)" in "".join(capsys.readouterr())


def test_an_unknown_format_lists_the_known(tmp_path, make):
    make()
    with pytest.raises(UsageError, match="clam, trident, stamp"):
        export_features(tmp_path / "features", tmp_path / "out", "bmp")
    with pytest.raises(UsageError):
        export_features(tmp_path / "absent", tmp_path / "out", "clam")
