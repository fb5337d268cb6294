#!/bin/bash
# Encode image shards on a Slurm cluster, one task a GPU, from the root directory of the project:
#
#   sbatch slurm/encode_shards.sh --model Qwen/Qwen-Image --data SHARDS --output_path ENCODED
#   sbatch --nodes=4 --time=12:00:00 slurm/encode_shards.sh --model MODEL --data SHARDS --output_path ENCODED
#   sbatch --gpus-per-node=4 --ntasks-per-node=4 slurm/encode_shards.sh --model MODEL --data SHARDS --output_path ENCODED
#   sbatch --gpus-per-node=0 --ntasks-per-node=2 slurm/encode_shards.sh --model MODEL ...                # without GPUs
#
# Tasks share the shards out by number and don't wait for each other; the one that ends last writes the manifest. Two
# minutes before the time limit the job goes back into the queue, as it does when a node fails or a task is killed, and goes on after each
# task's last finished shard. So does a second submission, with any number of tasks. A --time shorter than one shard
# takes would never end. PYTHON names another interpreter than .venv/bin/python.

#SBATCH --job-name=encode_shards
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

cd "$SLURM_SUBMIT_DIR" # sbatch runs a copy of this script in a spool folder
if [[ ! -f slurm/common.sh ]]; then
    echo "error: no slurm/common.sh in $SLURM_SUBMIT_DIR: submit from the root directory of the project" >&2
    exit 2
fi
# shellcheck source=slurm/common.sh
source slurm/common.sh
choose_python
one_gpu_a_task

# The signal comes to this shell alone (B: above), which hears it only because srun runs in the background.
trap 'put_back && echo "job $SLURM_JOB_ID is out of time: back in the queue" && exit 0; exit 85' USR1

# --kill-on-bad-exit=0: a task that fails leaves the others at work.
ranks --kill-on-bad-exit=0 -- "${python[@]}" data_prep/encode_shards.py "$@" &
status=0
wait "$!" || status=$?
back_if_killed "$status"
exit "$status"
