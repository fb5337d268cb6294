# What the job scripts of this folder share; they source it, from the root directory of the project.
# shellcheck shell=bash

# Sets python: PYTHON where that is given, else the project's environment, else what the PATH has.
# shellcheck disable=SC2034 # the scripts read it
choose_python() {
    python="${PYTHON:-python}"
    if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then
        python=.venv/bin/python
    fi
}

# Refuses a job whose tasks and GPUs on a node differ in number: each task takes one.
one_gpu_a_task() {
    local tasks="${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}" gpus="${SLURM_GPUS_ON_NODE:-0}"
    if ((gpus > 0 && gpus != tasks)); then
        echo "error: $tasks tasks but $gpus GPUs a node: make --ntasks-per-node and --gpus-per-node equal" >&2
        exit 2
    fi
}

# ranks [srun's flags] -- command ...: srun of a command that finds its rank where torch's launchers put it.
# --gpu-bind=none: each task sees all GPUs of its node and takes number LOCAL_RANK, as NCCL's peer access needs.
# exec: a signal goes to the command and to no shell in between.
ranks() {
    local flags=()
    while [[ $1 != -- ]]; do
        flags+=("$1")
        shift
    done
    shift
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it over from sbatch
    # shellcheck disable=SC2016 # the variables are those of each task
    srun --gpu-bind=none ${flags[@]+"${flags[@]}"} bash -c '
        export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
        exec "$@"
    ' task "$@"
}
