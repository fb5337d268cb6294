"""Exit codes of train_lora.py, for launchers and job scripts."""

DONE = 0
BAD_INPUT = 2
NOT_FINITE = 3  # loss or gradient
OUT_OF_MEMORY = 4  # of the GPU
RANK_LOST = 75  # another rank or its node was lost, or hangs: start again to go on (EX_TEMPFAIL of sysexits.h)
PREEMPTED = 85  # the run was asked to leave and has saved a checkpoint; start it again to go on
INTERRUPTED = 130  # likewise by Ctrl-C: 128 + SIGINT, as shells have it, so that a loop that restarts 85 ends
