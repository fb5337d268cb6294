"""What can be wrong with a node before any weights are read: no GPU where one was given, other versions, a wrong clock."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qwen_image.free_memory import host_bytes
from train.process.first_error import OTHERS
from train.process.peers import VARIABLE

CPU_PARAMETERS = 1_000_000_000  # a larger model doesn't train on CPUs in any time that anybody has
CLOCK_SECONDS = 30.0
LEAST_TEMPORARY_BYTES = 2 << 30  # compilers and data loaders write there
LEAST_FREE_SHARE = 0.9  # of a GPU's memory, before this program takes any
LEAST_HOST_SHARE = 0.5  # of the free host memory that the best node has: others' left-overs are in the way


def gpus_were_given() -> str | None:
    """Who says that this process has a GPU to work with; None if nobody does."""
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        if os.environ.get(name, "0") not in ("", "0"):
            return f"{name} is {os.environ[name]}"
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return "the machine has NVIDIA devices in /dev"
    return None


def check_device(asked: str) -> None:
    """Raises ValueError where GPUs were given and torch sees none, unless the CPU was `asked` for, which hides them."""
    if asked == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    given = gpus_were_given()
    if given is None or torch.cuda.is_available():
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built for CPUs: install a CUDA build"
    elif visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        reason = f"CUDA_VISIBLE_DEVICES={visible!r} hides them"
    else:
        reason = f"torch {torch.__version__} (CUDA {torch.version.cuda}) can't reach the driver: see whether nvidia-smi works"
    raise ValueError(
        f"device: no GPU on {socket.gethostname()} for torch, though {given}; {reason} (--device cpu to go on without)"
    )


def check_count(ranks_here: int) -> None:
    """Raises ValueError where a node has fewer GPUs than ranks. A single one each sees may be its own (`--gpu-bind`)."""
    seen = torch.cuda.device_count()
    if 1 < seen < ranks_here:
        raise ValueError(
            f"{ranks_here} ranks on {socket.gethostname()}, but torch sees {seen} GPUs there: start one rank a GPU "
            f"(CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})"
        )


def check_interface(variable: str) -> None:
    """Raises ValueError where NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME chooses no network interface of this node.

    A list: for NCCL of beginnings of names, after `=` of whole names, after `^` of those to leave out, each with or without
    `:port`; for gloo of whole names. Their own errors (an address of family 59936) look as if another rank were lost.
    """
    asked = os.environ.get(variable, "")
    of_nccl = variable.startswith("NCCL")
    names = asked.lstrip("^=") if of_nccl else asked
    rules = asked.removesuffix(names) if of_nccl else "="
    wanted = [name.partition(":")[0].strip() for name in names.split(",") if name.strip()]
    here = [name for _, name in socket.if_nameindex()]

    def listed(name: str) -> bool:
        return any(name == one or ("=" not in rules and name.startswith(one)) for one in wanted)

    if wanted and not any(listed(name) != ("^" in rules) for name in here):
        raise ValueError(
            f"{variable}={asked} chooses no network interface of {socket.gethostname()}, which has {', '.join(here)}: "
            "name the one that connects the nodes, or leave the variable out"
        )


def check_size(device: torch.device, asked: str, model: torch.nn.Module) -> None:
    """Raises ValueError for a large model on the CPU that nobody asked for."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if device.type == "cpu" and asked != "cpu" and parameters > CPU_PARAMETERS:
        raise ValueError(
            f"device: a model of {parameters / 1e9:.1f} billion parameters would train on the CPU: torch "
            f"{torch.__version__} sees no GPU on {socket.gethostname()} (--device cpu to do it nevertheless)"
        )


@dataclass(frozen=True)
class Node:
    """What one rank finds on its node."""

    host: str
    versions: dict[str, str]
    clock: float  # seconds since the epoch
    temporary_bytes: int  # free in the folder for temporary files
    free_share: float  # of its GPU's memory; 1 without one
    host_bytes: int  # of host memory that can still be given
    start: str = ""  # of which job, where a job script says it

    @classmethod
    def here(cls, device: torch.device) -> "Node":
        versions, share = {"torch": str(torch.__version__)}, 1.0
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            free, total = torch.cuda.mem_get_info(device)
            share = free / total
            versions |= {"GPU": properties.name, "driver": _driver()}
        free_bytes = shutil.disk_usage(tempfile.gettempdir()).free
        return cls(
            socket.gethostname(), versions, time.time(), free_bytes, share, host_bytes(), os.environ.get(VARIABLE, "")
        )


def check_nodes(device: torch.device) -> list[str]:
    """Compare all ranks' nodes, a collective; returns warnings. Raises ValueError, on all ranks, for unequal versions."""
    if dist.get_world_size() == 1:
        return compare([Node.here(device)])
    dist.barrier()  # so that the clocks are read at about the same time
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, asdict(Node.here(device)))
    return compare([Node(**one) for one in found])


def compare(nodes: Sequence[Node]) -> list[str]:
    """Lines for people on what may go wrong, one a node; ValueError for what will, RuntimeError for what goes away."""
    first = nodes[0]
    for node in nodes:
        if node.start != first.start:  # two jobs share a node, and took the same port at the same moment
            raise RuntimeError(f"{OTHERS} this one ({first.start}, {node.start})")
        for name in {*first.versions, *node.versions}:
            if node.versions.get(name) != first.versions.get(name):
                raise ValueError(
                    f"{name} differs between nodes: {first.versions.get(name)} on {first.host}, {node.versions.get(name)} on "
                    f"{node.host}; give all ranks the same environment and kind of node"
                )
    lines, most = [], max(node.host_bytes for node in nodes)
    for node in nodes:
        if abs(node.clock - first.clock) > CLOCK_SECONDS:
            lines.append(
                f"warning: the clocks of {first.host} and {node.host} are {abs(node.clock - first.clock):.0f} s apart"
            )
        if node.temporary_bytes < LEAST_TEMPORARY_BYTES:
            lines.append(
                f"warning: {node.host} has {node.temporary_bytes / 1e9:.1f} GB left for temporary files (TMPDIR)"
            )
        if node.free_share < LEAST_FREE_SHARE:
            lines.append(
                f"warning: {1 - node.free_share:.0%} of a GPU's memory on {node.host} is taken by other programs"
            )
        if node.host_bytes < LEAST_HOST_SHARE * most:
            lines.append(
                f"warning: {node.host} has {node.host_bytes / 1e9:.0f} GB of host memory left, another node {most / 1e9:.0f}"
            )
    return list(dict.fromkeys(lines))


def _driver() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return "unknown"
