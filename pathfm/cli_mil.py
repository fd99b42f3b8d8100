"""``pathfm mil``: slide classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pathfm.cli_options import PatientOption, SetOption, as_settings, finish, open_study

mil_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Slide classifiers: train with honest folds, or predict new slides."
)


@mil_app.command("train")
def mil_train(
    study: Annotated[Path, typer.Argument(help="A study file, an output folder, or (with --features) a cohort table.")],
    features: Annotated[
        Path | None, typer.Option(help="Folder of feature files made elsewhere (docs/interop.md); no slides are needed.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder (needed for a table).")] = None,
    patient_is_slide: PatientOption = False,
    settings: SetOption = None,
) -> None:
    """Train attention MIL in patient-level folds; the test fold is never used to choose anything. Ends with a locked bundle."""
    from pathfm import classification, workflow

    given = {"out": out, "mil.features": features}
    overrides = [*(f"{name}={path}" for name, path in given.items() if path), *as_settings(patient_is_slide, settings)]
    is_table = study.suffix.lower() in workflow.TABLE_SUFFIXES
    opened = workflow.study_from_sources([str(study)], overrides, "mil") if is_table else open_study(study, overrides, "mil")
    finish(classification.mil_train(opened))


@mil_app.command("predict")
def mil_predict(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="New slides, folders, globs or one cohort table; without --bundle a trained study first.",
            metavar="[STUDY] SLIDES...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where predictions.csv, pictures and features go.")],
    bundle: Annotated[
        Path | None, typer.Option(help="A locked classifier: OUT/mil/bundle of `pathfm mil train`, wherever it is now.")
    ] = None,
    trained: Annotated[
        Literal["refuse", "mark", "exclude"],
        typer.Option(help="Labelled slides of patients the networks learned from: refuse, mark, or leave out of the numbers."),
    ] = "refuse",
    settings: SetOption = None,
) -> None:
    """Predict new slides with a locked classifier; labels in the table make it the external validation."""
    from pathfm.prediction import mil_predict as predict_slides

    finish(predict_slides(sources, out, bundle, settings or (), trained))
