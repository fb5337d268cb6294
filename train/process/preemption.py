"""Leave in good order when the scheduler says so: SIGTERM or SIGUSR1 set a flag, the loop saves and exits with 85.

    preemption = Preemption()                       # after the process group exists
    for step in …:
        …one optimizer step on all ranks…
        if preemption.agreed():                     # True on every rank at the same step, or on none
            …save a checkpoint…
            return PREEMPTED

A second signal exits at once. Slurm: `#SBATCH --signal=USR1@300`, and `scontrol requeue` on exit code 85.

Under a launcher: send the signal to the ranks, or to the whole process group, as `scancel`, `timeout` and a terminal do.
`deepspeed` told alone dies and leaves the ranks to train on. Told with the group, it and `torchrun` end ranks that need
more than 30 s to save, and exit with codes of their own (1 or 143); the checkpoint is there all the same.
"""

import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ECHO_SECONDS = 2.0  # signals so close together are one: a launcher passes on to its ranks what the whole group was sent


class Preemption:
    """The flag, and the ranks' agreement on it.

    The agreement is an all_reduce(MAX) of one byte over gloo, started at one step and read at the next: it costs the
    loop nothing and never waits for the device; the run leaves one optimizer step later than it could.
    """

    def __init__(self) -> None:
        self.signal = 0  # the first one that this rank received
        self._received_at = 0.0
        self._process = os.getpid()
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._flag = torch.zeros(1, dtype=torch.uint8)
        self._pending: dist.Work | None = None
        for number in SIGNALS:
            signal.signal(number, self._received)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked worker of the data loader got it too; its parent decides
        if not self.signal:
            self.signal, self._received_at = number, time.monotonic()
        elif time.monotonic() - self._received_at > ECHO_SECONDS:
            os._exit(128 + number)

    def agreed(self) -> bool:
        """Call once an optimizer step on every rank: whether some rank had been asked to leave one call ago."""
        if self._group is None:
            return bool(self.signal)
        leave = False
        if self._pending is not None:
            self._pending.wait()
            leave = bool(self._flag.item())
        self._flag = torch.tensor([1 if self.signal else 0], dtype=torch.uint8)
        self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return leave
