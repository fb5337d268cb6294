#!/bin/bash
# Train a LoRA on a Slurm cluster, one task a GPU, from the root directory of the project:
#
#   sbatch slurm/qwen_lora.sh run.yaml
#   sbatch --nodes=4 --time=12:00:00 slurm/qwen_lora.sh run.yaml --learning_rate 2e-4
#   sbatch --gpus-per-node=4 --ntasks-per-node=4 slurm/qwen_lora.sh --deepspeed ds_configs/zero2.json --model MODEL ...
#   sbatch --gpus-per-node=0 --ntasks-per-node=2 --cpus-per-task=1 slurm/qwen_lora.sh run.yaml      # without GPUs
#   slurm/check.sh [flags of sbatch] slurm/qwen_lora.sh run.yaml     # would it ever start?
#
# Five minutes before the time limit all ranks save a checkpoint and exit with 85; the job goes back into the queue and
# resumes. A rank that is killed, a lost or stuck node and the like start it again by themselves, here or from the queue, as
# long as there are new checkpoints (RESTARTS=3 times without one). Wrong input (2), not finite (3) and out of GPU memory (4)
# end it. The log's last lines say which node and rank failed first, why, and what to do; qwen_lora-JOB/ has a log for each
# node. PYTHON names another interpreter than .venv/bin/python, or a command of several words.

#SBATCH --job-name=qwen_lora
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# Where NCCL hangs at start or is slow (slurm/README.md says when):
# export NCCL_DEBUG=INFO                  # which network it chose
# export NCCL_SOCKET_IFNAME=ib0           # the interface between the nodes
# export NCCL_IB_HCA=mlx5_0               # which InfiniBand adapters
# export NCCL_IB_DISABLE=1                # sockets instead: tells InfiniBand's faults from others

set -euo pipefail

readonly DONE=0 BAD_INPUT=2 NOT_FINITE=3 OUT_OF_MEMORY=4 PREEMPTED=85 # as in train/process/exit_codes.py
readonly LINGER=10 # seconds from the first error until ranks that are still there are killed
readonly SILENT_MINUTES="${SILENT_MINUTES:-15}" # without a sign of any rank, imports included

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

