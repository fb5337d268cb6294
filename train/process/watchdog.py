"""A thread beside the training: gives this rank's sign of life, and ends the rank when the others are gone or nothing moves.

    watchdog = Watchdog(peers)
    with watchdog.limited(JOINING, 180): …
    watchdog.stepped()                          # after each optimizer step: from now on the next one is waited for
    with watchdog.longer("sampling"): …         # what may take long

A collective whose partner is stuck waits in C++ for ever or for the half hour of torch's own limits, and raises nothing that
Python code could catch before. So the thread leaves by os._exit, after it has written this rank's stack and, for the job,
who has fallen silent (first_error.py). Where even a thread can't run (a C function that keeps the interpreter's lock),
faulthandler's timer, which needs no lock, writes the stack; the missing sign of life makes the others, or the job script,
end this rank.

A process that was stopped as a whole (`scontrol suspend`, a laptop's lid) finds when it goes on that all its time limits are
over, and that the others have given no sign for as long. Time during which this thread itself didn't run counts for nothing.
"""

import faulthandler
import math
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from files.folder_lock import release_all
from train.config.train_config import TrainConfig
from train.process.exit_codes import RANK_LOST
from train.process.first_error import read_first, silence_of, tell_first
from train.process.peers import Peers

JOINING = "joining the process group"
BEAT_SECONDS = 1.0
GRACE_SECONDS = 3.0  # from the first error of another rank till this one is ended: it may be leaving by itself
SILENT_SECONDS = 60.0  # another rank without a sign; a process may keep its threads waiting for a while
START_SECONDS = 3600.0  # imports, weights, trial steps
STOPPED_SECONDS = 10.0  # between two beats: then this process was stopped meanwhile
LONG_SECONDS = 3600.0  # sample images, validation, saving
WARM_UP_STEPS = 3  # they compile and capture
WARM_UP_SECONDS = 1800.0
LEAST_STEP_SECONDS = 600.0  # a new shape of a batch may be compiled for, a slow server waited for
TIMES_MEDIAN = 10
TOLD_SECONDS = 60.0  # of waiting for data


