"""A progress bar with images a second and failures so far."""

from __future__ import annotations

import sys
from typing import Any, Self


class Progress:
    """Counts images on standard error: a moving bar on a terminal, a line every 30 s in a log file."""

    def __init__(self, name: str, total: int | None) -> None:
        from tqdm import tqdm

        interval = 0.5 if sys.stderr.isatty() else 30.0
        self._bar: Any = tqdm(
            total=total, desc=name, unit="img", mininterval=interval, maxinterval=interval, leave=True
        )
        self.failed_before = 0  # in shards that are done

    def update(self, count: int) -> None:
        self._bar.update(count)

    def failed(self, count: int) -> None:
        """Failures so far of the shard at work."""
        if total := self.failed_before + count:
            self._bar.set_postfix_str(f"{total} failed", refresh=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
