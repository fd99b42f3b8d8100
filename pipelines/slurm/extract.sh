#!/bin/bash
# Features of a study, a GPU for each task of the array.  Submit:  sbatch pipelines/slurm/extract.sh study.yaml
# Without GPUs, remove the line that asks for one. Submitted again, it keeps what is finished and tries again what failed.
#SBATCH --job-name=pathfm-extract
#SBATCH --array=1-4
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

study=${1:?name a study file}
cores=${SLURM_CPUS_PER_TASK:-1}

pathfm extract "$study" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" --set compute.workers="$cores"
code=$?

# 3: some slides failed. They are listed above and in the record; the study goes on with the others.
if [ "$code" -eq 3 ]; then
    exit 0
fi
exit "$code"