class Watchdog:
    """See the module. Without `peers` only this rank's own standstill is seen.

    Args:
        step_seconds: limit of an optimizer step; None: ten times the median of the last ones, at least ten minutes.
        leave: ends the process; for tests.
    """

    def __init__(
        self,
        peers: Peers | None,
        step_seconds: float | None = None,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self.peers, self.step_seconds, self._leave = peers, step_seconds, leave
        self._what, self._deadline = "starting", time.monotonic() + START_SECONDS
        self._durations: deque[float] = deque(maxlen=51)
        self._steps, self._last_step = 0, 0.0
        self._ended = threading.Event()
        self._asked = self._told = False
        self._waits_for, self._waiting_since = "", 0.0
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @classmethod
    def from_config(cls, config: TrainConfig) -> "Watchdog":
        return cls(Peers.from_environment(), config.step_timeout)

    # ── what the training says ────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, what: str, seconds: float) -> None:
        """From now on `what` is done, for so many seconds at most."""
        self._what, self._deadline = what, time.monotonic() + seconds

    @contextmanager
    def limited(self, what: str, seconds: float) -> Iterator[None]:
        """What happens inside takes so many seconds at most; then weights are loaded."""
        self.begin(what, seconds)
        yield
        self.begin("loading", START_SECONDS)

    def stepped(self) -> None:
        """An optimizer step is done, the next one begins."""
        now = time.monotonic()
        if self._steps >= WARM_UP_STEPS:
            self._durations.append(now - self._last_step)
        self._steps, self._last_step = self._steps + 1, now
        self.begin(f"optimizer step {self._steps + 1} of this start", self.step_limit())

    def step_limit(self) -> float:
        """Seconds that the next step may take."""
        if self._steps < WARM_UP_STEPS or (self.step_seconds is None and not self._durations):
            return WARM_UP_SECONDS
        if self.step_seconds is not None:
            return self.step_seconds
        return max(LEAST_STEP_SECONDS, TIMES_MEDIAN * statistics.median(self._durations))

    @contextmanager
    def longer(self, what: str) -> Iterator[None]:
        """What happens inside is known to take long on some rank, and counts for no step."""
        self.begin(what, LONG_SECONDS)
        yield
        self._last_step = time.monotonic()
        self.begin(f"optimizer step {self._steps + 1} of this start", self.step_limit())

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """What happens inside waits for `what`: said once where it takes long, since nothing else shows it."""
        self._waiting_since, self._waits_for = time.monotonic(), what
        try:
            yield
        finally:
            self._waits_for = ""

    def _tell_of_waiting(self) -> None:
        if self._waits_for and not self._told and time.monotonic() - self._waiting_since > TOLD_SECONDS:
            self._told = True
            rank = os.environ.get("RANK", "0")
            with suppress(OSError, ValueError):
                print(
                    f"warning: rank {rank} has waited {TOLD_SECONDS:.0f} s for {self._waits_for} (said once)",
                    file=sys.stderr,
                )

    def checkpointed(self, step: int, path: Path) -> None:
        """Tell the job script of a new checkpoint (rank 0 does)."""
        if self.peers is not None and self.peers.rank == 0:
            self.peers.progress(step, path)

    def failed(self, code: int, reason: str) -> None:
        """For the job: this rank ends with `code`, as all will."""
        if self.peers is not None:
            tell_first(self.peers, code, reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error the thread stays where other ranks can be waited for: interpreters hang in their exit, too."""
        if self.peers is not None and error is not None:
            return
        self._ended.set()
        self._thread.join(timeout=5)
        if self.peers is not None:
            faulthandler.cancel_dump_traceback_later()

    # ── the thread ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _watch(self) -> None:
        error_since: float | None = None
        went_on, last = -math.inf, time.monotonic()
        while not self._ended.wait(BEAT_SECONDS):
            now, before = time.monotonic(), last
            last = now
            if now - before > STOPPED_SECONDS:
                went_on = now
                self._deadline += now - before
            left = self._deadline - now
            self._tell_of_waiting()
            if self.peers is not None:
                faulthandler.dump_traceback_later(max(left, 0) + 120, file=2)
                self.peers.beat()
                with suppress(OSError):
                    if self.peers.superseded():
                        self._go(
                            RANK_LOST, "this job was started anew elsewhere: a process of its past leaves", stack=False
                        )
                        return
                    listens = callable(signal.getsignal(signal.SIGUSR1))  # else nobody would hear it yet
                    if listens and not self._asked and self.peers.asked_to_leave():
                        self._asked = True
                        os.kill(os.getpid(), signal.SIGUSR1)
                    first = read_first(self.peers)
                    if first is not None:
                        error_since = error_since or time.monotonic()
                        if time.monotonic() - error_since > GRACE_SECONDS:
                            self._go(first.code, "", stack=first.code == RANK_LOST)
                            return
                    elif (seconds := self._silence_allowed(now - went_on)) and (
                        silent := self.peers.silent(seconds, self.peers.neighbors())
                    ):
                        tell_first(self.peers, RANK_LOST, silence_of(self.peers, silent), silent[0])
            if left < 0:
                self._standstill()

    def _silence_allowed(self, awake: float) -> float | None:
        """Seconds without a sign of another rank that end the run; None before all have been there, or may be awake again."""
        if self._what in ("starting", JOINING) or awake < SILENT_SECONDS:
            return None
        if self._steps == 0 or self.step_seconds is None:
            return SILENT_SECONDS
        return min(SILENT_SECONDS, max(self.step_seconds, 10 * BEAT_SECONDS))

    def _standstill(self) -> None:
        """Nothing has moved for too long: name who is silent, if anybody is, else this rank's place."""
        what = f"{self._what} took longer than allowed"
        who = None
        if self.peers is not None:
            with suppress(OSError):
                if silent := self.peers.silent(10 * BEAT_SECONDS):
                    what, who = f"{what}; {silence_of(self.peers, silent)}", silent[0]
            tell_first(self.peers, RANK_LOST, what, who)
        self._go(RANK_LOST, what, stack=True)

    def _go(self, code: int, text: str, stack: bool) -> None:
        rank = "" if self.peers is None else f" ({self.peers.named(self.peers.rank)})"
        with suppress(OSError, ValueError):
            if text:
                print(f"error: {text}{rank}", file=sys.stderr)
            frame = sys._current_frames().get(self._main or 0)
            if stack and frame is not None:
                print(f"where this rank stood{rank}:", file=sys.stderr)
                sys.stderr.writelines(traceback.format_stack(frame)[-8:])
            sys.stderr.flush()
            sys.stdout.flush()
        release_all()
        self._leave(code)
