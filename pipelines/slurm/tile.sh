#!/bin/bash
# Tiles of a study; the tasks of the array share its slides.  Submit:  sbatch pipelines/slurm/tile.sh study.yaml
# Submitted again, it keeps what is finished and tries again what failed.
#SBATCH --job-name=pathfm-tile
#SBATCH --array=1-8
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

study=${1:?name a study file}
cores=${SLURM_CPUS_PER_TASK:-1}

pathfm tile "$study" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" --set compute.workers="$cores"
code=$?

# 3: some slides failed. They are listed above and in the record; the study goes on with the others.
if [ "$code" -eq 3 ]; then
    exit 0
fi
exit "$code"
