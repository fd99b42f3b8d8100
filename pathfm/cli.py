"""The commands. Thin: each loads its code when it runs, so that ``pathfm --help`` is instant and imports no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from pathfm.study import Study

EPILOG = (
    "Exit codes: 0 done, 3 some slides failed (listed), 2 usage or settings, 1 internal error, 75 preempted (saved: run it "
    "again), 130 interrupted."
)

PLACE_ERRORS = (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)
"""A folder that cannot be written, or a file where a folder should be: the user's to mend, not a defect."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=EPILOG,
    help="Pathology slides to trustworthy slide classifiers: tile -> pretrain -> extract -> mil -> report.\n\n"
    "Start with `pathfm demo`, or `pathfm tile SLIDES --out DIR`, or write one study file and `pathfm run STUDY.yaml`.",
)
mil_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Slide classifiers: train with honest folds, or predict new slides."
)
app.add_typer(mil_app, name="mil")
export_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Tiles and encoders as other programs want them.")
app.add_typer(export_app, name="export")

StudyArgument = Annotated[
    Path, typer.Argument(help="A study file (YAML), or the output folder of an earlier `pathfm tile`.", metavar="STUDY")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting, e.g. --set tile.mpp=0.5. Repeatable.", metavar="NAME=VALUE"),
]
PatientOption = Annotated[bool, typer.Option("--patient-is-slide", help="Accept that every slide is its own patient.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show the log.")]


@app.callback()
def options(verbose: VerboseOption = False) -> None:
    """Options of every command."""
    from pathfm.log import show_log

    show_log(verbose)


@app.command()
def tile(
    sources: Annotated[
        list[str], typer.Argument(help="Slides, folders, globs, a cohort table (CSV), or one study file (YAML).")
    ],
    out: Annotated[Path | None, typer.Option(help="Output folder (needed unless a study file names it).")] = None,
    mpp: Annotated[str | None, typer.Option(help="Resolution in um per px, several with commas, or `native`. [0.5]")] = None,
    tile_px: Annotated[int | None, typer.Option(help="Side of a tile in px. [224]")] = None,
    assume_mpp: Annotated[float | None, typer.Option(help="mpp of slides that carry none.")] = None,
    folder_of_tiles: Annotated[bool, typer.Option("--folder-of-tiles", help="Each sub-folder of images is one slide.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only say what would be done: one table of all slides.")] = False,
    shard: Annotated[str | None, typer.Option(help="i/n: work on every n-th slide only, for array jobs.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Local folder that slides of slow drives are copied to.")] = None,
    settings: SetOption = None,
) -> None:
    """Cut slides into tiles: tissue detection, true micrometres, quality columns, one zarr store per slide.

    Example: pathfm tile slides/ --out out --mpp 0.5 --tile-px 224
    """
    from pathfm import workflow

    options = {
        "tile.mpp": f"[{mpp}]" if mpp and "," in mpp else mpp,
        "tile.tile_px": tile_px,
        "tile.assume_mpp": assume_mpp,
        "out": out and out.absolute(),
        "compute.shard": shard or None,
        "compute.cache_dir": cache_dir and cache_dir.absolute(),
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    given += ["cohort.folder_of_tiles=true"] * folder_of_tiles
    study = workflow.study_from_sources(sources, [*given, *(settings or [])])
    if check:
        from pathfm import tiling

        _finish(tiling.check(study))
    _finish(workflow.tile(study))


@app.command()
def pretrain(
    study: StudyArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done: crops, steps, memory, images/s, time, disk.")
    ] = False,
    settings: SetOption = None,
) -> None:
    """Pretrain a vision transformer on the tiles (DINO family; docs/pretrain.md) and export the EMA teacher as a timm folder.

    Resumes by itself, also on another number of processes. SIGTERM and SIGUSR1 save and end with exit code 75.

    Example: pathfm pretrain study.yaml --dry-run --set pretrain.preset=dinov2 --set compute.devices=4
    """
    if dry_run:
        from pathfm import planning

        _finish(planning.dry_run(_study(study, settings)))
    from pathfm import workflow

    _finish(workflow.pretrain(_study(study, settings)))


@app.command()
def extract(
    study: StudyArgument,
    encoder: Annotated[
        str | None, typer.Option(help="pretrained, timm:NAME, hf-hub:ORG/NAME, local-dir:PATH or untrained:NAME.")
    ] = None,
    settings: SetOption = None,
) -> None:
    """Turn tiles into features: one HDF5 file per slide, whole or absent."""
    from pathfm import workflow

    given = [f"extract.encoder={encoder}"] if encoder else []
    _finish(workflow.extract(_study(study, [*given, *(settings or [])])))


