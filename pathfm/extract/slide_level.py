"""Vectors of whole slides, from their feature files: made where they are absent or stale, and gathered in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pathfm.config import fingerprint
from pathfm.errors import PathfmError, SlideError, StoreError
from pathfm.faults import crash_point
from pathfm.models.slide_encoders import FAULTS, SlideEncoder, check_features
from pathfm.store.commit import sweep
from pathfm.store.feature_file import FeatureFile, open_features, read_feature_attrs
from pathfm.store.lease import Lease, LeaseLostError, Leases
from pathfm.store.record import Outcome, Status
from pathfm.store.slide_vectors import SlideVector, is_slide_table, open_slide_vector, write_slide_table, write_slide_vector

VERSION = 1
"""Raised whenever the vectors of the same features change."""
CARRIED = ("slide_id", "tile_px", "tile_side_level0", "mpp", "effective_mpp", "coords_synthetic")
"""Attributes of the feature file that its slide's vector repeats."""


def write_slide_vectors(
    feature_paths: Sequence[Path], folder: Path, encoder: SlideEncoder, lease_s: float = 120.0
) -> list[Outcome]:
    """Writes ``folder/NAME/<slide_id>.h5`` for each feature file, and the table ``folder/NAME.csv``.

    Vectors that are up to date are kept. Other processes and machines may do the same at the same time: each vector is made by
    one of them, and the last to finish leaves a table of all. The table holds every vector in the folder that fits the feature
    file of its slide. Neither files nor table depend on the order of the feature files.

    Args:
        feature_paths: feature files of one encoder that are up to date.
        folder: in the folder of the feature files.
        encoder: from ``load_slide_encoder``.
        lease_s: as ``compute.lease_s``.

    Returns:
        One outcome per feature file, in their order; a slide that fails has no vector, also none of an earlier run.

    Raises:
        StoreError: the folder cannot be written, or the vectors differ in length.
    """
    home = folder / _safe(encoder.name)
    with Leases(lease_s) as leases:
        for each in (folder, home):
            sweep(each)
            leases.sweep(each)
        made, reasons = _make_stale(feature_paths, home, encoder, leases)
        vectors = _write_table(home, folder.parent, encoder, leases)
    outcomes: list[Outcome] = []
    for path in feature_paths:
        slide_id = path.stem
        if slide_id in vectors:
            status: Status = "done" if slide_id in made else "kept"
            outcomes.append(Outcome(slide_id, status, counts={"dim": len(vectors[slide_id])}))
        else:
            reason = reasons.get(slide_id, "its features were replaced meanwhile (run the same command again)")
            outcomes.append(Outcome(slide_id, "failed", f"slide vector {encoder.name}: {reason}"))
    return outcomes


def _make_stale(
    feature_paths: Sequence[Path], home: Path, encoder: SlideEncoder, leases: Leases
) -> tuple[set[str], dict[str, str]]:
    """Makes the vectors that are absent or stale; which slides got one here, and why others did not."""

    def is_current(path: Path) -> bool:
        return _current(path, home, encoder) is not None

    stale = [path for path in feature_paths if not is_current(path)]
    made: set[str] = set()
    reasons: dict[str, str] = {}
    for path, lease in leases.each(stale, lambda path: home / path.name, is_current):
        with lease:
            try:
                _make(path, home, encoder, lease)
                made.add(path.stem)
            except LeaseLostError as error:  # what is there now is another's
                reasons[path.stem] = error.reason
            except PathfmError as error:
                (home / path.name).unlink(missing_ok=True)
                reasons[path.stem] = error.reason
    return made, reasons


def _write_table(home: Path, features: Path, encoder: SlideEncoder, leases: Leases) -> dict[str, npt.NDArray[np.float32]]:
    """Writes the table of what is there, and returns it.

    One process at a time looks and writes: otherwise one that looked earlier could write later, and a shorter table.
    """
    table = home.with_name(f"{home.name}.csv")

    def there() -> dict[str, npt.NDArray[np.float32]]:
        found = {path.stem: _current(features / path.name, home, encoder) for path in sorted(home.glob("*.h5"))}
        return {slide_id: vector.vector for slide_id, vector in found.items() if vector is not None}

    vectors = there()
    if not is_slide_table(table, vectors):  # a finished study may lie on a drive that cannot be written
        for _, lease in leases.each([table], lambda path: path, lambda _: False):
            with lease:
                vectors = there()
                write_slide_table(table, vectors)
    return vectors


def _wanted(attrs: Mapping[str, Any], encoder: SlideEncoder) -> str:
    """The fingerprint of the vector of these features."""
    return fingerprint({"version": VERSION, "features": str(attrs.get("fingerprint")), "encoder": encoder.identity})


def _current(path: Path, home: Path, encoder: SlideEncoder) -> SlideVector | None:
    """The vector of a feature file if it is there and what would be made now."""
    attrs = read_feature_attrs(path)
    try:
        vector = open_slide_vector(home / path.name)
    except StoreError:
        return None
    return vector if attrs is not None and vector.fingerprint == _wanted(attrs, encoder) else None


def _make(path: Path, home: Path, encoder: SlideEncoder, lease: Lease) -> None:
    file = open_features(path)
    vector_D = _encoded(file, encoder)
    about = {name: file.attrs[name] for name in CARRIED if name in file.attrs}
    depends: dict[str, str | int] = {
        "fingerprint": _wanted(file.attrs, encoder),
        "features_fingerprint": file.fingerprint,
        "features_encoder": str(file.attrs.get("recipe_encoder", "")),
        "slide_encoder": encoder.name,
        "slide_encoder_identity": encoder.identity,
        "tiles": int(file.valid.sum()),
    }
    crash_point("extract.slide_vector")
    write_slide_vector(home / path.name, vector_D, about | depends, lease.check)


def _encoded(file: FeatureFile, encoder: SlideEncoder) -> npt.NDArray[np.float32]:
    """The vector [D] of a slide's valid tiles."""
    features_ND, coords_N2 = file.features, file.coords
    check_features(encoder, file.attrs, features_ND.shape[1])
    if not file.valid.all():
        features_ND, coords_N2 = features_ND[file.valid], coords_N2[file.valid]
    if not len(features_ND):
        raise SlideError("the slide has no valid tile")
    try:
        vector = np.asarray(encoder(features_ND, coords_N2, float(file.attrs["tile_side_level0"])))
        vector_D = vector.astype(np.float32)
    except FAULTS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise SlideError(f"it fails on this slide: {reason}") from error
    wanted = encoder.dim or (len(vector_D) if vector_D.ndim == 1 else 0)
    if vector_D.shape != (wanted,) or not np.isfinite(vector_D).all():
        raise SlideError(f"it gives {list(vector_D.shape)} numbers, or some that are not finite, where a vector is due")
    return vector_D


def _safe(name: str) -> str:
    return "".join(character if character.isalnum() or character in "._-" else "-" for character in name)
