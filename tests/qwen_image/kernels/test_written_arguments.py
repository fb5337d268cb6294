"""What torch's compiler takes for written by a kernel: it copies all of that before the kernel runs."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
OUTPUTS = ["key", "query", "scales", "value"]
GRADIENTS = ["grad_image", "grad_text"]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: `make test-kernels`")
def test_only_outputs_count_as_written():
    """By following addresses back to arguments, through a call to all of its arguments: shared functions can spoil it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.written_arguments"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "joint_kernels.forward_kernel": [OUTPUTS] * 4,
        "joint_kernels.backward_kernel": [GRADIENTS] * 4,
        "low_rank_kernels.forward_kernel": [OUTPUTS] * 4,
        "low_rank_kernels.backward_kernel": [[*GRADIENTS, "of_image_factors", "of_text_factors"]] * 4,
        "gelu_kernels.gelu_kernel": [["scales", "values"]],
        "gelu_kernels.gelu_gradient_kernel": [["scales", "values"]],
    }
