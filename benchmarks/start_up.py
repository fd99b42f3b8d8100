"""What every run costs before it has read a tile."""

from __future__ import annotations

import statistics
import tempfile

from benchmarks.measure import Options, Table, run_pathfm
from benchmarks.slide import small_slide

TIMES = 5


def run(options: Options) -> list[Table]:
    """Medians of five runs."""
    slide = small_slide(options.work)
    table = Table("start-up", ("command", "CPU s", "wall s"))
    commands = {"pathfm --help": ["--help"], "pathfm tile, one small slide": ["tile", str(slide), "--tile-px", "256"]}
    for name, command in commands.items():
        runs = []
        for _ in range(TIMES):
            with tempfile.TemporaryDirectory(dir=options.work) as folder:
                out = ["--out", folder] if command[0] == "tile" else []
                runs.append(run_pathfm(*command, *out))
        table.rows.append((name, statistics.median(run.cpu_s for run in runs), statistics.median(run.wall_s for run in runs)))
    return [table]
