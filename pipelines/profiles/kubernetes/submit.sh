#!/usr/bin/env bash
# submit.sh CORES MEMORY_MB GPUS SCRIPT: starts a Kubernetes Job and prints its name.
set -euo pipefail
job=$(cat "$(dirname "$0")/job.yaml")
job=${job//@CORES@/"$1"}
job=${job//@MEMORY_MB@/"$2"}
job=${job//@GPUS@/"$3"}
job=${job//@SCRIPT@/"$4"}
kubectl create --output name --filename - <<<"$job"
