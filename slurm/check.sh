#!/bin/bash
# Would this job ever start, and come back? The flags of sbatch; submits nothing:
#
#   slurm/check.sh --nodes=4 --partition=gpu slurm/qwen_lora.sh run.yaml
set -uo pipefail
(($#)) || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
wrong=0
no() { echo "error: $*" && wrong=1; }

script="" partition="${SBATCH_PARTITION:-}" gpus=""
for word in "$@"; do
    case $word in
        --gpus-per-node=*) gpus="${word#*=}" ;;
        --partition=*) partition="${word#*=}" ;;
        *.sh) script="$word" && break ;;
    esac
done
[[ -f $script ]] || no "no job script among the words: give slurm/qwen_lora.sh and what sbatch gets besides"
[[ -n $gpus || ! -f $script ]] || gpus="$(sed -n 's/^#SBATCH --gpus-per-node=//p' "$script")"

if answer="$(sbatch --test-only "$@" 2>&1)"; then
    echo "$answer"
else
    no "sbatch refuses it: $answer"
fi
# sbatch takes a job for GPUs where there are none, which then waits for ever
if [[ ${gpus:-0} != 0 ]] && ! sinfo --noheader ${partition:+--partition="$partition"} --format=%G | grep -q gpu; then
    no "no node of ${partition:-any partition} has GPUs: another --partition, or --gpus-per-node=0 to train without"
fi
config="$(scontrol show config)"
value() { sed -n "s/^$1 *= *//p" <<<"$config"; }
[[ $(value JobRequeue) == 1 ]] || echo "note: JobRequeue is $(value JobRequeue): jobs come back only where they ask for it (--requeue, as this script does)"
timeout="$(value SlurmdTimeout)"
echo "note: a dead node is noticed after ${timeout:-?}; until then a job that had it waits in the queue"
if [[ -f .venv/bin/python || -n ${PYTHON:-} ]]; then
    # shellcheck source=slurm/common.sh
    source slurm/common.sh
    choose_python
    "${python[@]}" -c 'import torch, deepspeed' >/dev/null 2>&1 || no "${python[*]} has no torch or no deepspeed: run make setup"
else
    no "no .venv here: run make setup, or name a PYTHON"
fi
exit "$wrong"
