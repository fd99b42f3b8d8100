import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from pathfm.config import dump_study, load_study
from pathfm.errors import StoreError, UnreadableSlideError, UsageError
from pathfm.inspection import inspect_path
from pathfm.store.feature_file import write_features
from pathfm.store.record import Outcome, StageReport, write_record
from pathfm.store.tile_store import write_tiles
from pathfm.study import Study


def picture(path: Path) -> Path:
    cv2.imwrite(str(path), np.full((40, 60, 3), 200, dtype=np.uint8))
    return path


def test_study(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("name: x\ntile: {mpp: 1.0}\n", encoding="utf-8")
    text = inspect_path(file)
    assert text == dump_study(load_study(file)).rstrip("\n") and "mpp: 1.0" in text


def test_tile_store(tmp_path: Path) -> None:
    write_tiles(tmp_path / "a.zarr", np.zeros((5, 16, 16, 3), dtype=np.uint8), slide_id="a", mpp=None)
    text = inspect_path(tmp_path / "a.zarr")
    for words in ("tile store a.zarr", "5 of 16 px", "unknown", "synthetic", "jpeg, quality 90", "fingerprint"):
        assert words in text


def write(path: Path, features: np.ndarray, **attrs: str) -> None:
    write_features(path, features, np.zeros((len(features), 2), dtype=np.int64), {"fingerprint": "abc", **attrs})


def test_feature_file(tmp_path: Path) -> None:
    features = np.tile(np.array([[3.0, 4.0]], dtype=np.float16), (7, 1))
    write(tmp_path / "a.h5", features, encoder="timm:x")
    text = inspect_path(tmp_path / "a.h5")
    for words in ("7 tiles x 2, float16", "0 (NaN", "5 %: 5, 50 %: 5, 95 %: 5", "timm:x", "abc", "6 rows equal an earlier one"):
        assert words in text
    assert "2 of 2 dimensions" in text and "all its tiles have the same features" in text
    write(tmp_path / "b.h5", features[:0])
    assert "0 tiles x 2" in inspect_path(tmp_path / "b.h5")


def test_folder_of_feature_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(6):
        far = 40 if number == 4 else 0
        features = (rng.normal(size=(20, 5)) + far).astype(np.float16)
        write(tmp_path / f"s{number}.h5", features, recipe_encoder="y" if number == 2 else "x", recipe_weights_sha256="e" * 64)
    write(tmp_path / "t.h5", np.ones((3, 7), dtype=np.float16), recipe_encoder="x", recipe_weights_sha256="e" * 64)
    (tmp_path / "u.h5").write_bytes(b"no file")
    text = inspect_path(tmp_path)
    for words in (
        f"features {tmp_path.name}",
        "120 tiles x 5, float16",
        "encoder x, weights_sha256 eeeeeeeeeeee\n",
        "stand out",
        "4 slides",
        "another recipe than most slides: encoder",
        "far from the middle as usual",
        "7 dimensions, most slides have 5",
        "damaged feature file",
    ):
        assert words in text
    for path in tmp_path.glob("[st]*.h5"):
        path.unlink()
    with pytest.raises(StoreError, match="no feature file can be read"):
        inspect_path(tmp_path)


def encoder(folder: Path, card: bool = True) -> Path:
    folder.mkdir(parents=True)
    config = {"architecture": "vit_tiny", "num_features": 192, "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"1234")
    if card:
        (folder / "card.json").write_text(json.dumps({"fingerprint": "f00d", "step": 10}), encoding="utf-8")
    return folder


def test_encoder_folder(tmp_path: Path) -> None:
    text = inspect_path(encoder(tmp_path / "teacher"))
    for words in ("encoder teacher", "vit_tiny", "f00d", "192", "4 bytes"):
        assert words in text
    assert "not made by pathfm" in inspect_path(encoder(tmp_path / "foreign", card=False))


def test_output_folder(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("name: x\n", encoding="utf-8")
    assert "no stage has finished" in inspect_path(tmp_path)
    report = StageReport("tile", (Outcome("a", "done"), Outcome("b", "kept"), Outcome("c", "failed", "bad")))
    for folder in ("tiles/224px", "features/224px/timm-x", "mil", "report"):
        (tmp_path / folder).mkdir(parents=True)
        write_record(tmp_path / folder, report, Study())
    (tmp_path / "mil" / "metrics.json").write_text('{"fingerprint": "beef"}', encoding="utf-8")
    encoder(tmp_path / "encoder" / "vit" / "teacher")
    text = inspect_path(tmp_path)
    assert "2 done, 1 failed" in text and "beef" in text and "f00d" in text
    places = [text.index(name) for name in ("tiles/224px", "encoder/vit/teacher", "features/224px/timm-x", "\nmil", "\nreport")]
    assert places == sorted(places)


def test_slide(tmp_path: Path) -> None:
    text = inspect_path(picture(tmp_path / "slide.png"))
    for words in ("slide slide.png", "60 x 40 px", "unknown", "tile.assume_mpp"):
        assert words in text


def test_folder_of_tiles(tmp_path: Path) -> None:
    for name in ("t2.png", "t10.png"):
        picture(tmp_path / name)
    text = inspect_path(tmp_path)
    assert "tiles  2" in text and "t2.png" in text


def test_real_slide(shared_data: Path) -> None:
    text = inspect_path(shared_data / "slides" / "CMU-1-Small-Region.svs")
    for words in ("openslide", "2220 x 2967", "0.499", "aperio"):
        assert words in text


@pytest.mark.parametrize("name", ["notes.txt", "empty"])
def test_unknown_things_are_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="study file"):
        inspect_path(tmp_path / name)


def test_absent_damaged_and_foreign(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        inspect_path(tmp_path / "absent")
    (tmp_path / "slide.svs").write_bytes(b"not a slide")
    with pytest.raises(UnreadableSlideError, match=r"slide\.svs"):
        inspect_path(tmp_path / "slide.svs")
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "zarr.json").write_text("{}", encoding="utf-8")
    with pytest.raises(StoreError, match="not a pathfm tile store"):
        inspect_path(tmp_path / "a.zarr")
