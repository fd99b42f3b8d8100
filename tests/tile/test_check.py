"""The table before the run: it must say what tiling would do, and why it would not."""

import pickle
import re

import numpy as np
import pytest
import tifffile
from PIL import Image

from pathfm.errors import ExitCode
from pathfm.geometry import Mpp, Size, effective_mpp
from pathfm.slides.synthetic import SyntheticSpec, write_slide
from pathfm.store.cohort import SlideRow
from pathfm.study import CohortSettings, ComputeSettings, Study, TileSettings, TissueSettings
from pathfm.tile.check import CHEAP_PX, CheckRow, EncoderNeeds, check_table, examine
from pathfm.tiling import check

ALL = TissueSettings(method="off")


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("check") / "slide.svs"
    write_slide(path, SyntheticSpec(size_px=Size(1024, 768), seed=1, mpp=0.25))
    return path


def flat(path, side, per_cm=40_000, rgb=(200, 120, 180), **options):
    picture = np.full((side, side, 3), rgb, np.uint8)
    resolution = {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"} if per_cm else {}
    tifffile.imwrite(
        path, picture, photometric="rgb", tile=(256, 256), compression="zlib", metadata=None, **resolution, **options
    )
    return path


def test_effective_mpp_is_that_after_the_resize():
    assert effective_mpp(0.5, 256, 224) == pytest.approx(0.5714, abs=1e-4)
    assert effective_mpp(None, 256, 224) is None


def test_a_slide_is_planned_as_tiling_would(slide):
    row = examine(SlideRow("a", slide), TileSettings(mpp=0.5, tile_px=128, tissue=ALL), EncoderNeeds("vit", 112))
    (scale,) = row.scales
    assert not row.problem
    assert (row.size, row.mpp) == (Size(1024, 768), pytest.approx(Mpp(0.25, 0.25)))
    assert row.mpp_source
    assert (scale.mpp, scale.grid, scale.tissue) == (0.5, 4 * 3, 4 * 3)
    assert scale.effective_mpp == pytest.approx(0.5 * 128 / 112)
    assert row.bytes == pytest.approx(12 * 128**2 * 0.21, rel=0.01)
    assert row.cpu_s > 0


def test_tissue_is_looked_for_where_that_is_cheap(slide, monkeypatch):
    settings = TileSettings(mpp=0.5, tile_px=32)
    scale = examine(SlideRow("a", slide), settings).scales[0]
    assert 0 < scale.tissue <= scale.grid
    monkeypatch.setattr("pathfm.tile.check.CHEAP_PX", 1000)
    row = examine(SlideRow("a", slide), settings)
    assert row.scales[0].tissue is None
    assert row.scales[0].tiles == scale.grid
    text = check_table([row])
    assert f"<= {scale.grid}" in text
    assert "whole grid" in text
    assert CHEAP_PX > 2048**2


def test_several_resolutions_are_several_lines(slide):
    row = examine(SlideRow("a", slide), TileSettings(mpp=(0.5, 1.0), tile_px=128, tissue=ALL))
    assert [scale.mpp for scale in row.scales] == [0.5, 1.0]
    lines = check_table([row]).splitlines()
    assert lines[1].startswith("a ")
    assert lines[2].startswith("  ")
    assert "14 tiles" in lines[-2]


@pytest.mark.parametrize(("codec", "size"), [("none", 0), ("zstd", 12 * 128**2 * 2.1), ("auto", 12 * 128**2 * 0.21)])
def test_bytes_depend_on_the_codec(slide, codec, size):
    row = examine(SlideRow("a", slide), TileSettings(tile_px=128, tissue=ALL, codec=codec))
    assert row.bytes == pytest.approx(size, rel=0.01)


def test_the_cohort_tables_mpp_goes_first_and_a_contradiction_is_noted(slide):
    row = examine(SlideRow("a", slide, mpp=0.5), TileSettings(tile_px=128, tissue=ALL))
    assert (row.mpp, row.mpp_source) == (Mpp(0.5, 0.5), "cohort table")
    assert "the cohort table says 0.5 mpp, the file 0.25" in row.notes
    assert "note: the cohort table says" in check_table([row])


def test_an_assumed_mpp_is_said_to_be_assumed(tmp_path):
    path = flat(tmp_path / "plain.tif", 300, per_cm=None)
    row = examine(SlideRow("a", path), TileSettings(tile_px=64, assume_mpp=0.5, tissue=ALL))
    assert (row.mpp_source, row.scales[0].grid) == ("assumed", 16)


def test_slides_that_cannot_be_tiled_give_their_reason(tmp_path):
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    default = flat(tmp_path / "default.tif", 300, per_cm=72 / 2.54)
    coarse = flat(tmp_path / "coarse.tif", 300, per_cm=10_000)
    rows = [
        examine(SlideRow(path.stem, path), TileSettings(tile_px=64, tissue=ALL))
        for path in (tmp_path / "broken.svs", default, coarse, tmp_path / "absent.svs")
    ]
    assert all(row.problem and not row.scales for row in rows)
    assert "no mpp in the file (" in rows[1].problem
    assert "352.8" in rows[1].problem
    assert "made up" in rows[2].problem
    assert rows[2].size == Size(300, 300)
    text = check_table(rows)
    assert text.count("    cannot be tiled: ") == 4
    assert "4 slides, 4 cannot be tiled: 0 tiles" in text
    assert str(tmp_path) not in text


def test_a_slide_smaller_than_one_tile(tmp_path):
    row = examine(SlideRow("a", flat(tmp_path / "small.tif", 100)), TileSettings(tissue=ALL))
    assert row.scales[0].grid == 0
    assert "smaller than one tile" in row.notes


def test_without_any_mpp_native_tiles_are_planned(tmp_path):
    row = examine(
        SlideRow("a", flat(tmp_path / "plain.tif", 300, per_cm=None)), TileSettings(mpp="native", tile_px=100, tissue=ALL)
    )
    assert (row.mpp, row.scales[0].mpp, row.scales[0].grid) == (None, None, 9)
    assert re.search(r"unknown +unknown", check_table([row]))


def test_a_folder_of_tiles(tmp_path):
    for number in range(3):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number}.png")
    row = examine(SlideRow("a", tmp_path), TileSettings(tile_px=64, assume_mpp=0.5), EncoderNeeds("vit", 32))
    assert (row.kind, row.scales[0].tiles, row.scales[0].effective_mpp) == ("folder of tiles", 3, 1.0)
    assert "encoder sees" in check_table([row])


