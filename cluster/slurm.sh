#!/usr/bin/env bash
# Trains on a SLURM cluster; arguments are passed to launch.py. From the repository, with its .venv:
#
#   one task per GPU:       sbatch --nodes=2 --ntasks-per-node=8 --gres=gpu:8 cluster/slurm.sh --workdir=runs/a
#   CPUs, one per node:     sbatch --nodes=4 --exclusive cluster/slurm.sh --workdir=runs/a
#   a sweep of 40 runs:     sbatch --array=0-39 cluster/slurm.sh --config=configs/ablations.py:photos --sweep=%a --workdir=runs/a
#   five runs, %a is 0-4:   sbatch --array=0-4 cluster/slurm.sh --config.seed=%a --workdir=runs/seed_%a
#
#SBATCH --job-name=alexnet
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

# srun no longer inherits this from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# When one task exits, the others have 60 s. --kill-on-bad-exit would kill a task that still writes.
code=0
srun --label --kill-on-bad-exit=0 --wait=60 \
  .venv/bin/python launch.py --distributed "${@//\%a/${SLURM_ARRAY_TASK_ID:-%a}}" || code=$?
if [[ $code == 75 ]]; then # preempted, with a checkpoint written
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
