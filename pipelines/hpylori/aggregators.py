"""All aggregators on the features of a study, on the same splits: a table of patient AUROC and of how well tiles are found.

Run after the study:  python pipelines/hpylori/aggregators.py OUT [--set mil.epochs=60 ...]
OUT is the study's output folder; networks and numbers go to OUT/aggregators/NAME, the table to OUT/aggregators/table.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from pathfm.classification import inputs_of
from pathfm.extraction import run_extraction
from pathfm.log import say
from pathfm.mil.aggregators.registry import AGGREGATORS
from pathfm.mil.controls import COLOUR
from pathfm.mil.stage import run_mil
from pathfm.store.commit import commit_file, read_json
from pathfm.workflow import begin, open_study

HEADER = (
    "| model | patient AUROC (95 %) | tile AUROC in positive patients | average precision | highest tile hits | shown by |\n"
    "|---|---|---|---|---|---|"
)


def main() -> None:
    """Trains and judges every aggregator, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=sorted(AGGREGATORS))
    parser.add_argument("--set", dest="settings", action="append", default=[])
    wanted = parser.parse_args()
    run = begin(open_study(wanted.out, ["mil.ensemble=3", *wanted.settings]))
    inputs = replace(inputs_of(run, run_extraction(run)), deploy=None)
    lines = [HEADER]
    for number, name in enumerate(wanted.only):
        # The controls do not depend on the aggregator but for the untrained encoder: once is enough.
        changes = {"aggregator": name, "controls": number == 0}
        study = run.study.model_copy(update={"mil": run.study.mil.model_copy(update=changes)})
        folder = wanted.out / "aggregators" / name
        run_mil(study, run.cohort, replace(inputs, mil_dir=folder, main_name=name))
        metrics = read_json(folder / "metrics.json")
        kinds = {COLOUR: "decision on the tile"}
        lines += [_row(model, found, kinds.get(model, metrics["looks"]["kind"])) for model, found in metrics["models"].items()]
        say(lines[-1])
    with commit_file(wanted.out / "aggregators" / "table.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    say("\n".join(lines))


def _row(name: str, found: dict[str, Any], kind: str) -> str:
    shown = [found.get(key) for key in ("auroc", "localisation_auroc", "localisation_average_precision", "pointing_game")]
    return f"| {name} | {' | '.join(_spoken(number) for number in shown)} | {kind if shown[1] else '-'} |"


def _spoken(number: dict[str, Any] | None) -> str:
    return f"{number['value']:.3f} ({number['low']:.3f}-{number['high']:.3f})" if number else "-"


if __name__ == "__main__":
    main()
