"""Options that several commands share, and what they do at their ends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from pathfm.study import Study

StudyArgument = Annotated[
    Path, typer.Argument(help="A study file (YAML), or the output folder of an earlier command.", metavar="STUDY")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting, e.g. --set tile.mpp=0.5. Repeatable.", metavar="NAME=VALUE"),
]
PatientOption = Annotated[bool, typer.Option("--patient-is-slide", help="Accept that every slide is its own patient.")]
TileOption = Annotated[str, typer.Option(help="SLIDE:x,y in level-0 pixels, or SLIDE:NUMBER.", metavar="TILE")]
FeaturesOption = Annotated[str | None, typer.Option(help="Which features, by encoder name or folder, where there are several.")]
PicturesOption = Annotated[Path | None, typer.Option(help="Where pictures go; default: a folder of the study.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show the log.")]


def as_settings(patient_is_slide: bool, settings: list[str] | None) -> list[str]:
    """The option ``--patient-is-slide`` as a setting, before the others."""
    return ["cohort.patient_is_slide=true"] * patient_is_slide + (settings or [])


def open_study(source: Path, settings: list[str] | None, stage: str = "") -> Study:
    """The study of a file or an output folder, with overrides; what the folder keeps for the stage is said."""
    from pathfm import workflow

    return workflow.open_study(source, settings or [], stage)


def finish(exit_code: int) -> NoReturn:
    """Ends the command with an exit code."""
    raise typer.Exit(int(exit_code))
