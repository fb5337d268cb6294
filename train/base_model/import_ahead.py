"""Modules that are needed later, imported while something else waits for disks and devices."""

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# A thread that imports keeps Python to itself for so long at a time; with Python's own 5 ms every other one that comes back
# from the disk or the GPU would wait as long.
SWITCH_SECONDS = 1e-4


@contextmanager
def import_ahead(*modules: str) -> Iterator[None]:
    """Inside, another thread imports `modules`, in this order; what can't be imported is left to whoever needs it."""

    def work() -> None:
        for module in modules:
            with suppress(Exception):
                importlib.import_module(module)

    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    thread = threading.Thread(target=work, name="import ahead", daemon=True)
    thread.start()
    try:
        yield
        thread.join()
    finally:
        sys.setswitchinterval(before)
