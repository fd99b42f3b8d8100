"""``python -m benchmarks [name ...]``: runs the named benchmarks, or all of them."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import Options, Table, save

WORK = Path(tempfile.gettempdir()) / "pathfm-benchmarks"
BENCHMARKS = {
    "start_up": "pathfm --help, and a tile run that has next to nothing to do",
    "slide": "the benchmark slide: how it is made, bytes per tile",
    "read": "CPU per tile of reading alone: OpenSlide, the bare decode, ours, and peers that are installed",
    "tile": "the whole `pathfm tile`, against an OpenSlide loop that stores nothing",
    "passthrough": "tiles per CPU-second when stored tiles are passed on undecoded",
    "memory": "peak memory and time of squares of 20, 60 and 100 thousand pixels",
    "loading": "what pretraining's data cost: reading, crops, and the order of samples over a million slides",
    "random_reads": "single tiles of a store: our reader and zarr-python",
    "extract": "features from tiles on disk to files on disk, against the bare network",
    "extract_field": "slides per hour, against the loop that the field runs",
    "extract_memory": "peak memory of extraction for slides of up to 100,000 tiles",
    "step": "a pretraining step: ours and the official order of operations",
    "mil_epoch": "an epoch of a slide classifier: ours, a plain loop, and what row-chunked files cost",
    "mil_lockstep": "5 folds x 3 seeds in one pass per epoch, against 15 trainings of our own",
    "interval_coverage": "how often 95 % intervals hold the truth in simulated cohorts",
    "mil_memory": "peak memory of training classifiers on 100 and 1,000 bags within a stated budget",
    "cohort_overhead": "thousands of tiny slides through the whole study: what a slide costs beside the real work",
    "dag_building": "how long 10,000 slides take to plan, and Snakemake to build the graph of their jobs",
    "fidelity": "is it the same picture: bit identity, PSNR and shift of DCT scaling",
}


def main() -> None:
    """Prints each table as it is ready."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="\n".join(f"{name:16}{what}" for name, what in BENCHMARKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="name", help="which ones (default: all)")
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder that keeps the slides (default: {WORK})")
    parser.add_argument("--data", type=Path, help="folder with real slides (*.svs) to report beside the synthetic one")
    parser.add_argument("--passes", type=int, default=2, help="how often each piece of work is done (default: 2)")
    parser.add_argument("--quick", action="store_true", help="a fraction of the work, to see that everything runs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<name>-<cpu>.json")
    chosen = parser.parse_args()
    unknown = sorted(set(chosen.names) - set(BENCHMARKS))
    if unknown:
        sys.exit(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    options = Options(chosen.work, chosen.data, chosen.passes, chosen.quick)
    options.work.mkdir(parents=True, exist_ok=True)
    for name in chosen.names or BENCHMARKS:
        tables: list[Table] = importlib.import_module(f"benchmarks.{name}").run(options)
        print("\n".join(f"{table}\n" for table in tables), flush=True)
        if chosen.save:
            save(name, tables)


if __name__ == "__main__":
    main()
