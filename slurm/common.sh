# What the job scripts of this folder share; they source it, from the root directory of the project.
# shellcheck shell=bash
# shellcheck disable=SC2034 # the scripts read what is set here

# Sets the array python: PYTHON where that is given (several words are a command, a container's say), else the project's
# environment, else what the PATH has. Its programs find the project's packages, installed or not.
choose_python() {
    if [[ -n ${PYTHON:-} ]] && command -v "$PYTHON" >/dev/null; then
        python=("$PYTHON") # one program, blanks in its path or not
    elif [[ -n ${PYTHON:-} ]]; then
        read -r -a python <<<"$PYTHON"
    elif [[ -x .venv/bin/python ]]; then
        python=(.venv/bin/python)
    elif command -v python >/dev/null; then
        python=(python)
    else
        echo "error: no .venv in $PWD and no python on the PATH: run make setup here, or PYTHON=/path/to/python sbatch ..." >&2
        exit 2
    fi
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    check_python
    # A bar redraws its line, which fills a log file
    export TQDM_MININTERVAL="${TQDM_MININTERVAL:-60}"
    export HF_HUB_DISABLE_PROGRESS_BARS="${HF_HUB_DISABLE_PROGRESS_BARS:-1}"
}

# One line, once, for an interpreter that can't be run or has no torch: a task a GPU would say so as often. Where srun starts
# a container it lies in there, and each task says it for itself. A file system that doesn't answer is found out later.
check_python() {
    [[ ${QWEN_LORA_SRUN_FLAGS:-} != *container* ]] || return 0
    local status=0
    timeout "${CHECK_SECONDS:-60}" "${python[@]}" -c 'import importlib.util as u, sys; sys.exit(93 * any(u.find_spec(name) is None for name in sys.argv[1:]))' \
        torch deepspeed psutil webdataset 2>/dev/null || status=$?
    case $status in
        93) echo "error: ${python[*]} lacks torch, deepspeed or other packages: run make setup in $PWD, or PYTHON=/path/to/python sbatch ..." ;;
        126 | 127) echo "error: ${python[*]} can't be run on $(hostname): PYTHON=/path/to/python sbatch ..., where all nodes see it" ;;
        *) return 0 ;;
    esac >&2
    exit 2
}

# Refuses a job whose tasks and GPUs on a node differ in number: each task takes one.
one_gpu_a_task() {
    local tasks="${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}" gpus="${SLURM_GPUS_ON_NODE:-0}"
    if ((gpus > 0 && gpus != tasks)); then
        echo "error: $tasks tasks but $gpus GPUs a node: make --ntasks-per-node and --gpus-per-node equal" >&2
        exit 2
    fi
}

# ranks [srun's flags] -- command ... & : srun, in the place of this subshell, of a command that finds its rank where torch's launchers put it.
# --gpu-bind=none: each task sees all GPUs of its node and takes number LOCAL_RANK, as NCCL's peer access needs.
# --export=ALL: with sbatch --export=NONE srun would hand on nothing of what this script sets.
# QWEN_LORA_SRUN_FLAGS: more flags, such as --container-image=... of pyxis.
ranks() {
    local flags=() more=()
    while [[ $1 != -- ]]; do
        flags+=("$1")
        shift
    done
    shift
    read -r -a more <<<"${QWEN_LORA_SRUN_FLAGS:-}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it over from sbatch
    exec srun --gpu-bind=none --export=ALL ${flags[@]+"${flags[@]}"} ${more[@]+"${more[@]}"} bash "$PWD/slurm/rank.sh" "$@"
}

# For scontrol: of an array this task alone, whose SLURM_JOB_ID may be the whole array's.
this_job() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# put_back: the job goes into the queue again under its own number. False, with a line that says why, where Slurm refuses.
put_back() {
    local answer
    if answer="$(scontrol requeue "$(this_job)" 2>&1)"; then
        return 0
    fi
    echo "job $SLURM_JOB_ID: Slurm doesn't put it back (${answer:-no reason given}): submit the same command again," \
        "or beforehand with --dependency=singleton as often as it will take"
    return 1
}

# Whether this shell is still the job's: a node that was cut off and comes back finds its job at work elsewhere; one that was
# cancelled (scancel), is out of time or already back in the queue (pre-emption) must not be put there again.
still_ours() {
    local now
    now="$(scontrol show job "$(this_job)" 2>/dev/null || true)"
    [[ -z $now || ($now == *" Restarts=${SLURM_RESTART_COUNT:-0} "* && $now == *"JobState=RUNNING "*) ]]
}

# back_if_killed status: what goes on after the last finished shard is put back when it was killed (out of host memory, say),
# RESTARTS times at most.
back_if_killed() {
    if (($1 > 128 && ${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-3})) && still_ours && put_back; then
        echo "job $SLURM_JOB_ID: killed by signal $(($1 - 128)), out of host memory perhaps: back in the queue" \
            "(restart $((${SLURM_RESTART_COUNT:-0} + 1)) of at most ${RESTARTS:-3})"
    fi
}