readonly restart="${SLURM_RESTART_COUNT:-0}" folder="$PWD/qwen_lora-$SLURM_JOB_ID"
mkdir -p "$folder"
((restart)) || rm -rf "$folder"/{history,progress,start-*,*.log} # of an older job: numbers begin again some day
rm -f "$folder/leave"
QWEN_LORA_NODES="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')"
export QWEN_LORA_NODES
read -r -a nodes <<<"$QWEN_LORA_NODES"
# The address that Slurm itself uses for the first node: node names need not resolve
MASTER_ADDR="$(scontrol show node "${nodes[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
export MASTER_ADDR="${MASTER_ADDR:-${nodes[0]}}"

say() { echo "job $SLURM_JOB_ID: $*"; }

# The notice before the time limit (B: above), or scancel --full --signal=USR1. The ranks look for the file; the signal that
# srun hands on to them is faster. Where no rank is at work it is heard between two starts.
leave() {
    : >"$folder/leave"
    [[ -z ${srun:-} ]] || kill -USR1 "$srun" 2>/dev/null || true
}
trap leave USR1

# A port that is free here, on the first node; jobs that share it begin their search at different ones.
free_port() {
    local port tried
    for ((tried = 0; tried < 50; tried++)); do
        port=$((20000 + (SLURM_JOB_ID + tried * 997 + $1 * 131) % 10000))
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
    echo "$port"
}

first_error() { # code, who, why: unless a rank was faster
    local draft="$QWEN_LORA_ATTEMPT/.first_error"
    printf '%s\n' "$@" >"$draft" && ln "$draft" "$QWEN_LORA_ATTEMPT/first_error" 2>/dev/null || true
}

# Each minute: whether any rank has given a sign since the last look. They watch each other; who watches the last one?
look_for_signs() {
    ((SECONDS >= looked + 60)) || return 0
    looked=$SECONDS quiet=$((quiet + 1))
    [[ -z $(find "$QWEN_LORA_ATTEMPT" -name 'rank-*' -newer "$QWEN_LORA_ATTEMPT/looked" -print -quit) ]] || quiet=0
    : >"$QWEN_LORA_ATTEMPT/looked"
    ((quiet < SILENT_MINUTES)) || first_error 75 "all ranks" \
        "no sign for $quiet minutes: stuck, perhaps in a file system that doesn't answer (see the logs of the nodes)"
}

# What a start that no rank explains came to. Sets why, and elsewhere=1 where these nodes would not do better.
explain() {
    local rank message
    message="$(grep -m1 '^srun: \(error\|fatal\|unrecognized\)' "$QWEN_LORA_ATTEMPT/srun" 2>/dev/null || true)"
    if [[ $message =~ (unrecognized option|[Ii]nvalid.*(argument|specification|option)) ]]; then
        code=$BAD_INPUT why="$message; see QWEN_LORA_SRUN_FLAGS"
        return
    fi
    for ((rank = 0; rank < ${SLURM_NTASKS:-0}; rank++)); do
        if [[ ! -e $QWEN_LORA_ATTEMPT/rank-$rank ]]; then
            code=75 who="rank $rank on node ${nodes[rank * ${#nodes[@]} / SLURM_NTASKS]}" elsewhere=1
            why="did not start${message:+ ($message)}: the node is dead or cut off"
            return
        fi
    done
    why="the ranks ended with $status, none said why (see above, and the logs of the nodes)${message:+; $message}"
}

# One start of all ranks. Sets status (of srun), code (what it means for the job), who and why; stuck=1 where ranks could not
# be ended, elsewhere=1 where some never started.
start_ranks() {
    local number=$1 since=0 since_end=0 looked=$SECONDS quiet=0 node
    shift
    export QWEN_LORA_ATTEMPT="$folder/start-$number"
    mkdir "$QWEN_LORA_ATTEMPT"
    : >"$QWEN_LORA_ATTEMPT/looked"
    echo "start-$number" >"$folder/.current" && mv "$folder/.current" "$folder/current"
    MASTER_PORT="$(free_port "$number")"
    export MASTER_PORT
    say "start $number on $SLURM_JOB_NODELIST: ${SLURM_NTASKS:-1} ranks, which meet at $MASTER_ADDR:$MASTER_PORT"
    status=0 who="" why="" stuck=0 elsewhere=0
    ranks --wait=0 --kill-on-bad-exit=0 -- "${python[@]}" train/train_lora.py ${config[@]+"${config[@]}"} "$@" \
        2> >(trap '' USR1 USR2 TERM INT HUP && exec tee "$QWEN_LORA_ATTEMPT/srun" >&2) &
    srun=$!
    while kill -0 "$srun" 2>/dev/null; do
        sleep 1 &
        wait "$!" || true
        if [[ ! -e $QWEN_LORA_ATTEMPT/first_error ]]; then
            look_for_signs
            continue
        fi
        ((++since <= LINGER)) || { ((since_end++)) || kill_ranks KILL; }
        if ((since_end > 10)); then # a node that doesn't answer: srun would wait for it
            stuck=1
            kill -9 "$srun" 2>/dev/null || true
        fi
    done
    wait "$srun" || status=$?
    srun=""
    code=$status
    if [[ -e $QWEN_LORA_ATTEMPT/first_error ]]; then
        { read -r code && read -r who && read -r why; } <"$QWEN_LORA_ATTEMPT/first_error" || true
    elif ((status != DONE && status != PREEMPTED)); then
        explain
    fi
    for node in "${nodes[@]}"; do
        [[ -z $why ]] || echo "first error of the job: ${who:+$who: }$why" >>"$folder/$node.log"
    done
}

kill_ranks() { # signal
    local step
    for step in $(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i 2>/dev/null | grep -E '\.[0-9]+$' || true); do
        timeout 10 scancel --signal="$1" "$step" || true
    done
}

all_nodes_up() {
    local node
    for node in "${nodes[@]}"; do
        if scontrol show node "$node" | grep -Eq 'State=[A-Z+]*(\*|DOWN|FAIL|NOT_RESPONDING|DRAIN)'; then
            say "node $node is not well: $(scontrol show node "$node" | grep -o 'State=[^ ]*')"
            return 1
        fi
    done
}

# By the folders: a batch shell whose node was lost has written no line of history. Numbers never come twice, so that ranks
# of an earlier start can tell that they are of the past.
starts_so_far() { find "$folder" -maxdepth 1 -name 'start-*' | wc -l; }

step_of() { sed -n 1p "$folder/progress" 2>/dev/null || true; }

finish() { # exit code, what it came to: the last lines of the log
    local took starts
    starts="$(starts_so_far)"
    took=$((SECONDS / 3600))h$((SECONDS / 60 % 60))m$((SECONDS % 60))s
    if [[ -s $folder/progress ]]; then
        say "$2; last checkpoint: step $(step_of), run folder $(sed -n 2p "$folder/progress" | sed 's|/checkpoints/.*||')"
    else
        say "$2$( (($1 == DONE)) || echo "; there is no checkpoint of this job")"
    fi
    say "exit code $1 after $took here, $((starts - 1)) restarts so far; logs of the nodes: $folder"
    if [[ -n $why ]]; then
        echo "error: ${who:+$who: }$why"
    fi
    exit "$1"
}

# How many starts in a row brought no new checkpoint. Those that were asked to leave are no fault.
fruitless() {
    awk 'BEGIN { last = "-" } { if ($3 != last) count = 0; else if ($2 != 85) count++; last = $3 } END { print count + 0 }' \
        "$folder/history"
}

give_up_without_progress() {
    (($(fruitless) > ${RESTARTS:-3})) || return 0
    say "no new checkpoint in the last starts; number, exit code, step, duration and reason of each:"
    tail -n 6 "$folder/history"
    finish "$code" "given up after ${RESTARTS:-3} restarts without progress"
}

# A batch shell whose node was lost, or that had to go at once, has written no line for its last start.
if ((restart)) && (($(starts_so_far) > 0)) && ! grep -qs "^$(starts_so_far) " "$folder/history"; then
    code=75 why="the batch shell's node was lost, or Slurm took the job away without notice"
    step="$(step_of)"
    echo "$(starts_so_far) gone ${step:--} - $(date -u +%FT%TZ) $why" >>"$folder/history"
    give_up_without_progress
fi

while :; do
    number=$(($(starts_so_far) + 1))
    started=$SECONDS
    start_ranks "$number" "$@"
    if ((code != DONE)) && ! still_ours; then
        say "Slurm has ended this start of the job (scancel, pre-emption, a lost node); it left with $code"
        exit "$code"
    fi
    step="$(step_of)"
    echo "$number $code ${step:--} $((SECONDS - started))s $(date -u +%FT%TZ) ${who:+$who: }$why" >>"$folder/history"

    case $code in
        "$DONE") why="" && finish 0 "done" ;;
        "$BAD_INPUT") finish "$code" "wrong input, a restart would not help" ;;
        "$NOT_FINITE") finish "$code" "loss or gradient not finite, a restart would not help (docs/troubleshooting.md)" ;;
        "$OUT_OF_MEMORY") finish "$code" "out of GPU memory, a restart would not help (docs/troubleshooting.md)" ;;
    esac
    ((code == PREEMPTED)) || give_up_without_progress

    ((code == PREEMPTED)) || echo "error: ${who:+$who: }$why"
    if ((code != PREEMPTED && stuck == 0 && elsewhere == 0)) && [[ ! -e $folder/leave ]] && all_nodes_up; then
        say "starting again on the same nodes from ${step:+step }${step:-the beginning} (restart $number)"
        continue
    fi
    if put_back; then
        say "back in the queue, to go on from ${step:+step }${step:-the beginning}"
        exit "$code"
    fi
    if ((code == PREEMPTED || stuck)) || [[ -e $folder/leave ]]; then
        finish "$code" "Slurm does not take it back"
    fi
    say "starting again on the same nodes from ${step:+step }${step:-the beginning} (restart $number)"
done
