"""bench/watching_cost.py and bench/mask_cost.py on a tiny model: on and off in turns, and the numbers are there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import watching_cost

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("script", ["watching_cost", "mask_cost"])
def test_the_script_runs(tmp_path: Path, script: str) -> None:
    command = [sys.executable, str(ROOT / "bench" / f"{script}.py"), "--tiny", "--steps", "16", "--log_steps", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "cost.json"), "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=250,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "cost.json").read_text())
    assert [block["on"] for block in found["blocks"]] == [True, False, False, True] * 2
    assert found["steps on / off"] == "8 / 8" and found["median seconds a step, on"] > 0
    host = found["the host's own work, seconds a step"]
    assert 0 < host < found["median seconds a step, on"] if script == "watching_cost" else host == 0
    assert not list(tmp_path.glob("watching_cost_*"))


def test_the_comparison() -> None:
    blocks = [{"on": on, "seconds": 0.202 if on else 0.2} for on in watching_cost.TURNS * 3]
    found = watching_cost.compare(blocks, 0.0004, 10)
    assert abs(found["added, medians, %"] - 1) < 1e-9 and abs(found["the same in % of a step"] - 0.2) < 1e-9
