"""``pathfm mil predict``: new slides through the tiles, encoder and networks of a trained study."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pathfm.errors import ExitCode, UsageError
from pathfm.extraction import run_extraction
from pathfm.log import say
from pathfm.store.commit import commit_file, read_json
from pathfm.store.record import Outcome
from pathfm.study import ExtractSettings, Study, TileSettings
from pathfm.workflow import RECIPE_FILE, Run, begin, cohort_of, run_tiling, upstream_outcomes

if TYPE_CHECKING:
    from pathfm.mil.predict import Prediction
    from pathfm.mil.seen import Seen


ONLY_FEATURES = {"controls": False, "also": (), "dense": False, "slide_vectors": ()}
"""What a prediction needs no more than this of an extraction."""


def mil_predict(study: Study, sources: Sequence[str], out: Path) -> ExitCode:
    """``pathfm mil predict``: new slides through the tiles, encoder and networks of a trained study."""
    from pathfm.compute import pick_device
    from pathfm.mil.predict import predict
    from pathfm.models.encoders import load_encoder

    trained = study.out
    if not (trained / "mil" / "metrics.json").is_file():
        raise UsageError("this study has no trained classifier", where=str(trained), fix="run `pathfm mil train` first")
    if (out / "mil").exists() or out.resolve() == trained.resolve():
        raise UsageError("this folder holds a study of its own", where=str(out), fix="name another folder for the predictions")
    recipe = read_json(trained / "mil" / RECIPE_FILE)
    tile_settings = TileSettings.model_validate(recipe["tile"])
    extract = ExtractSettings.model_validate({**recipe["extract"], **ONLY_FEATURES})
    if recipe["own_encoder"]:
        extract = extract.model_copy(update={"encoder": f"local-dir:{trained / recipe['own_encoder']}"})
    cohort = study.cohort.model_copy(update={**cohort_of(sources), "tile_labels": None})
    changed = {"out": out.absolute(), "cohort": cohort, "tile": tile_settings, "extract": extract}
    run = begin(study.model_copy(update=changed))
    # Before hours of work: what the networks were trained on must be computed here too.
    load_encoder(extract.encoder, extract, pick_device(study.compute)).check_precision()
    run_tiling(run)
    seen = _check_seen(run)
    extraction = run_extraction(run)
    usable = [
        outcome.slide_id
        for outcome in extraction.report.outcomes
        if outcome.status in {"done", "kept"} and seen.patients[outcome.slide_id] not in seen.left_out()
    ]
    folder = extraction.sets["main"].folder
    predictions = predict(trained / "mil", [folder / f"{slide_id}.h5" for slide_id in usable])
    with (
        commit_file(run.layout.out / "predictions.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as stream,
    ):
        csv.writer(stream).writerows(_prediction_rows(predictions, list(upstream_outcomes(run, extraction).values()), seen))
    say(f"{len(usable)} of {len(run.cohort.rows)} slides predicted: {run.layout.out / 'predictions.csv'}")
    return run.exit_code


def _check_seen(run: Run) -> Seen:
    """What the encoder has seen of the new slides, looked at before the hours of extraction.

    A table with labels is there to be judged by, and then ``mil.seen_in_pretraining`` decides (refuse by default). Without
    labels the predictions are merely marked.
    """
    from pathfm.mil.seen import check_refusal, look_for_seen

    label = run.study.mil.label
    study = run.study
    if not any(row.labels.get(label) for row in run.cohort.rows):
        study = study.model_copy(update={"mil": study.mil.model_copy(update={"seen_in_pretraining": "mark"})})
    seen = look_for_seen(study, run.cohort, run.layout.tiles)
    patients = set(seen.patients.values())
    check_refusal(seen, patients)
    for note in seen.notes(patients - seen.left_out()):
        say(note)
    return seen


def _prediction_rows(predictions: Sequence[Prediction], outcomes: Sequence[Outcome], seen: Seen) -> Iterator[list[str]]:
    """One row per slide, the failed, empty and left out ones with their reason."""
    by_slide = {prediction.slide_id: prediction for prediction in predictions}
    classes = list(predictions[0].probability) if predictions else []
    header = ["slide_id", "outcome", "predicted", *(f"p_{name}" for name in classes), "lowest", "highest"]
    yield [*header, "seen_in_pretraining", "reason"]
    for outcome in outcomes:
        patient, found = seen.patients[outcome.slide_id], by_slide.get(outcome.slide_id)
        is_seen = str(int(patient in seen.seen_patients)) if seen.known else ""
        if found is None:
            left_out = patient in seen.left_out() and outcome.status in {"done", "kept"}
            fate = ["left out", "seen in pretraining"] if left_out else [outcome.status, outcome.reason]
            yield [outcome.slide_id, fate[0], *[""] * (len(classes) + 3), is_seen, fate[1]]
            continue
        numbers = [*found.probability.values(), found.lowest, found.highest]
        yield [outcome.slide_id, "predicted", found.predicted, *(f"{number:.6f}" for number in numbers), is_seen, ""]
