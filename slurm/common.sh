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
    # A bar redraws its line, which fills a log file
    export TQDM_MININTERVAL="${TQDM_MININTERVAL:-60}"
    export HF_HUB_DISABLE_PROGRESS_BARS="${HF_HUB_DISABLE_PROGRESS_BARS:-1}"
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

# put_back: the job goes into the queue again under its own number. False, with a line that says why, where Slurm refuses.
put_back() {
    local answer
    if answer="$(scontrol requeue "$SLURM_JOB_ID" 2>&1)"; then
        return 0
    fi
    echo "job $SLURM_JOB_ID: Slurm doesn't put it back (${answer:-no reason given}): submit the same command again," \
        "or beforehand with --dependency=singleton as often as it will take"
    return 1
}
