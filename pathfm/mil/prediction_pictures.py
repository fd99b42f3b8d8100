"""Where the networks looked in new slides: a table, a picture, QuPath's GeoJSON and (if wanted) a layer per slide."""

from __future__ import annotations

import shutil
from pathlib import Path

from pathfm.errors import StoreError
from pathfm.mil.explain import Explained
from pathfm.mil.feature_cache import SlideFacts
from pathfm.mil.galleries import heat_of, tile_table, write_layer, write_pictures, write_qupath
from pathfm.mil.outputs import canvas_of, write_table
from pathfm.store.cohort import Cohort
from pathfm.store.tile_store import open_tiles

FOLDERS = ("attention", "heatmaps", "geojson", "layers")


class Pictures:
    """Writes what belongs to each slide as it is asked about.

    Args:
        out: folder of the predictions; pictures of earlier ones are removed from it.
        stores_dir: folder of ``<slide_id>.zarr``.
        cohort: the slides.
        layers: also write OME-TIFF layers.
    """

    def __init__(self, out: Path, stores_dir: Path, cohort: Cohort, *, layers: bool) -> None:
        self.out, self.stores_dir, self.layers = out, stores_dir, layers
        self.rows = {row.slide_id: row for row in cohort.rows}
        for name in FOLDERS:
            shutil.rmtree(out / name, ignore_errors=True)

    def look(self, slide_id: str, explained: Explained, facts: SlideFacts) -> None:
        """Writes the files of one slide; tiles without a place on it get a table only.

        Raises:
            StoreError: the tile store is damaged, or is not that of the features.
        """
        store = open_tiles(self.stores_dir / f"{slide_id}.zarr")
        if facts.file_rows != len(store):
            raise StoreError("tiles and features do not belong together", where=str(store.path), fix="run it again")
        heat = heat_of(facts, store, explained)
        write_table(self._file("attention", slide_id, "csv"), *tile_table(heat, store.source_names))
        write_pictures(self.out / "heatmaps", heat, canvas_of(store, self.rows[slide_id], has_truth=False))
        if store.coords_synthetic:
            return
        write_qupath(self._file("geojson", slide_id, "geojson"), heat, store)
        if self.layers:
            write_layer(self._file("layers", slide_id, "ome.tif"), heat, store)

    def _file(self, kind: str, slide_id: str, suffix: str) -> Path:
        return self.out / kind / f"{slide_id}.{suffix}"
