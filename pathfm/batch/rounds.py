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
    """A bundle, opened, checked and loaded once, that is asked about round after round.

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

        self._files = _files_of(place)
        self.bundle = open_bundle(place)
        if self.bundle.facts["needs"]:
            what = f"this bundle needs {', '.join(self.bundle.facts['needs'])} for every slide, which nobody gives at night"
            raise UsageError(what, where=str(place), fix="use `pathfm mil predict`, or train without it")
        self.study = locked_study(self.bundle, {"table": None, "slides": (), "pseudonym_key": key}, work, overrides)
        if self.study.compute.shard:
            raise UsageError("a night batch has no shards", where="compute.shard", fix="leave it out")
        self.ensemble = Ensemble(self.bundle, pick_device(self.study.compute))
        self.drift = drift_reference(self.bundle)
        self._sets = check_locked_encoder(self._run({}), self.bundle)

    def _run(self, slides: Mapping[str, Path]) -> Run:
        """The cohort is made here and not read from a table: a slide that has gone meanwhile must fail alone."""
        from pathfm.tile.stage import tile_settings_digest

        rows = tuple(SlideRow(slide_id, path) for slide_id, path in sorted(slides.items()))
        tile = self.study.tile
        return Run(self.study, Cohort(rows), Layout(self.study.out, tile_spec(tile, tile_settings_digest(tile))))

    def predict(self, slides: Mapping[str, Path]) -> Predicted:
        """What the bundle says of slides, by slide_id; their pictures and tile stores are left in the folder of the round.

        Raises:
            BundleError: another bundle, or none that is whole, lies now where this one did.
        """
        from pathfm.mil.known import check_known
        from pathfm.prediction import predict_slides

        self._check_bundle()
        run = self._run(slides)
        known = check_known(run.study, run.cohort, self.ensemble, "mark")
        return predict_slides(run, self.ensemble, known, self._sets)

    def _check_bundle(self) -> None:
        """What is loaded must still be what lies there: results name the bundle. Its bytes are read only if it was touched."""
        from pathfm.mil.bundle import BundleError, open_bundle

        folder = self.bundle.folder
        if (files := _files_of(folder)) == self._files:
            return
        if open_bundle(folder).digest != self.bundle.digest:
            fix = "put the former one back, or start again with --new-bundle if the change is meant"
            raise BundleError("another bundle lies here than when this run began", where=str(folder), fix=fix)
        self._files = files


def _files_of(folder: Path) -> list[tuple[Path, int, int, int]]:
    """Names, sizes, times of change and inode numbers of all files below a folder; nothing while it cannot be read."""
    try:
        found = [(path, path.lstat()) for path in sorted(folder.rglob("*")) if not path.is_dir()]
    except OSError:
        return []
    return [(path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found]
