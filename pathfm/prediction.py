"""``pathfm mil predict``: new slides through the tiles, encoder and networks of a trained study."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pathfm.errors import ExitCode, UsageError
from pathfm.log import say
from pathfm.store.commit import commit_file, read_json
from pathfm.store.record import Outcome
from pathfm.study import ExtractSettings, Study, TileSettings
from pathfm.workflow import RECIPE_FILE, begin, cohort_of, run_extraction, run_tiling, upstream_outcomes

if TYPE_CHECKING:
    from pathfm.mil.predict import Prediction


def mil_predict(study: Study, sources: Sequence[str], out: Path) -> ExitCode:
    """``pathfm mil predict``: new slides through the tiles, encoder and networks of a trained study."""
    from pathfm.mil.predict import predict

    trained = study.out
    if not (trained / "mil" / "metrics.json").is_file():
        raise UsageError("this study has no trained classifier", where=str(trained), fix="run `pathfm mil train` first")
    if (out / "mil").exists() or out.resolve() == trained.resolve():
        raise UsageError("this folder holds a study of its own", where=str(out), fix="name another folder for the predictions")
    recipe = read_json(trained / "mil" / RECIPE_FILE)
    tile_settings = TileSettings.model_validate(recipe["tile"])
    extract = ExtractSettings.model_validate({**recipe["extract"], "controls": False})
    if recipe["own_encoder"]:
        extract = extract.model_copy(update={"encoder": f"local-dir:{trained / recipe['own_encoder']}"})
    cohort = study.cohort.model_copy(update={**cohort_of(sources), "tile_labels": None})
    changed = {"out": out.absolute(), "cohort": cohort, "tile": tile_settings, "extract": extract}
    run = begin(study.model_copy(update=changed))
    run_tiling(run)
    extraction = run_extraction(run)
    usable = [outcome.slide_id for outcome in extraction.report.outcomes if outcome.status in {"done", "kept"}]
    folder = extraction.sets["main"].folder
    predictions = predict(trained / "mil", [folder / f"{slide_id}.h5" for slide_id in usable])
    with (
        commit_file(run.layout.out / "predictions.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as stream,
    ):
        csv.writer(stream).writerows(_prediction_rows(predictions, list(upstream_outcomes(run, extraction).values())))
    say(f"{len(usable)} of {len(run.cohort.rows)} slides predicted: {run.layout.out / 'predictions.csv'}")
    return run.exit_code


def _prediction_rows(predictions: Sequence[Prediction], outcomes: Sequence[Outcome]) -> Iterator[list[str]]:
    """One row per slide, the failed and empty ones with their reason."""
    by_slide = {prediction.slide_id: prediction for prediction in predictions}
    classes = list(predictions[0].probability) if predictions else []
    yield ["slide_id", "outcome", "predicted", *(f"p_{name}" for name in classes), "lowest", "highest", "reason"]
    for outcome in outcomes:
        found = by_slide.get(outcome.slide_id)
        if found is None:
            yield [outcome.slide_id, outcome.status, *[""] * (len(classes) + 3), outcome.reason]
            continue
        numbers = [*found.probability.values(), found.lowest, found.highest]
        yield [outcome.slide_id, "predicted", found.predicted, *(f"{number:.6f}" for number in numbers), ""]
