"""Commands that run studies, and those that watch over what was run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pathfm.cli_options import PatientOption, SetOption, StudyArgument, as_settings, finish, open_study


def add_commands(app: typer.Typer) -> None:
    """Adds them to the application."""
    app.command()(run)
    app.command()(plan)
    app.command(hidden=True)(job)
    app.command()(batch)
    app.command()(audit)
    app.command()(verify)
    app.command()(pseudonyms)
    app.command()(sbom)
    carried = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What goes to machines without internet.")
    carried.callback()(bundle)
    carried.command("env")(bundle_env)
    app.add_typer(carried, name="bundle")


def run(
    study: StudyArgument,
    patient_is_slide: PatientOption = False,
    engine: Annotated[
        Literal["local", "snakemake"], typer.Option(help="local: in this process; snakemake: as jobs, also on a cluster.")
    ] = "local",
    why: Annotated[
        bool, typer.Option("--why", help="Only explain what would run: which setting, slide or stage differs.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run.")] = False,
    until: Annotated[str, typer.Option(help="Last stage: check, tile, pretrain, extract, mil or report.")] = "",
    forcerun: Annotated[
        list[str] | None,
        typer.Option(
            help="Run this stage's jobs and those after it again; what is up to date is kept, and hashed anew. Repeatable.",
            metavar="STAGE",
        ),
    ] = None,
    retrain_encoder: Annotated[
        bool,
        typer.Option(
            "--retrain-encoder", help="Pretrain on all slides of the cohort, with those that came later; says the price."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="The price of --retrain-encoder is accepted.")] = False,
    profile: Annotated[str, typer.Option(help="Snakemake's: local, slurm, or a folder of your own.")] = "local",
    jobs: Annotated[int, typer.Option(help="How many jobs Snakemake may run at once; 0: as the profile says.", min=0)] = 0,
    dag: Annotated[Path | None, typer.Option(help="Only draw Snakemake's jobs into this file (svg, png, dot, mmd).")] = None,
    unlock: Annotated[bool, typer.Option("--unlock", help="Only remove the lock that a killed Snakemake left.")] = False,
    snakemake_report: Annotated[bool, typer.Option("--snakemake-report", help="Also write Snakemake's own report.")] = False,
    replay: Annotated[
        Path | None,
        typer.Option(help="Do what a record (OUT/runs/...json) says again, in OUT-replay or --set out=DIR, and compare."),
    ] = None,
    settings: SetOption = None,
) -> None:
    """Run a whole study: what is stale, in order. A second run does nothing and says so.

    Example: pathfm run study.yaml --engine snakemake --profile slurm
    """
    from pathfm.running import RunOptions, run_study

    wanted = RunOptions(
        engine=engine,
        until=until,
        forcerun=tuple(forcerun or ()),
        retrain_encoder=retrain_encoder,
        yes=yes,
        why=why,
        dry_run=dry_run,
        profile=profile,
        jobs=jobs,
        dag=dag,
        unlock=unlock,
        snakemake_report=snakemake_report,
        replay=replay,
    )
    finish(run_study(open_study(study, as_settings(patient_is_slide, settings)), wanted))


def plan(study: StudyArgument, settings: SetOption = None) -> None:
    """Write down which jobs a study has, and which of them are stale; for workflow engines."""
    from pathfm.running import plan_study

    finish(plan_study(open_study(study, settings)))


def job(
    stage: Annotated[str, typer.Argument(help="check, tile, pretrain, extract, mil or report.")],
    out: Annotated[Path, typer.Argument(help="The output folder of a planned study.")],
    group: Annotated[str, typer.Option(help="Of slides, as in the plan.")] = "all",
    settings: SetOption = None,
) -> None:
    """Run one job of a planned study, and write its receipt."""
    from pathfm.jobs import run_job

    finish(run_job(out, stage, group, settings or []))


def batch(
    outbox: Annotated[Path, typer.Option(help="Where results, the ledger and health.json go.")],
    bundle: Annotated[Path | None, typer.Option(help="The locked classifier.")] = None,
    inbox: Annotated[Path | None, typer.Option(help="Where slides arrive; nothing in it is ever changed.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch/--once", help="Go on until stopped, or end when nothing is left to do.")
    ] = False,
    settle: Annotated[float, typer.Option(help="A slide is whole when it was unchanged for so many seconds.")] = 30.0,
    sentinel: Annotated[str, typer.Option(help="Instead: a slide is whole when FILE + this is there, as .done.")] = "",
    round: Annotated[int, typer.Option(help="Slides worked on together.", min=1)] = 8,
    min_free_gb: Annotated[float, typer.Option(help="Begin no work with less free space in the outbox.")] = 5.0,
    new_bundle: Annotated[bool, typer.Option("--new-bundle", help="Another bundle than before is meant.")] = False,
    pseudonym_key: Annotated[Path | None, typer.Option(help="Secret key: names of slides become pseudonyms.")] = None,
    dicom: Annotated[bool, typer.Option("--dicom", help="Also write DICOM objects (docs/dicom.md).")] = False,
    health: Annotated[bool, typer.Option("--health", help="Only say how the batch is, for monitoring.")] = False,
    max_age: Annotated[
        float, typer.Option(help="With --health: the inbox must have been looked at within so many seconds.")
    ] = 93600.0,
    settings: SetOption = None,
) -> None:
    """Predict the slides that arrive in a folder, night after night, with a locked classifier (docs/hospital.md).

    Example: pathfm batch --bundle bundle --inbox /scans --outbox /results --once
    """
    if health:
        from pathfm.batch.health import health as say_health

        finish(say_health(outbox, max_age))
    if bundle is None or inbox is None:
        raise typer.BadParameter("needed: --bundle FOLDER and --inbox FOLDER")
    from pathfm.batch.night import batch as run_batch
    from pathfm.batch.options import BatchOptions

    wanted = BatchOptions(watch, settle, sentinel, round, min_free_gb, new_bundle, pseudonym_key, dicom)
    finish(run_batch(bundle, inbox, outbox, wanted, settings or ()))


def audit(
    folder: Annotated[Path | None, typer.Argument(help="An output folder, an outbox, or a folder of those.")] = None,
    key: Annotated[
        list[Path] | None, typer.Option(help="A key that was in use, besides that of PATHFM_AUDIT_KEY. Repeatable.")
    ] = None,
    head: Annotated[str, typer.Option(help="Hash of a manifest or line that was kept elsewhere: it must be there.")] = "",
    new_key: Annotated[Path | None, typer.Option(help="Only make a key, in this file.")] = None,
) -> None:
    """Check that no log line and no run manifest was altered, dropped, swapped or cut off (docs/audit.md)."""
    if new_key:
        from pathfm.chain import new_key as make_key
        from pathfm.log import say

        make_key(new_key)
        say(f"key: {new_key}, which only you can read; take one for each use:")
        say(f"  to prove records: export PATHFM_AUDIT_KEY={new_key.absolute()}")
        say(f"  for pseudonyms: pathfm batch --pseudonym-key {new_key.absolute()}, or cohort.pseudonym_key of a study")
        return
    if folder is None:
        raise typer.BadParameter("name the folder to check, or --new-key FILE")
    from pathfm.audit import audit as check_chains

    finish(check_chains(folder, key or (), head))


def verify(
    folder: Annotated[Path, typer.Argument(help="A study's output folder, bundle, encoder, outbox or carried folder.")],
) -> None:
    """Hash everything again, and compare with what was recorded when it was made."""
    from pathfm.verification import verify as check_content

    finish(check_content(folder))


def pseudonyms(
    table: Annotated[Path, typer.Argument(help="A cohort table, or the inbox of a night batch.")],
    key: Annotated[Path, typer.Option(help="The key of cohort.pseudonym_key, or of --pseudonym-key.")],
    out: Annotated[Path, typer.Option(help="CSV that says who is who; only its owner can read it.")],
) -> None:
    """Write who is who among pseudonyms, for whoever holds the key."""
    from pathfm.batch.names import write_inbox_pseudonyms
    from pathfm.log import say
    from pathfm.store.pseudonyms import write_pseudonyms

    write = write_inbox_pseudonyms if table.is_dir() else write_pseudonyms
    say(f"{write(table, key, out)} slides: {out}")


def sbom(out: Annotated[Path, typer.Option(help="The JSON file.")] = Path("sbom.json")) -> None:
    """List the software of this environment with its licences (CycloneDX)."""
    from pathfm.sbom import write_sbom

    finish(write_sbom(out))


def bundle() -> None:
    """What goes to machines without internet."""


def bundle_env(
    out: Annotated[Path, typer.Option(help="The folder: absent, empty, or an earlier one.")],
    bundle: Annotated[list[Path] | None, typer.Option(help="A locked classifier. Repeatable.")] = None,
    encoder: Annotated[list[Path] | None, typer.Option(help="A folder with an encoder. Repeatable.")] = None,
    no_wheels: Annotated[bool, typer.Option("--no-wheels", help="Models only: wheels of CUDA are several GB.")] = False,
) -> None:
    """Write a folder that installs pathfm and its models without internet (docs/offline.md).

    Example: pathfm bundle env --out carry --bundle out/mil/bundle
    """
    from pathfm.offline import carry

    finish(carry(out, bundle or (), encoder or (), not no_wheels))
