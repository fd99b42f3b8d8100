"""How long a study of 10,000 slides takes to plan, and Snakemake to build the graph of its jobs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Options, Table
from pathfm.config import load_study
from pathfm.geometry import Size
from pathfm.slides.synthetic import SyntheticSpec, write_cohort
from pathfm.snakemake_engine import pipelines
from pathfm.store.receipts import ALL, BY_GROUP, STAGES, group_count
from pathfm.study_plan import Planned, StudyPlan, make_plan, plan_file, write_plan
from pathfm.workflow import begin

SLIDES, QUICK, PER_GROUP = 10_000, 500, (64, 8, 1)


def run(options: Options) -> list[Table]:
    """The graph of new studies whose plan is made up, by slides per job; and what the plan of as many slides costs."""
    slides = QUICK if options.quick else SLIDES
    graph = Table(
        f"building the graph of {slides:,} slides",
        ("slides per job", "jobs", "plan.json MB", "graph s"),
        notes=("graph s: `snakemake --dry-run`, start to end, all jobs new",),
    )
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for per_group in PER_GROUP:
            out = Path(folder) / str(per_group)
            plan = made_up(slides, per_group)
            write_plan(plan_file(out), plan)
            size = plan_file(out).stat().st_size / 1e6
            graph.rows.append((per_group, len(plan.jobs), size, graph_s(out)))
        planning = Table(
            f"planning {slides:,} slides", ("state", "plan s"), notes=("the table names 20 small slides over and over",)
        )
        planning.rows.extend(_planning(Path(folder) / "real", slides))
    return [graph, planning]


def made_up(slides: int, per_group: int) -> StudyPlan:
    """The plan of a new study; every job has as many settings and inputs as a real one."""
    ids = [f"slide-{number:05d}" for number in range(slides)]
    count = group_count(slides, per_group)
    groups = {f"{place + 1}-of-{count}": tuple(ids[place::count]) for place in range(count)}
    jobs = []
    for stage in STAGES:
        for group, members in (groups if stage in BY_GROUP else {ALL: tuple(ids)}).items():
            inputs = dict.fromkeys(members, "0" * 64)
            jobs.append(Planned(stage, group, f"{stage}{group}", {f"setting.{n}": n for n in range(60)}, inputs, members))
    return StudyPlan(tuple(job for job in jobs if job.slide_ids), "made up")


def graph_s(out: Path) -> float:
    """A dry run of Snakemake [s]."""
    start = time.perf_counter()
    rules = ["--snakefile", str(pipelines() / "Snakefile"), "--profile", str(pipelines() / "profiles" / "local")]
    what = ["--directory", str(out), "--cores", "2", "--dry-run", "--quiet", "all"]
    # It ends with who has started it, and does not plan: that is what `engine` says.
    command = [sys.executable, "-m", "snakemake", *rules, *what, "--config", f"out={out}", f"engine={os.getpid()}"]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def _planning(folder: Path, slides: int) -> list[tuple[str | float, ...]]:
    """The real planner on a table that names a few small slides over and over."""
    few = write_cohort(folder, 20, 5, SyntheticSpec(size_px=Size(256, 256)))
    header, *rows = few.read_text().splitlines()
    again = (rows[number % len(rows)].partition(",")[2] for number in range(slides))
    few.write_text("\n".join([header, *(f"slide-{number:05d},{rest}" for number, rest in enumerate(again))]) + "\n")
    study = load_study(None, [f"cohort.table={few}", f"out={folder / 'out'}"])
    start = time.perf_counter()
    make_plan(begin(study))
    return [("new", time.perf_counter() - start)]