@mil_app.command("train")
def mil_train(study: StudyArgument, patient_is_slide: PatientOption = False, settings: SetOption = None) -> None:
    """Train gated attention MIL in patient-level folds; the test fold is never used to choose anything."""
    from pathfm import workflow

    _finish(workflow.mil_train(_study(study, _patient(patient_is_slide, settings))))


@mil_app.command("predict")
def mil_predict(
    study: StudyArgument,
    slides: Annotated[list[str], typer.Argument(help="New slides, folders, globs or a cohort table.")],
    out: Annotated[Path, typer.Option(help="Where predictions.csv and the features go.")],
    settings: SetOption = None,
) -> None:
    """Predict new slides with the networks of a trained study: same tiles, same encoder, all members averaged."""
    from pathfm.prediction import mil_predict as predict_slides

    _finish(predict_slides(_study(study, settings), slides, out))


@app.command()
def run(study: StudyArgument, patient_is_slide: PatientOption = False, settings: SetOption = None) -> None:
    """Run a whole study: what is stale, in order. A second run does nothing and says so."""
    from pathfm import workflow

    _finish(workflow.run(_study(study, _patient(patient_is_slide, settings))))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the synthetic slides and all results.")] = Path("demo"),
    settings: SetOption = None,
) -> None:
    """Draw a small cohort of synthetic slides and run the whole pipeline on it, on the CPU, in a few minutes."""
    from pathfm.demo import run_demo

    _finish(run_demo(out, settings or []))


@export_app.command("tiles")
def export_tiles(
    source: Annotated[Path, typer.Argument(help="A study file, an output folder, a folder of tile stores, or one store.")],
    out: Annotated[Path, typer.Option(help="Where the files go.")],
    format: Annotated[str, typer.Option(help="png, jpeg, webdataset, clam, trident or geojson.")] = "png",
) -> None:
    """Write tiles, or where they lie, as other programs read them. Example: pathfm export tiles out --format trident --out t"""
    from pathfm import tiling

    _finish(tiling.export(source, format, out))


@export_app.command("encoder")
def export_encoder(
    source: Annotated[Path, typer.Argument(help="A study file, an output folder, or an encoder folder.")],
    out: Annotated[Path, typer.Argument(help="Where the encoder goes: a folder that is absent, empty or an earlier export.")],
    student: Annotated[bool, typer.Option("--student", help="The student instead of the EMA teacher.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Add model.onnx, checked against torch (extra `onnx`).")] = False,
    licence: Annotated[str | None, typer.Option(help="Licence that the model card states, e.g. cc-by-nc-4.0.")] = None,
) -> None:
    """Write a pretrained encoder as a timm folder with model card, preprocessing, provenance and hashes.

    Example: pathfm export encoder out my-encoder --onnx
    """
    from pathfm import exporting

    wanted = exporting.Wanted(student, onnx, licence or exporting.UNKNOWN_LICENCE)
    _finish(exporting.export_encoder_folder(source, out, wanted))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A study file, slide, tile store, feature file, encoder or output folder.")],
) -> None:
    """Say what something is: the resolved settings of a study, or the facts of an artifact."""
    from pathfm.inspection import inspect_path
    from pathfm.log import say

    say(inspect_path(path))


@app.command()
def doctor() -> None:
    """Say what this machine can do: torch, GPUs, bf16, OpenSlide, decoders, free disk."""
    from pathfm.doctor import diagnose
    from pathfm.log import say

    for line in diagnose():
        say(line)


def _patient(patient_is_slide: bool, settings: list[str] | None) -> list[str]:
    return ["cohort.patient_is_slide=true"] * patient_is_slide + (settings or [])


def _study(source: Path, settings: list[str] | None) -> Study:
    from pathfm import workflow

    return workflow.open_study(source, settings or [])


def _finish(exit_code: int) -> NoReturn:
    raise typer.Exit(int(exit_code))


def main() -> None:
    """Runs the command; every foreseen error is one line and its exit code."""
    from pathfm.errors import ExitCode, PathfmError

    try:
        app()
    except PathfmError as error:
        print(f"pathfm: {error}", file=sys.stderr)
        raise SystemExit(int(error.exit_code)) from None
    except PLACE_ERRORS as error:
        print(f"pathfm: {error.filename}: {error.strerror}", file=sys.stderr)
        raise SystemExit(int(ExitCode.USAGE)) from None
    except SystemExit as ended:
        if ended.code == ExitCode.INTERRUPTED:  # typer turns Ctrl-C into this
            print("pathfm: interrupted; run the same command again to go on", file=sys.stderr)
        raise
