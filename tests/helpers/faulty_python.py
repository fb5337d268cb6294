"""In the place of python: `PYTHON="python faulty_python.py"` runs a script, and on the node FAULT_NODE something goes wrong.

FAULT is one of

    stuck               nothing happens, for ever
    argument:OLD=NEW    it gets the word NEW for OLD
    error:TEXT          the 30th micro-batch raises RuntimeError(TEXT)
    memory:TEXT         the 30th micro-batch raises torch.OutOfMemoryError(TEXT)
    sample              the 30th sample that is read is broken
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any

CALLS = 30


def failing(function: Callable[..., Any], error: Callable[[], Exception]) -> Callable[..., Any]:
    calls = 0

    def replacement(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == CALLS:
            raise error()
        return function(*arguments, **named)

    return replacement


def arrange(kind: str, text: str) -> None:
    if kind == "stuck":
        time.sleep(3600)
    elif kind == "argument":
        old, new = text.split("=")
        sys.argv[:] = [new if word == old else word for word in sys.argv]
    elif kind == "sample":
        from train.data.sample import BrokenSample
        from train.data.shard_dataset import ShardDataset

        error = BrokenSample("sample 000007 of train-000000.tar: cut off")
        ShardDataset.read = failing(ShardDataset.read, lambda: error)  # type: ignore[method-assign]
    else:
        import torch

        from train.watching.loss_watch import LossWatch

        kind_of_error = torch.OutOfMemoryError if kind == "memory" else RuntimeError
        LossWatch.saw = failing(LossWatch.saw, lambda: kind_of_error(text))  # type: ignore[method-assign]


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    if os.environ["SLURMD_NODENAME"] == os.environ.get("FAULT_NODE"):
        arrange(*os.environ["FAULT"].partition(":")[::2])
    runpy.run_path(sys.argv[0], run_name="__main__")
