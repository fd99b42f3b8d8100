"""Vectors of whole slides, from their feature files: made where they are absent or stale, and gathered in a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pathfm.config import fingerprint
from pathfm.errors import PathfmError, SlideError, StoreError
from pathfm.faults import crash_point
from pathfm.models.slide_encoders import FAULTS, SlideEncoder, check_features
from pathfm.store.commit import sweep
from pathfm.store.feature_file import FeatureFile, open_features, read_feature_attrs
from pathfm.store.record import Outcome, Status
from pathfm.store.slide_vectors import SlideVector, open_slide_vector, write_slide_table, write_slide_vector

VERSION = 1
"""Raised whenever the vectors of the same features change."""
CARRIED = ("slide_id", "tile_px", "tile_side_level0", "mpp", "effective_mpp", "coords_synthetic")
"""Attributes of the feature file that its slide's vector repeats."""


def write_slide_vectors(feature_paths: Sequence[Path], folder: Path, encoder: SlideEncoder) -> list[Outcome]:
    """Writes ``folder/NAME/<slide_id>.h5`` for each feature file and the table ``folder/NAME.csv`` of all these slides.

    Vectors that are up to date are kept. Neither files nor table depend on the order of the feature files.

    Args:
        feature_paths: feature files of one encoder; their slides make the table.
        folder: beside the features.
        encoder: from ``load_slide_encoder``.

    Returns:
        One outcome per feature file, in their order; a slide that fails has no vector, also none of an earlier run.
    """
    home = folder / _safe(encoder.name)
    sweep(folder)
    sweep(home)
    outcomes: list[Outcome] = []
    vectors: dict[str, npt.NDArray[np.float32]] = {}
    for path in feature_paths:
        target = home / f"{path.stem}.h5"
        try:
            status, made = _kept_or_made(path, target, encoder)
        except PathfmError as error:
            target.unlink(missing_ok=True)
            outcomes.append(Outcome(path.stem, "failed", f"slide vector {encoder.name}: {error.reason}"))
            continue
        vectors[path.stem] = made.vector
        outcomes.append(Outcome(path.stem, status, counts={"dim": len(made.vector)}))
    write_slide_table(home.with_name(f"{home.name}.csv"), vectors)
    return outcomes


def _kept_or_made(path: Path, target: Path, encoder: SlideEncoder) -> tuple[Status, SlideVector]:
    attrs = read_feature_attrs(path)
    if attrs is None:
        raise StoreError("its feature file is absent or damaged", fix="run `pathfm extract` again")
    wanted = fingerprint({"version": VERSION, "features": str(attrs.get("fingerprint")), "encoder": encoder.identity})
    kept = _current(target, wanted)
    if kept is not None:
        return "kept", kept
    file = open_features(path)
    vector_D = _encoded(file, encoder)
    about = {name: file.attrs[name] for name in CARRIED if name in file.attrs}
    depends: dict[str, str | int] = {
        "fingerprint": wanted,
        "features_fingerprint": file.fingerprint,
        "features_encoder": str(file.attrs.get("recipe_encoder", "")),
        "slide_encoder": encoder.name,
        "slide_encoder_identity": encoder.identity,
        "tiles": int(file.valid.sum()),
    }
    crash_point("extract.slide_vector")
    write_slide_vector(target, vector_D, about | depends)
    return "done", SlideVector(vector_D, about | depends)


def _current(target: Path, wanted: str) -> SlideVector | None:
    try:
        vector = open_slide_vector(target)
    except StoreError:
        return None
    return vector if vector.fingerprint == wanted else None


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
