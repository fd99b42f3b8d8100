"""Every real slide ends as it must: tiled, empty or failed, and why."""

from __future__ import annotations

import json
import re

import pytest

from tests.flows.conftest import run

NO_MPP = "(set `mpp` for it in the cohort table or pass `--set tile.assume_mpp=MPP`)"
SMALL = "px is smaller than one tile"
MADE_UP = "tiles of 0.5 mpp would have to be made up: the slide has 16.78"
NEW_COPY = "(get a new copy of the file, or leave the slide out)"
SLIDES = {
    "CMU-1-Small-Region": ("done", 49),
    "TCGA-5P-A9K0_1": ("done", 4),
    "TCGA-5P-A9K0_2": ("done", 1),
    "TCGA-5P-A9K0_3": ("empty", f"slide of 497 x 185 {SMALL} (576 x 576 level-0 px at 0.5 mpp)"),
    "TCGA-CR-7395-01A-01-TS1": ("failed", f"no mpp in the file {NO_MPP}"),
    "her2st_B4": ("done", 121),
    "her2st_C2": ("done", 307),
    "her2st_C3": ("done", 77),
    "her2st_C4": ("done", 310),
}
"""Status, and the number of tiles or the reason (how it starts). Numbers of tiles may shift a little with the tissue rule."""
FORMATS = {
    "boxes": ("failed", "no mpp in the file (openslide.mpp-x says 352.8, which is no microscope's but a default of 72 dpi)"),
    "cells.ome": ("empty", f"slide of 93 x 131 {SMALL}"),
    "dicom__boxes": ("empty", f"slide of 16 x 16 {SMALL}"),
    "dicom__camelyon": ("failed", "no mpp in the file (openslide.mpp-x says 28.97, which is no microscope's)"),
    "dicom__sm_image": ("empty", f"slide of 50 x 50 {SMALL}"),
    "dicom__w2d-jpeg": ("failed", MADE_UP),
    "dicom__w2d-jpeg2000": ("failed", MADE_UP),
    "dicom__w2d-raw": ("failed", MADE_UP),
    "her2st_B4_crop_jp2k": ("done", 44),
    "kidney-48-5-ihc": ("failed", f"no mpp in the file {NO_MPP}"),
    "multi-channel-z-series.ome": ("failed", "not one RGB or grey picture but a stack of channels, planes or times"),
    "orient3_gray_jpeg_3level": ("failed", "no mpp in the file (tiff.XResolution says 352.9, which is no microscope's"),
    "orient6_gray_jpeg_3level": ("failed", "no mpp in the file (tiff.XResolution says 352.9, which is no microscope's"),
    "rgba_lzw_2level": ("failed", f"no mpp in the file {NO_MPP}"),
    "test3-DAPI-2-387": ("failed", "the background is dark: fluorescence, or an inverted picture"),
    "yb10kx5k.zstd": ("failed", "no mpp in the file (openslide.mpp-x says 352.9, which is no microscope's"),
}
DICOM = {"boxes", "camelyon", "sm_image", "w2d-jpeg", "w2d-jpeg2000", "w2d-raw"}
TOO_SMALL = {"dicom__boxes", "dicom__sm_image"}
MALFORMED = {
    "broken": f"not a slide or image of a known kind {NEW_COPY}",
    "sm_image_grayscale": f"cannot be opened: Attribute BitsAllocated value 16 != 8 {NEW_COPY}",
    "sm_image_jpegls": f"cannot be opened: Unsupported transfer syntax 1.2.840.10008.1.2.4.80 {NEW_COPY}",
    "small_dicom": f"cannot be opened: Couldn't get image flavor {NEW_COPY}",
    "unopenable": f"cannot be opened: Unsupported TIFF compression: 52479 {NEW_COPY}",
    "unreadable": f"the region of level 0 cannot be decoded: a damaged JPEG header {NEW_COPY}",
    "zero_gi": "the image has no pixels (convert it to an 8-bit RGB TIFF, tiled and pyramidal)",
}


def tiled(folder, out, *options):
    """Exit code, outcomes by slide, and all that was said."""
    code, said, err = run("tile", folder, "--out", out, *options)
    (record,) = (out / "tiles").glob("*/record.json")
    rows = {row["slide_id"]: row for row in json.loads(record.read_text())["outcomes"]}
    assert "Traceback" not in said + err
    assert "internal error" not in said + err
    return code, rows, said + err


@pytest.mark.long
@pytest.mark.parametrize(("folder", "table"), [("slides", SLIDES), ("formats", FORMATS)])
def test_every_slide_is_tiled_or_gives_its_one_reason(shared_data, tmp_path, folder, table):
    code, rows, _ = tiled(shared_data / folder, tmp_path / "out")
    assert code == 3
    assert rows.keys() == table.keys()
    for slide_id, (status, what) in table.items():
        row = rows[slide_id]
        assert row["status"] == status, row
        if status == "done":
            assert row["counts"]["kept"] == pytest.approx(what, rel=0.15, abs=1), row
        else:
            assert row["reason"].startswith(what), row


@pytest.mark.long
def test_every_format_is_readable(shared_data, tmp_path):
    """With settings that ask nothing of a slide but its pixels."""
    options = ["--mpp", "native", "--set=tile.tissue.method=off", "--set=tile.tissue.background=dark"]
    options += ["--set=tile.filters.max_white=1", "--set=tile.filters.max_damage=1", "--tile-px"]
    code, rows, _ = tiled(shared_data / "formats" / "dicom", tmp_path / "dicom", *options, "16")
    assert (code, rows.keys(), {row["status"] for row in rows.values()}) == (0, DICOM, {"done"})
    code, more, _ = tiled(shared_data / "formats", tmp_path / "all", *options, "64")
    assert code == 3
    assert {slide_id for slide_id, row in more.items() if row["status"] == "failed"} == {"multi-channel-z-series.ome"}
    assert {slide_id for slide_id, row in more.items() if row["status"] == "empty"} == TOO_SMALL
    assert not any(row["counts"].get("unreadable") for row in [*rows.values(), *more.values()])


def test_malformed_files_give_a_named_error_each(shared_data, tmp_path):
    code, rows, said = tiled(shared_data / "malformed", tmp_path / "out")
    assert code == 3
    assert {slide_id: re.sub(r" at x=\d+ y=\d+", "", row["reason"]) for slide_id, row in rows.items()} == MALFORMED
    assert {row["status"] for row in rows.values()} == {"failed"}
    assert "tile: 7 failed" in said
    assert all(said.count(f"failed  {slide_id}  ") == 1 for slide_id in MALFORMED)
