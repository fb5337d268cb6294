#!/bin/bash
# One task of a job: rank.sh command ... It tells the command its rank as torch's launchers do. Under a job script that named
# a folder for this start (QWEN_LORA_ATTEMPT) it also notes the node, keeps a log for each node, and says what killed it.
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
folder="${QWEN_LORA_ATTEMPT:-}"
if [[ -z $folder ]]; then
    exec "$@"
fi

node="${SLURMD_NODENAME:-$(hostname)}"
echo "$node" >"$folder/rank-$RANK"
log="${folder%/*}/$node.log"
# Everything goes to the node's log, behind the rank; what rank 0 says to the job's own as well. Signals are the command's.
both() {
    trap '' USR1 USR2 TERM INT HUP
    if ((RANK == 0)); then
        exec tee >(exec sed -u "s/^/$RANK: /" >>"$log")
    fi
    exec sed -u "s/^/$RANK: /" >>"$log"
}
trap : USR2 TERM INT HUP # heard by the command, which gets them from Slurm too; this shell stays to tell its end
trap ': >"${folder%/*}/leave"' USR1
# Until the command listens to it, a notice to leave must not kill it; the file is what it finds afterwards.
(trap '' USR1 && exec "$@") > >(both) 2>&1 &
command=$!
while :; do
    wait "$command" 2>/dev/null # bash's own word on a killed one
    status=$?
    kill -0 "$command" 2>/dev/null || break # else a signal has ended the wait
done
if ((status > 125)) && [[ ! -e $folder/first_error ]]; then
    number=$((status - 128)) code=75
    if ((status < 128)); then
        code=2 why="can't run ${*:1:2}: PYTHON=/path/to/python sbatch ..., where all nodes see it"
    else
        why="killed by signal $number ($(kill -l "$number"))"
        ((number == 9)) && why+=": out of host memory (sacct -j $SLURM_JOB_ID -o MaxRSS, dmesg), or by hand"
    fi
    draft="$folder/.first_error-$RANK-$$"
    printf '%s\n%s\n%s\n' "$code" "rank $RANK on node $node" "$why" >"$draft"
    ln "$draft" "$folder/first_error" 2>/dev/null
    rm -f "$draft"
fi
exit "$status"
