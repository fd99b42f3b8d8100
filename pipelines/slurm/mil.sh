#!/bin/bash
# The rest of a study: slide classifiers and the report.  Submit:  sbatch pipelines/slurm/mil.sh study.yaml
# `pathfm run` does what is not done yet; tiles, encoder and features of earlier jobs are only looked at.
#SBATCH --job-name=pathfm-mil
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

study=${1:?name a study file}
cores=${SLURM_CPUS_PER_TASK:-1}

pathfm run "$study" --set compute.workers="$cores" --set compute.threads="$cores"
code=$?

# 3: some slides failed. They are listed above and in the report; all the others are in it.
if [ "$code" -eq 3 ]; then
    exit 0
fi
exit "$code"
