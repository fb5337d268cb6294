"""cuBLAS's workspaces, chosen before the first product; and what compiling and capturing came to, told at the end."""

import os

import torch
import torch._dynamo.utils

from qwen_image.kernels.flash_attention import HOPPER
from train.step.flow_matching_module import FlowMatchingModule


def choose_workspaces(device: torch.device, deterministic: bool) -> None:
    """Set how much memory cuBLAS may work in, by the environment, if the user hasn't; before its first product.

    Without any it chooses kernels for Hopper whose schedule is fixed in advance. The others count tiles in that memory and
    have it zeroed before each product. PyTorch's deterministic mode insists on a workspace.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    elif device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":0:0")
        os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")


def shapes_met(module: FlowMatchingModule) -> list[str]:
    """For the end of a run: how often the compiler ran, and how many shapes have CUDA graphs."""
    compiled = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    lines = [f"{compiled} graphs compiled"] if compiled else []
    if module.graphs is not None:
        lines.append(f"CUDA graphs of {len(module.graphs.pairs)} shapes of batches")
    return lines
