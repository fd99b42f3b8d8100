"""The same pixels are the same tiles, byte for byte, from every source that features can be extracted from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathfm.extract.stage import run_extract
from pathfm.geometry import Mpp, Size
from pathfm.slides.reader import open_slide
from pathfm.slides.synthetic import SyntheticSpec, draw_slide
from pathfm.slides.synthetic_tiff import TiffOptions, write_pyramid
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.store.feature_file import open_features
from pathfm.store.layout import Layout
from pathfm.store.tile_store import TileStore, open_tiles
from pathfm.study import Study
from pathfm.tile.pixels import slide_pixels
from pathfm.tile.stage import run_tile
from tests.slides.crosses import pyramid

SOURCES = {"pyramid": "pyramid.svs", "flat": "flat.tif", "whole": "whole.png", "tiles": "tiles"}
SIDE, COLUMNS, ROWS = 64, 9, 7
SIZE, MPP = Size(SIDE * COLUMNS, SIDE * ROWS), 0.5


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """One picture as a JPEG pyramid, and what that decodes to as a one-level TIFF, as a PNG, and as a folder of PNG tiles."""
    folder = tmp_path_factory.mktemp("slides")
    picture, _ = draw_slide(SyntheticSpec(size_px=SIZE, seed=5, tissue_fraction=0.6))
    write_pyramid(folder / "pyramid.svs", pyramid(picture, (1, 4)), TiffOptions("aperio", Size(SIDE, SIDE), mpp=Mpp(MPP, MPP)))
    with open_slide(folder / "pyramid.svs", "openslide") as reader:
        decoded = reader.read_region(0, 0, 0, SIZE)
    assert not np.array_equal(decoded, picture)
    write_pyramid(folder / "flat.tif", [decoded], TiffOptions(tile_px=None, colour="raw", mpp=Mpp(MPP, MPP)))
    Image.fromarray(decoded).save(folder / "whole.png", dpi=(25_400 / MPP,) * 2)
    (folder / "tiles").mkdir()
    for number in range(ROWS * COLUMNS):
        y, x = (SIDE * each for each in divmod(number, COLUMNS))
        Image.fromarray(decoded[y : y + SIDE, x : x + SIDE]).save(folder / "tiles" / f"tile_{number}.png")
    return folder


def tiled(slides: Path, out: Path, codec: str) -> tuple[Study, Cohort, dict[str, TileStore]]:
    """Every source tiled by the stage. Tissue is not looked for: the tiles of a folder come without a slide around them."""
    rows = tuple(SlideRow(name, slides / file, mpp=MPP) for name, file in SOURCES.items())
    settings = {"tile_px": SIDE, "mpp": MPP, "codec": codec, "tissue": {"method": "off"}}
    study = Study.model_validate({"tile": settings, "compute": {"workers": 1, "threads": 2}})
    layout = Layout(out / codec, "tiles")
    report = run_tile(study, Cohort(rows), layout)
    assert [outcome.status for outcome in report.outcomes] == ["done"] * len(rows), report
    return study, Cohort(rows), {row.slide_id: open_tiles(layout.store(row.slide_id)) for row in rows}


def test_every_source_gives_the_same_tiles(slides, tmp_path):
    study, cohort, bare = tiled(slides, tmp_path, "none")
    _, _, lossless = tiled(slides, tmp_path, "zstd")
    _, _, kept = tiled(slides, tmp_path, "auto")
    expected = [tile.tobytes() for tile in lossless["pyramid"].read(range(len(lossless["pyramid"])))]
    assert 20 < len(expected) < ROWS * COLUMNS  # white tiles are dropped
    for row in cohort.rows:
        stored = lossless[row.slide_id]
        assert [tile.tobytes() for tile in stored.read(range(len(stored)))] == expected, row
        for threads in (1, 4):
            tiles = slide_pixels(row, study.tile, bare[row.slide_id], threads)
            assert [tile.tobytes() for tile in tiles if tile is not None] == expected, row
    passed = kept["pyramid"]
    assert {name: store.attrs.get("passed_through", False) for name, store in kept.items()} == {
        "pyramid": True,
        "flat": False,
        "whole": False,
        "tiles": False,
    }
    assert [tile.tobytes() for tile in passed.read(range(len(passed)))] == expected
    # Other sources are encoded for a store of JPEG tiles: near, and not the same.
    apart = kept["tiles"].read(range(len(expected))).astype(int) - passed.read(range(len(expected)))
    assert 0 < np.abs(apart).mean() < 4


@pytest.mark.long
def test_every_source_gives_the_same_features(slides, tmp_path):
    """Through the stage, from stores with pixels and straight from the slides: equal to the last bit, at the same places."""
    found = []
    for codec in ("zstd", "none"):
        study, cohort, _ = tiled(slides, tmp_path, codec)
        settings = {"encoder": "untrained:vit_tiny_patch16_224", "input_px": SIDE, "precision": "fp32", "dtype": "float32"}
        study = study.model_copy(update={"extract": study.extract.model_copy(update=settings)})
        rows = {row.slide_id: row for row in cohort.rows}

        def pixels_of(store, threads, rows=rows, study=study):
            return slide_pixels(rows[store.slide_id], study.tile, store, threads)

        done = run_extract(study, cohort, Layout(tmp_path / codec, "tiles"), pixels_of=pixels_of)
        assert [outcome.status for outcome in done.report.outcomes] == ["done"] * len(rows)
        found += [open_features(done.sets["main"].path(name)) for name in rows]
    on_slides = [file.coords for file in found if not file.attrs["coords_synthetic"]]
    assert len(on_slides) == 6
    for file in found:
        np.testing.assert_array_equal(file.features, found[0].features)
        assert file.valid.all()
    for coords in on_slides:
        np.testing.assert_array_equal(coords, on_slides[0])
