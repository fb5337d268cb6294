"""Leave in good order when asked to: SIGTERM, SIGUSR1 (schedulers), SIGINT (Ctrl-C), SIGHUP (the terminal is closed).

    preemption = Preemption()                       # after the process group exists
    …what comes before the first step: a signal raises AskedToLeave at once, there is nothing to save…
    preemption.begin()
    for step in …:
        batch = preemption.receive(batches)         # a signal ends the wait for data, after GRACE_SECONDS, on all ranks
        …one optimizer step on all ranks…
        agreed = preemption.agreed(due)             # the same on every rank at the same step
        if agreed >= Agreed.CHECKPOINT:
            …save a checkpoint…
        if agreed >= Agreed.LEAVE:
            return preemption.exit_code(agreed)     # 85, or 130 after Ctrl-C

The same signal once more (not SIGUSR1, a notice that schedulers repeat), or Ctrl-C after any, ends the process at once.
What was ignored at the start stays ignored
(`nohup` does that with SIGHUP, a shell's `&` with SIGINT). A rank whose launcher has ended leaves in the same way.
Slurm: `#SBATCH --signal=USR1@300`, and `scontrol requeue` on exit code 85.

Under a launcher: send the signal to the ranks, or to the whole process group, as `scancel`, `timeout` and a terminal do.
Told with the group, `deepspeed` and `torchrun` end ranks that need more than 30 s to save, and exit with codes of their own
(1 or 143); the checkpoint is there all the same. `deepspeed` itself ends at Ctrl-C with a traceback, before its ranks do.
"""

import enum
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

from train.process.exit_codes import BAD_INPUT, INTERRUPTED, PREEMPTED
from train.process.launchers import LAUNCHERS, words
from train.process.peers import Peers

Item = TypeVar("Item")

NAMES = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGUSR1: "SIGUSR1",
    signal.SIGINT: "Ctrl-C",
    signal.SIGHUP: "hang-up (SIGHUP)",
}
ECHO_SECONDS = 1.0  # signals so close together are one: a launcher passes on to its ranks what the whole group was sent
GRACE_SECONDS = 10.0  # for data that a rank waits for when it is asked to leave; a remote that is dead may take minutes
MEET_SECONDS = 10.0  # more, for other ranks that wait for theirs; launchers kill after 30


