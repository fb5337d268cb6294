"""Exit codes of train_lora.py, for launchers and job scripts."""

DONE = 0
RANK_LOST = 1  # another one has ended
BAD_INPUT = 2
NOT_FINITE = 3  # loss or gradient
OUT_OF_MEMORY = 4  # of the GPU
PREEMPTED = 85  # the run was asked to leave and has saved a checkpoint; start it again to go on
INTERRUPTED = 130  # likewise by Ctrl-C: 128 + SIGINT, as shells have it, so that a loop that restarts 85 ends
