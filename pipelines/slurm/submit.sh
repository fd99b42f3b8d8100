#!/bin/bash
# Submits a whole study, each stage when the one before has succeeded:
#
#     pipelines/slurm/submit.sh study.yaml                     # tile, pretrain, extract, mil
#     pipelines/slurm/submit.sh study.yaml tile extract mil    # with a public encoder
#
# What the site wants goes into the environment, e.g. SBATCH_ACCOUNT=mylab SBATCH_PARTITION=main, or into the scripts' headers.
set -euo pipefail

study=${1:?name a study file}
shift
if [ "$#" -eq 0 ]; then
    set -- tile pretrain extract mil
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
after=()

for stage in "$@"; do
    # A stage whose predecessor has failed is cancelled, else it would wait for ever.
    job=$(sbatch --parsable --kill-on-invalid-dep=yes "${after[@]}" "$here/$stage.sh" "$study")
    job=${job%%;*}
    after=("--dependency=afterok:$job")
    echo "$stage $job"
done
