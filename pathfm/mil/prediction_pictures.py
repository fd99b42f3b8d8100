"""Where the networks looked in new slides: a table, a picture, QuPath's GeoJSON and (if wanted) a layer per slide."""

from __future__ import annotations

import shutil
from pathlib import Path

from pathfm.errors import StoreError
from pathfm.mil.explain import Explained
from pathfm.mil.feature_cache import SlideFacts
from pathfm.mil.galleries import tile_features, tile_table, write_layer
from pathfm.mil.heatmap import SlideHeat, all_tiles, draw_class_maps, draw_heatmap, write_heatmap
from pathfm.mil.outputs import canvas_of, write_table
from pathfm.store.cohort import Cohort
from pathfm.store.commit import commit_file
from pathfm.store.interop.geojson import write_geojson
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
        logit_NC = None if explained.logit_NC is None else all_tiles(explained.logit_NC, facts.kept, len(store))
        value_NC = all_tiles(explained.value_NC, facts.kept, len(store))
        heat = SlideHeat(
            slide_id, store.xy_level0, store.tile_sides_level0, value_NC, explained.names, explained.kind, logit_NC
        )
        write_table(self._file("attention", slide_id, "csv"), *tile_table(heat, store.source_names))
        canvas = canvas_of(store, self.rows[slide_id], has_truth=False)
        write_heatmap(self._file("heatmaps", slide_id, "png"), draw_heatmap(canvas, heat))
        if len(heat.names) > 1:
            write_heatmap(self._file("heatmaps", slide_id, "classes.png"), draw_class_maps(canvas, heat))
        if store.coords_synthetic:
            return
        with commit_file(self._file("geojson", slide_id, "geojson")) as temporary:
            write_geojson(temporary, tile_features(heat))
        if self.layers:
            write_layer(self._file("layers", slide_id, "ome.tif"), heat, store)

    def _file(self, kind: str, slide_id: str, suffix: str) -> Path:
        return self.out / kind / f"{slide_id}.{suffix}"
