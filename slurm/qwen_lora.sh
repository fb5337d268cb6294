#!/bin/bash
# Train a LoRA on a Slurm cluster, one task a GPU, from the root directory of the project:
#
#   sbatch slurm/qwen_lora.sh run.yaml
#   sbatch --nodes=4 --time=12:00:00 slurm/qwen_lora.sh run.yaml --learning_rate 2e-4
#   sbatch --gpus-per-node=4 --ntasks-per-node=4 slurm/qwen_lora.sh --deepspeed ds_configs/zero2.json --model MODEL ...
#   sbatch --gpus-per-node=0 --ntasks-per-node=2 --cpus-per-task=1 slurm/qwen_lora.sh run.yaml      # without GPUs
#
# Five minutes before the time limit every task gets SIGUSR1, saves a checkpoint and exits with 85. The job then goes
# back into the queue and resumes from the checkpoint (--resume auto, the default). PYTHON names another interpreter
# than .venv/bin/python.

#SBATCH --job-name=qwen_lora
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

readonly REQUEUE=85 # what train_lora.py exits with after a checkpoint that a signal asked for

cd "$SLURM_SUBMIT_DIR" # sbatch runs a copy of this script in a spool folder
if [[ ! -f slurm/common.sh ]]; then
    echo "error: no slurm/common.sh in $SLURM_SUBMIT_DIR: submit from the root directory of the project" >&2
    exit 2
fi
# shellcheck source=slurm/common.sh
source slurm/common.sh
choose_python
one_gpu_a_task

config=()
if (($# > 0)) && [[ $1 != -* ]]; then
    config=(--config "$1")
    shift
fi

# The address that Slurm itself uses for the first node: node names need not resolve
first_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
MASTER_ADDR="$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
export MASTER_ADDR="${MASTER_ADDR:-$first_node}"
export MASTER_PORT="$((20000 + SLURM_JOB_ID % 10000))" # jobs that share a node need different ports

# --wait: when a task dies, the others, which wait for it, are ended two minutes later.
status=0
ranks --wait=120 -- "$python" train/train_lora.py ${config[@]+"${config[@]}"} "$@" || status=$?

if ((status == REQUEUE)); then
    echo "job $SLURM_JOB_ID saved a checkpoint before it was ended: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
