"""Two launches on one port: one line that says what to do."""

import os
import socket
import subprocess
import sys

from tests.helpers.training_run import ROOT


def test_a_port_that_is_taken_is_one_line() -> None:
    """Rank 0 of two, whose port another program listens on."""
    code = "from train.process.ranks import join_process_group\n"
    code += "try: join_process_group()\nexcept OSError as error: print('refused:', error)"
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | ranks | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
    assert f"refused: port {port} of 127.0.0.1 is taken, by another run perhaps" in done.stdout, (
        done.stdout + done.stderr
    )
