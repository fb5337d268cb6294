"""`--checkpoint_minutes`: when a checkpoint is due by the time that has passed, however long steps take."""

import time


class CheckpointClock:
    """Minutes since the last checkpoint, or the start, on a clock that nobody can set. 0 minutes: never due."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60.0 * minutes
        self.restart()

    def restart(self) -> None:
        """A checkpoint was written."""
        self._since = time.monotonic()

    def is_due(self) -> bool:
        return 0 < self.seconds <= time.monotonic() - self._since
