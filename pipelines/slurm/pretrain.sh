#!/bin/bash
# Pretraining under SLURM that survives time limits and preemption.  Submit:  sbatch pipelines/slurm/pretrain.sh study.yaml
# One task per GPU; pathfm sees SLURM's variables and needs no launcher. Change the numbers below to your cluster's.
#SBATCH --job-name=pathfm-pretrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# USR1 goes to the tasks (not to this shell) 120 s before the time limit: enough for the step under way and a checkpoint.
# Tasks ask each other every ten steps whether one was told to stop: with steps of more than 10 s, say USR1@300.
#SBATCH --signal=USR1@120

study=${1:?name a study file}

# A task that ends late, because it was still saving, must not turn 75 into "killed"; one that hangs is ended.
# srun must be told the cores of a task: since SLURM 22.05 it does not take them from the job, and gives each task one.
srun ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=0 --wait=120 pathfm pretrain "$study"
code=$?

# 75: the state is saved and there is more to do. 138: USR1 came before there was anything to save. SLURM itself requeues on no
# exit code unless the site sets RequeueExit.
if [ "$code" -eq 75 ] || [ "$code" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