def test_a_folder_of_tiles_that_would_be_refused(tmp_path):
    (tmp_path / "0.png").write_bytes(b"no picture")
    Image.new("RGB", (48, 64)).save(tmp_path / "1.png")
    row = SlideRow("a", tmp_path)
    assert examine(row, TileSettings(tile_px=64)).problem == "tiles are 48 x 64 px, not 64 (set tile.tile_px=48)"
    assert "taken as they are" in examine(row, TileSettings(tile_px=48, keep_px=64)).problem
    Image.new("RGB", (64, 64)).save(tmp_path / "2.png")
    assert not examine(row, TileSettings(tile_px=64)).problem


def test_the_whole_check_keeps_the_order_and_names_problems(slide, tmp_path, capsys):
    table = tmp_path / "cohort.csv"
    (tmp_path / "z.svs").write_bytes(b"no slide")
    table.write_text(f"slide_id,path\nz,{tmp_path / 'z.svs'}\nb,{slide}\na,{slide}\n")
    tissue = TissueSettings(plugin="absent_module:find")
    for settings, problems in ((ALL, 1), (tissue, 3)):
        study = Study(
            out=tmp_path / "out",
            cohort=CohortSettings(table=table),
            tile=TileSettings(tile_px=128, tissue=settings),
            compute=ComputeSettings(workers=2),
        )
        assert check(study) == ExitCode.SOME_FAILED
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines if re.match(r"[abz] ", line + " ")] == ["z", "b", "a"]
        assert sum(line.startswith("    cannot be tiled: ") for line in lines) == problems


def test_the_table_is_aligned_and_the_rows_travel_between_processes(slide):
    settings = TileSettings(tile_px=128, tissue=ALL)
    rows = [examine(SlideRow(name, slide), settings) for name in ("a", "a much longer name", "ü")]
    assert pickle.loads(pickle.dumps(rows)) == rows
    lines = check_table(rows, workers=2).splitlines()
    place = lines[0].index("tiles")
    assert all(line[place:].startswith("12 ") for line in lines[1:4])
    assert "with 2 workers" in lines[-2]
    assert check_table([CheckRow("x", problem="gone")])
    assert check_table([])


def test_real_slides(shared_data):
    settings = TileSettings(mpp=0.5, tile_px=224)
    rows = {path.name: examine(SlideRow(path.stem, path), settings) for path in sorted((shared_data / "slides").glob("*.svs"))}
    print(check_table(list(rows.values())))
    assert rows["TCGA-CR-7395-01A-01-TS1.svs"].problem.startswith("no mpp in the file")
    assert [name for name, row in rows.items() if row.problem] == ["TCGA-CR-7395-01A-01-TS1.svs"]
    assert rows["CMU-1-Small-Region.svs"].scales[0].mpp == pytest.approx(0.499)
