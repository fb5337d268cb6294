"""A pytest plugin (make test-gpu): one line a run in bench/gpu_tests.log, so that it is known what ran where, and when."""

import time
from pathlib import Path
from typing import Any

from files.atomic_files import write_file
from train.saving.run_folder import git_commit

LOG = Path(__file__).resolve().parents[2] / "bench" / "gpu_tests.log"
COUNTED = ("passed", "failed", "error", "skipped", "xfailed")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    import torch

    found = terminalreporter.stats
    outcome = ", ".join(f"{len(found[kind])} {kind}" for kind in COUNTED if found.get(kind)) or "no tests"
    broken = " ".join(report.nodeid for kind in ("failed", "error") for report in found.get(kind, ()))
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    fields = [
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        f"{torch.cuda.device_count()} x {card}" if torch.cuda.is_available() else card,
        f"torch {torch.__version__}",
        f"commit {git_commit(LOG.parent)}",
        outcome + (f": {broken}" if broken else ""),
    ]
    line = " | ".join(fields)
    write_file(LOG, (LOG.read_text(encoding="utf-8") if LOG.exists() else "") + line + "\n")
    terminalreporter.write_line(f"{LOG.name}: {line}")
