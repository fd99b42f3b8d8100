"""Same settings, same slide, same tiles: when they change, ``VERSION`` must, or old stores would pass for current ones."""

import hashlib

from pathfm.geometry import Size
from pathfm.slides.synthetic import SyntheticSpec, write_slide
from pathfm.store.cohort import SlideRow
from pathfm.store.tile_store import open_tiles
from pathfm.study import TileSettings
from pathfm.tile.slide import tile_slide
from pathfm.tile.stage import VERSION
from pathfm.tile.task import TileTask

GOLDEN = {2: "e144c56b893536f9"}
"""By version: what a digest of coordinates, fates and coarse pixels must be. A new version gets a new line here."""


def test_tiles_change_only_with_the_version(tmp_path):
    slide = write_slide(tmp_path / "slide.tiff", SyntheticSpec(size_px=Size(2048, 2048), seed=5, pen="green")).path
    task = TileTask(SlideRow("slide", slide), TileSettings(tile_px=128), tmp_path / "slide.zarr", "identity", ("a", "b"))
    counts, _ = tile_slide(task)
    store = open_tiles(task.store)
    # Rounded, so that another version of a decoder or of OpenCV may differ in a grey level.
    grey = [round(float(store[index].mean()) / 4) for index in range(len(store))]
    quality = (store.quality[:, :3] * 20).round().astype(int).tolist()
    told = repr((sorted(counts.items()), store.xy_level0.tolist(), grey, quality))
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == GOLDEN[VERSION]
