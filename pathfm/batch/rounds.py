"""One round of a night batch: a few slides through a locked bundle, by the functions of ``pathfm mil predict``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pathfm.errors import UsageError
from pathfm.store.cohort import Cohort, SlideRow
from pathfm.store.layout import Layout, tile_spec
from pathfm.workflow import Run

if TYPE_CHECKING:
    from pathfm.prediction import Predicted


class Predictor:
    """A bundle, opened and checked once, that is asked about round after round.

    Args:
        place: the bundle.
        work: folder of a round.
        overrides: settings that the bundle leaves open.
        key: file of the key of pseudonyms, if slides are called by those.

    Raises:
        UsageError: the bundle is damaged, or does not go with this machine or with unattended work.
    """

    def __init__(self, place: Path, work: Path, overrides: Sequence[str] = (), key: Path | None = None) -> None:
        from pathfm.compute import pick_device
        from pathfm.mil.bundle import open_bundle
        from pathfm.mil.drift import drift_reference
        from pathfm.mil.predict import Ensemble
        from pathfm.prediction import check_locked_encoder, locked_study

        self.bundle = open_bundle(place)
        if self.bundle.facts["needs"]:
            what = f"this bundle needs {', '.join(self.bundle.facts['needs'])} for every slide, which nobody gives at night"
            raise UsageError(what, where=str(place), fix="use `pathfm mil predict`, or train without it")
        self.study = locked_study(self.bundle, {"table": None, "slides": (), "pseudonym_key": key}, work, overrides)
        if self.study.compute.shard:
            raise UsageError("a night batch has no shards", where="compute.shard", fix="leave it out")
        self.ensemble = Ensemble(self.bundle, pick_device(self.study.compute))
        self.drift = drift_reference(self.bundle)
        check_locked_encoder(self._run({}), self.bundle)

    def _run(self, slides: Mapping[str, Path]) -> Run:
        """The cohort is made here and not read from a table: a slide that has gone meanwhile must fail alone."""
        from pathfm.tile.stage import tile_settings_digest

        rows = tuple(SlideRow(slide_id, path) for slide_id, path in sorted(slides.items()))
        tile = self.study.tile
        return Run(self.study, Cohort(rows), Layout(self.study.out, tile_spec(tile, tile_settings_digest(tile))))

    def predict(self, slides: Mapping[str, Path]) -> Predicted:
        """What the bundle says of slides, by slide_id; their pictures and tile stores are left in the folder of the round."""
        from pathfm.prediction import check_known, predict_slides

        run = self._run(slides)
        return predict_slides(run, self.ensemble, check_known(run, self.ensemble, "mark"))
