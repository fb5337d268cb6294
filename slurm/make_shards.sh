#!/bin/bash
# Pack images into shards on a Slurm cluster, one array task a part of the shards, from the root directory of the project:
#
#   python data_prep/make_shards.py --dataset_base_path PHOTOS --output_path SHARDS --plan_only     # once, minutes
#   sbatch --array=0-15 slurm/make_shards.sh --dataset_base_path PHOTOS --output_path SHARDS
#   sbatch --array=0-15%4 --cpus-per-task=32 slurm/make_shards.sh --dataset_base_path PHOTOS --output_path SHARDS
#
# Give the same flags each time. Without the first line every task makes the plan itself: they agree, but all of them read
# every image's header. The task that ends last writes the manifest. A task that was killed, or whose node failed,
# goes back into the queue by itself and on after its last finished shard; after a time limit submit the array again: finished shards are skipped.
# PYTHON names another interpreter than .venv/bin/python.

#SBATCH --job-name=make_shards
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

set -euo pipefail

cd "$SLURM_SUBMIT_DIR" # sbatch runs a copy of this script in a spool folder
if [[ ! -f slurm/common.sh ]]; then
    echo "error: no slurm/common.sh in $SLURM_SUBMIT_DIR: submit from the root directory of the project" >&2
    exit 2
fi
# shellcheck source=slurm/common.sh
source slurm/common.sh
choose_python
if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
    echo "error: not an array job: sbatch --array=0-15 slurm/make_shards.sh ..." >&2
    exit 2
fi

# Counted from the first task, so that --array=1-16 works too; steps and lists of ids (0-15:2, 1,5) don't
if ((${SLURM_ARRAY_TASK_MAX:?} - ${SLURM_ARRAY_TASK_MIN:?} + 1 != ${SLURM_ARRAY_TASK_COUNT:?})); then
    echo "error: array ids must follow each other, as in --array=0-15; finished shards are skipped anyway" >&2
    exit 2
fi
status=0
srun --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${python[@]}" data_prep/make_shards.py \
    --task_id "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))" --num_tasks "$SLURM_ARRAY_TASK_COUNT" \
    --num_workers "${SLURM_CPUS_PER_TASK:-1}" "$@" || status=$?
back_if_killed "$status"
exit "$status"
