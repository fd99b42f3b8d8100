"""The commands. Thin: each loads its code when it runs, so that ``pathfm --help`` is instant and imports no torch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pathfm.cli_mil import mil_app
from pathfm.cli_options import (
    FeaturesOption,
    PicturesOption,
    SetOption,
    StudyArgument,
    TileOption,
    VerboseOption,
    finish,
    open_study,
)
from pathfm.cli_run import add_commands

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
app.add_typer(mil_app, name="mil")
encoders_app = typer.Typer(
    invoke_without_command=True, rich_markup_mode=None, help="Encoders by name: what they are, and whether they are here."
)
app.add_typer(encoders_app, name="encoders")
export_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Tiles and encoders as other programs want them.")
app.add_typer(export_app, name="export")


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

        finish(tiling.check(study))
    finish(workflow.tile(study))


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

        finish(planning.dry_run(open_study(study, settings, "pretrain")))
    from pathfm import workflow

    finish(workflow.pretrain(open_study(study, settings, "pretrain")))


@app.command()
def extract(
    sources: Annotated[
        list[str], typer.Argument(help="A study file or output folder; or slides, folders, globs, a cohort table.")
    ],
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="A name of `pathfm encoders`, pretrained, timm:NAME, hf-hub:ORG/NAME, local-dir:PATH ... Repeatable."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder (needed for slides).")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: work on every n-th slide only, for array jobs.")] = None,
    settings: SetOption = None,
) -> None:
    """Turn tiles into features: one HDF5 file per slide, whole or absent. Slides are tiled as the encoder wants them.

    Example: pathfm extract slides/ --encoder uni2-h --out out
    """
    from pathfm import extraction, workflow

    first, also = (encoder[0], encoder[1:]) if encoder else (None, [])
    options = {
        "extract.encoder": first,
        "extract.also": json.dumps(also) if also else None,
        "out": out and out.absolute(),
        "compute.shard": shard or None,
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    study, tiles_too = extraction.study_for_extraction(sources, [*given, *(settings or [])])
    finish(workflow.extract(study, tiles_too))


@encoders_app.callback()
def encoders(context: typer.Context) -> None:
    """List the encoders that are known by name: dimension, input, resolution, licence, whether their weights are here."""
    if context.invoked_subcommand is None:
        from pathfm.encoder_listing import list_encoders
        from pathfm.log import say

        say(list_encoders())


@encoders_app.command("fetch")
def encoders_fetch(
    name: Annotated[str, typer.Argument(help="As in `pathfm encoders`, or timm:NAME, hf-hub:ORG/NAME.")],
    out: Annotated[Path, typer.Option(help="The folder; use it as local-dir:FOLDER.")],
) -> None:
    """Prepare a folder with an encoder and its recipe, for machines without internet."""
    from pathfm import encoder_listing

    encoder_listing.fetch(name, out)


@encoders_app.command("verify")
def encoders_verify(
    name: Annotated[str, typer.Argument(help="The encoder.")],
    against: Annotated[
        Path | None, typer.Option(help="File of recorded features; default: those that come with pathfm.")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write the file instead, on a machine whose features are right.")
    ] = False,
) -> None:
    """Compute the features of built-in tiles and compare them with recorded ones."""
    from pathfm import encoder_listing

    finish(encoder_listing.verify(name, against, record))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the synthetic slides and all results.")] = Path("demo"),
    settings: SetOption = None,
) -> None:
    """Draw a small cohort of synthetic slides and run the whole pipeline on it, on the CPU, in a few minutes."""
    from pathfm.demo import run_demo

    finish(run_demo(out, settings or []))


@export_app.command("tiles")
def export_tiles(
    source: Annotated[Path, typer.Argument(help="A study file, an output folder, a folder of tile stores, or one store.")],
    out: Annotated[Path, typer.Option(help="Where the files go.")],
    format: Annotated[str, typer.Option(help="png, jpeg, webdataset, clam, trident or geojson.")] = "png",
) -> None:
    """Write tiles, or where they lie, as other programs read them. Example: pathfm export tiles out --format trident --out t"""
    from pathfm import tiling

    finish(tiling.export(source, format, out))


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
    finish(exporting.export_encoder_folder(source, out, wanted))


@export_app.command("features")
def export_features(
    source: Annotated[Path, typer.Argument(help="A study file, an output folder, a folder of feature files, or one file.")],
    out: Annotated[Path, typer.Option(help="Where the files go.")],
    format: Annotated[str, typer.Option(help="clam, trident or stamp.")] = "trident",
    features: FeaturesOption = None,
) -> None:
    """Write features as other tools' own extraction would have. Example: pathfm export features out --format clam --out c"""
    from pathfm import feature_export

    finish(feature_export.export_features(source, out, format, features or ""))


@app.command("map")
def feature_map(
    study: StudyArgument,
    by: Annotated[list[str] | None, typer.Option(help="Colour by this column of the cohort table. Repeatable.")] = None,
    slides: Annotated[list[str] | None, typer.Option(help="Draw only this slide in its components. Repeatable.")] = None,
    features: FeaturesOption = None,
    fit_slide: Annotated[bool, typer.Option("--fit-slide", help="Components of each slide, not of the cohort.")] = False,
    no_umap: Annotated[bool, typer.Option("--no-umap", help="PCA alone.")] = False,
    out: PicturesOption = None,
    settings: SetOption = None,
) -> None:
    """Draw the features: PCA and UMAP maps by slide, label and site, and each slide in the colours of its components."""
    from pathfm import looking

    fit: Literal["slide", "cohort"] = "slide" if fit_slide else "cohort"
    wanted = looking.MapOptions(
        features=features or "", by=tuple(by or ()), slides=tuple(slides or ()), fit=fit, umap=not no_umap, out=out
    )
    finish(looking.feature_map(open_study(study, settings), wanted))


@app.command()
def search(
    study: StudyArgument,
    tile: TileOption,
    count: Annotated[int, typer.Option("-k", min=1, help="How many tiles.")] = 24,
    other: Annotated[
        Literal["none", "slide", "patient"], typer.Option(help="Leave out the tile's own slide or patient.")
    ] = "none",
    features: FeaturesOption = None,
    out: PicturesOption = None,
    settings: SetOption = None,
) -> None:
    """Find the tiles of the cohort that look most like one tile, as a gallery.

    Example: pathfm search out --tile SLIDE:20480,10240 -k 40 --other patient
    """
    from pathfm import looking

    wanted = looking.SearchOptions(count=count, other=other, features=features or "", out=out)
    finish(looking.search(open_study(study, settings), tile, wanted))


@app.command()
def attention(
    study: StudyArgument,
    tile: Annotated[list[str], typer.Option(help="SLIDE:x,y in level-0 pixels, or SLIDE:NUMBER. Repeatable.", metavar="TILE")],
    out: PicturesOption = None,
    block: Annotated[int, typer.Option(help="Which block of the encoder, from the end if negative.")] = -1,
    settings: SetOption = None,
) -> None:
    """Draw what each attention head of the encoder looks at in some tiles."""
    from pathfm import attending

    finish(attending.attention(open_study(study, settings), tile, out, block))


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A study file, slide, tile store, feature file or folder of them, encoder or output folder.")
    ],
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


add_commands(app)


def main() -> None:
    """Runs the command; every foreseen error is one line and its exit code."""
    from pathfm.errors import ExitCode, PathfmError

    # Before any library reads it: threads that spin while they wait take the cores from those that decode, and from other jobs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
