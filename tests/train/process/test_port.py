"""Two launches on one port: one line that says what to do; under the job script, which takes another, a start again."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.helpers.training_run import ROOT

CODE = """
from train.process.first_error import rank_was_lost
from train.process.ranks import join_process_group
try:
    join_process_group()
except OSError as error:
    print("refused:", error)
except RuntimeError as error:
    print("start again:", rank_was_lost(error))
"""


def join_on_a_taken_port(**variables: str) -> tuple[str, str]:
    """The port, and what rank 0 of two says, on whose port another program listens."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | ranks | {"PYTHONPATH": str(ROOT)} | variables
        command = [sys.executable, "-c", CODE]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return port, done.stdout + done.stderr


def test_a_port_that_is_taken_is_one_line() -> None:
    port, said = join_on_a_taken_port()
    assert f"refused: port {port} of 127.0.0.1 is taken, by another run perhaps" in said, said


def test_under_the_job_script_the_next_start_takes_another(tmp_path: Path) -> None:
    _, said = join_on_a_taken_port(QWEN_LORA_ATTEMPT=str(tmp_path))
    assert "start again: True" in said, said
