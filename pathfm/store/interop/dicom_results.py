"""One slide's prediction as DICOM objects: a structured report, a segmentation of the tiles, and maps of their scores.

Specified in ``docs/dicom.md``. No path gets in, no label or macro image, and of the patient only the id that is given. There is
no clock: the same result gives the same bytes.

Shapes: C maps (1, or one per class), h x w pixels of a map.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from pathfm.errors import MissingExtraError, MissingMppError, SlideError
from pathfm.geometry import Mpp, Size
from pathfm.log import get_log
from pathfm.store.commit import commit_dir

if TYPE_CHECKING:
    from pydicom import Dataset

ODD_HEADER = (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, NotImplementedError, EOFError)
"""What pydicom and highdicom raise over values that are absent, of another kind, or out of place."""

log = get_log(__name__)

ScoreKind = Literal["attention", "gradient x input"]


@dataclass(frozen=True)
class TileMap:
    """Scores of the tiles of a slide, one pixel per step of their grid.

    Attributes:
        origin_level0: x and y of the upper left corner of the first pixel [level-0 px].
        step_level0: width and height of a pixel [level-0 px].
        value_Chw: scores; where tiles overlap, their mean; NaN where no tile was looked at, the same places in all maps.
        names: of the maps; a single map may have "".
        kind: what the scores are.
        marked_hw: pixels of the tiles to point at.
        marked_as: how those were chosen, in words.
    """

    origin_level0: tuple[float, float]
    step_level0: tuple[float, float]
    value_Chw: NDArray[np.float64]
    names: tuple[str, ...]
    kind: ScoreKind
    marked_hw: NDArray[np.bool_]
    marked_as: str

    @property
    def analysed_hw(self) -> NDArray[np.bool_]:
        """Pixels of the tiles that were looked at."""
        return np.asarray(np.isfinite(self.value_Chw).all(axis=0))


@dataclass(frozen=True)
class TaskResult:
    """What is said of one task.

    Attributes:
        name: of the task.
        predicted: mean of the networks, by class or, in tasks without classes, by what is predicted.
        has_classes: the predicted numbers are probabilities of classes.
        calibrated: calibrated probabilities by class; empty where nothing is calibrated.
        decision: a class, ``abstain:<reason>``, or "".
        conformal_set: classes that cannot be ruled out; empty where there are no sets.
        doubts: reasons to look twice, in words.
    """

    name: str
    predicted: Mapping[str, float]
    has_classes: bool = True
    calibrated: Mapping[str, float] = field(default_factory=dict)
    decision: str = ""
    conformal_set: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class DicomResult:
    """All that the objects of one slide say.

    Attributes:
        slide_id: how the slide is called in them; may be a pseudonym.
        identity: hash of the slide's content, from which UIDs are made.
        size_level0: of the slide.
        mpp: of its level 0; DICOM slides say it themselves.
        n_tiles: tiles that the networks were given.
        tiles: their scores.
        tasks: what was predicted, the main task first.
        bundle: digest of the locked classifier.
        model: its name.
        version: of pathfm.
        time: of the prediction, with its time zone.
        patient_id: real or pseudonym; "" where there is none.
        qc: flags of quality control, in words.
        sources: files of the slide itself where it is DICOM; they are referred to.
        thumbnail: RGB picture [h, w, 3] of the whole slide where it is not DICOM; it becomes the image that is referred to.
    """

    slide_id: str
    identity: str
    size_level0: Size
    mpp: Mpp | None
    n_tiles: int
    tiles: TileMap
    tasks: tuple[TaskResult, ...]
    bundle: str
    model: str
    version: str
    time: datetime
    patient_id: str = ""
    qc: tuple[str, ...] = ()
    sources: tuple[Path, ...] = ()
    thumbnail: NDArray[np.uint8] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over everything that is said but the time: another prediction gets other UIDs, a rerun the same ones."""
        tiles = self.tiles
        said = {
            "slide": (self.slide_id, self.identity, self.size_level0, self.mpp, self.n_tiles, self.patient_id, self.qc),
            "tasks": [asdict(task) for task in self.tasks],
            "made_by": (self.bundle, self.model, self.version),
            "tiles": (tiles.origin_level0, tiles.step_level0, tiles.names, tiles.kind, tiles.marked_as, tiles.value_Chw.shape),
        }
        hashed = hashlib.sha256(json.dumps(said, sort_keys=True, ensure_ascii=True).encode())
        hashed.update(tiles.value_Chw.astype("<f8").tobytes() + tiles.marked_hw.tobytes())
        return hashed.hexdigest()


def write_dicom(folder: Path, result: DicomResult) -> list[Path]:
    """Writes ``report.dcm``, ``segmentation.dcm``, ``map-<n>.dcm`` and, if the slide is not DICOM, ``slide.dcm``.

    The folder appears whole or not at all and replaces an earlier one.

    Args:
        folder: of this slide's objects alone.
        result: what they say.

    Returns:
        The files written, by name.

    Raises:
        MissingExtraError: highdicom is not installed.
        SlideError: there are no tiles; the resolution is unknown; the sources are not the slide, or have an odd header; or an
            id does not fit DICOM.
        StoreError: the drive is full, read-only or failing.
    """
    with _odd_headers(result):
        datasets = _datasets(result)
        with commit_dir(folder) as temporary:
            for name, dataset in datasets.items():
                dataset.save_as(temporary / name, enforce_file_format=True)
    return [folder / name for name in sorted(datasets)]


@contextmanager
def _odd_headers(result: DicomResult) -> Iterator[None]:
    """Scanners write headers that the libraries stumble over, wherever they first look at them."""
    try:
        yield
    except ODD_HEADER as error:
        if not result.sources:
            raise
        log.debug("%s", result.sources[0], exc_info=error)
        # The words of such an error may quote the header, which may name a patient.
        raise SlideError(f"its DICOM header is not as the libraries expect it ({type(error).__name__})") from error


def _datasets(result: DicomResult) -> dict[str, Dataset]:
    if not result.n_tiles or not result.tiles.analysed_hw.any():
        raise SlideError("no tiles, so there is nothing to say of it in DICOM")
    if result.mpp is None and not result.sources:
        raise MissingMppError("DICOM objects need its resolution", fix="give mpp in the cohort table")
    require_highdicom()
    from pathfm.store.interop.dicom_images import score_maps, tile_segmentation
    from pathfm.store.interop.dicom_report import report
    from pathfm.store.interop.dicom_source import make_reference, open_reference

    image = open_reference(result) if result.sources else make_reference(result)
    maps = {f"map-{index}.dcm": each for index, each in enumerate(score_maps(result, image), 1)}
    derived = {"segmentation.dcm": tile_segmentation(result, image), **maps}
    own = {} if result.sources else {"slide.dcm": image}
    return {**own, **derived, "report.dcm": report(result, image, list(derived.values()))}


def require_highdicom() -> None:
    """Asks for the library before hours of work.

    Raises:
        MissingExtraError: highdicom is not installed.
    """
    if importlib.util.find_spec("highdicom") is None:
        raise MissingExtraError("DICOM objects need highdicom", extra="dicom")
