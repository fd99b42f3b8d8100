#!/bin/bash
# Submits a whole study, each stage when the one before has succeeded:
#
#     pipelines/slurm/submit.sh study.yaml                             # tile, pretrain, extract, mil
#     pipelines/slurm/submit.sh study.yaml tile extract mil            # with a public encoder
#     pipelines/slurm/submit.sh study.yaml -- --time=2-0 --mem=64G     # what follows -- goes to every sbatch
#
# What the site wants goes into the environment, e.g. SBATCH_ACCOUNT=mylab SBATCH_PARTITION=main, or into the scripts' headers.
set -euo pipefail

refuse() {
    echo "submit.sh: $1" >&2
    exit 2
}

[ "$#" -gt 0 ] || refuse "name a study file: submit.sh study.yaml [STAGE ...] [-- OPTION OF SBATCH ...]"
study=$1
shift
[ -f "$study" ] && [ -r "$study" ] || refuse "$study: there is no such study file, or it cannot be read"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

stages=()
while [ "$#" -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
        tile | pretrain | extract | mil) stages+=("$1") ;;
        *) refuse "there is no stage '$1' (tile, pretrain, extract, mil)" ;;
    esac
    shift
done
[ "$#" -eq 0 ] || shift
[ "${#stages[@]}" -gt 0 ] || stages=(tile pretrain extract mil)
after=()

for stage in "${stages[@]}"; do
    # A stage whose predecessor has failed is cancelled, else it would wait for ever.
    job=$(sbatch --parsable --kill-on-invalid-dep=yes "$@" "${after[@]}" "$here/$stage.sh" "$study")
    job=${job%%;*}
    after=("--dependency=afterok:$job")
    echo "$stage $job"
done