def how_to_stop() -> str:
    """For people: what ends this run with a checkpoint; under slurm/qwen_lora.sh there is no terminal for a Ctrl-C."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or Peers.from_environment() is None:
        return "Ctrl-C saves and ends; the same command goes on"
    return f"scancel --signal=USR1 {job} saves and puts the job back into the queue, scancel {job} ends it there"


class Agreed(enum.IntEnum):
    """What all ranks do after an optimizer step; the largest that one of them wants."""

    GO_ON = 0
    CHECKPOINT = 1
    LEAVE = 2
    INTERRUPTED = 3
    NO_DATA = 4

    @property
    def exit_code(self) -> int:
        assert self >= Agreed.LEAVE
        return {Agreed.INTERRUPTED: INTERRUPTED, Agreed.NO_DATA: BAD_INPUT}.get(self, PREEMPTED)


class AskedToLeave(KeyboardInterrupt):
    """A signal outside of a step, where nothing need be waited for.

    Attributes:
        agreed: LEAVE or INTERRUPTED; the text is the reason.
        together: all ranks raise it, before the same step: they can save what the steps before it have made.
        waits: other ranks wait for data and don't leave: nothing can be saved.
    """

    def __init__(self, agreed: Agreed, reason: str, together: bool = False, waits: bool = False) -> None:
        super().__init__(reason)
        self.agreed, self.together, self.waits = agreed, together, waits


class NoData(OSError):
    """A rank can't read its next batch (a dead server, a broken sample that is to stop the run); the text is that rank's error.

    All ranks raise it, before the same step: they can save what the steps before it have made.
    """


class Preemption:
    """The flag, and the ranks' agreement on it.

    The agreement is an all_reduce(MAX) of one byte over gloo, started at one step and read at the next: it costs the
    loop nothing and never waits for the device; the run leaves one optimizer step later than it could.

    Attributes:
        signal: the first one that this rank received; 0 for none.
        reason: who asked, for people; empty where it was another rank.
    """

    def __init__(self) -> None:
        self.signal, self.reason = 0, ""
        self._received_at = 0.0
        self._begun = self._waiting = self._leaving = self._out_of_patience = False
        self._process = os.getpid()
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._is_main = self._group is None or dist.get_rank() == 0
        self._flag = torch.zeros(1, dtype=torch.uint8)
        self._pending: dist.Work | None = None
        for number in NAMES:
            # SIGUSR1: slurm/rank.sh has it ignored until here, so that it kills nobody during the imports
            if number == signal.SIGUSR1 or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._received)
        LAUNCHERS.begin()
        LAUNCHERS.gone = self._launcher_gone

    def begin(self) -> None:
        """From here on a signal waits for the end of the step. Call after all ranks have met."""
        self._begun = True

    def receive(self, batches: Iterator[Item]) -> Item:
        """The next of `batches`, once every rank has its own: then none begins a step that another one doesn't.

        Raises AskedToLeave where a rank that is asked to leave has waited GRACE_SECONDS in vain, and NoData where one has
        met an error: on all ranks together.
        """
        wanted, received, error = Agreed.GO_ON, [], ""
        try:
            with self._waiting_for_data():
                received.append(next(batches))
        except AskedToLeave as asked:
            wanted = asked.agreed
        except (ValueError, OSError) as failed:
            wanted, error = Agreed.NO_DATA, str(failed)
        agreed = self._most_wanted(wanted)
        if agreed == Agreed.NO_DATA:
            raise NoData(self._first_of(error))
        if agreed >= Agreed.LEAVE:
            raise AskedToLeave(agreed, self.reason, together=True)
        return received[0]

    def _most_wanted(self, wanted: Agreed) -> Agreed:
        """The largest of all ranks' answers; signals are heard meanwhile. Fractions of a millisecond when all are there."""
        if self._group is None or dist.get_world_size() == 1:
            return wanted
        flag = torch.tensor([wanted], dtype=torch.uint8)
        work, pause = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), 2e-5
        while not work.is_completed():
            if self.signal and time.monotonic() - self._received_at > GRACE_SECONDS + MEET_SECONDS:
                raise AskedToLeave(self._wanted(), self.reason, waits=True)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        work.wait()  # raises what went wrong
        return Agreed(int(flag.item()))

    def _first_of(self, error: str) -> str:
        """The error of the first rank that has one; a collective."""
        if self._group is None or dist.get_world_size() == 1:
            return error
        errors = [""] * dist.get_world_size()
        dist.all_gather_object(errors, error, group=self._group)
        rank, first = next((rank, error) for rank, error in enumerate(errors) if error)
        return f"{first} (rank {rank})" if rank else first

    @contextmanager
    def _waiting_for_data(self) -> Iterator[None]:
        """Inside, a rank that is asked to leave, or was, waits GRACE_SECONDS at most, then raises AskedToLeave."""
        self._waiting = True
        timer = self._be_patient() if self.signal else None
        try:
            yield
        finally:
            self._waiting = False
            if timer is not None:
                timer.cancel()

    def agreed(self, checkpoint_due: bool = False) -> Agreed:
        """Call once an optimizer step on every rank: what was wanted most, on some rank, one call ago."""
        wanted = self._wanted() if self.signal else Agreed.CHECKPOINT if checkpoint_due else Agreed.GO_ON
        if self._group is None:
            return wanted
        agreed = Agreed.GO_ON
        if self._pending is not None:
            self._pending.wait()
            agreed = Agreed(int(self._flag.item()))
        self._flag = torch.tensor([wanted], dtype=torch.uint8)
        self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def end(self) -> None:
        """All is saved: a SIGTERM from a launcher, which has seen another rank end, cuts nothing short any more."""
        self._leaving = True
        if not self.reason:  # another rank asked; here the same may not have been seen yet
            gone = LAUNCHERS.ended()
            self.reason = words(gone) if gone else ""

    def _wanted(self) -> Agreed:
        return Agreed.INTERRUPTED if self.signal == signal.SIGINT else Agreed.LEAVE

    def _received(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked worker of the data loader got it too; its parent decides
        if not self.signal:
            self.signal, self._received_at = number, time.monotonic()
            self.reason = self.reason or NAMES[signal.Signals(number)]
            if not self._begun:
                raise AskedToLeave(self._wanted(), self.reason)
            self._tell()
            if self._waiting:
                self._be_patient()
        elif self._out_of_patience:  # from the timer
            self._out_of_patience = False
            if self._waiting:
                raise AskedToLeave(self._wanted(), self.reason)
        elif self._is_second(number):
            os._exit(128 + number)

    def _is_second(self, number: int) -> bool:
        """No echo of the first, and no SIGTERM that follows another by itself: Slurm's after SIGUSR1, a launcher's."""
        late = time.monotonic() - self._received_at > ECHO_SECONDS
        if number == signal.SIGUSR1:  # a notice, which schedulers repeat
            return False
        return late and (number == signal.SIGINT or (number == self.signal and not self._leaving))

    def _tell(self) -> None:
        """At once, on rank 0, past Python's streams: one of them may be in use where the signal came."""
        if self._is_main:
            with suppress(OSError):
                os.write(2, f"\n{self.reason}: saving a checkpoint after this step; once more ends at once\n".encode())

    def _be_patient(self) -> threading.Timer:
        """The first signal comes again when the patience is at its end: nothing else interrupts a wait."""

        def over() -> None:
            if self._waiting:
                self._out_of_patience = True
                signal.pthread_kill(threading.main_thread().ident or 0, self.signal)

        timer = threading.Timer(GRACE_SECONDS, over)
        timer.daemon = True
        timer.start()
        return timer

    def _launcher_gone(self, launcher: psutil.Process) -> None:
        if not self.signal and not self._leaving:
            self.reason = words(launcher)
            os.kill(self._process, signal.SIGTERM)
