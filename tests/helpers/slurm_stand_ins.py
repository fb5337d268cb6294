"""A submit folder and stand-ins for Slurm's commands, for tests of the job scripts that need no cluster."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

SLURM = Path(__file__).parents[2] / "slurm"
# Runs every task of the job one after the other, two a node.
SRUN = """#!/bin/bash
echo "$@" > "$SLURM_SUBMIT_DIR/srun_arguments"
while [[ $1 == -* ]]; do shift; done
status=0
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) "$@" || status=$?
done
exit $status
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") printf 'gpu07\\ngpu08\\n' ;;
    "show job") printf 'JobState=RUNNING Reason=None\n   Requeue=1 Restarts=0 BatchFlag=1\n' ;;
    "show node") printf 'NodeName=%s Arch=x86_64\\n   NodeAddr=10.0.0.7 NodeHostName=x\\n' "$3" ;;
    *) echo "$@" >> "$SLURM_SUBMIT_DIR/requeued" ;;
esac
"""


def submit_folder(root: Path, script: str, program: str) -> Path:
    """A project root `root / "a project"` with `program` as its file `script`, and srun and scontrol in `root / "bin"`."""
    submit = root / "a project"
    (submit / script).parent.mkdir(parents=True)
    (submit / script).write_text(program, encoding="utf-8")
    (submit / "slurm").mkdir()
    for name in ("common.sh", "rank.sh"):
        shutil.copy(SLURM / name, submit / "slurm")
    write_commands(root / "bin", srun=SRUN, scontrol=SCONTROL)
    return submit


def write_commands(folder: Path, **texts: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)


def environment(submit: Path, binaries: Path, **variables: str) -> dict[str, str]:
    """What a batch script finds set, with the stand-ins first on its PATH."""
    outside = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    return outside | {"SLURM_SUBMIT_DIR": str(submit), "PATH": path, "PYTHON": sys.executable} | variables


def two_nodes(submit: Path, **variables: str) -> dict[str, str]:
    """The environment of a batch job of 2 nodes with 2 tasks each."""
    slurm = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "4"}
    slurm |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "3", "SLURM_GPUS_ON_NODE": "2"}
    return environment(submit, submit.parent / "bin", **(slurm | variables))
