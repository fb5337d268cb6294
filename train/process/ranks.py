"""This process among all: rank, world, device, and joining or leaving the process group."""

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from files.shown import one_line
from qwen_image.free_memory import limit_device
from train.process.node_health import check_count, check_device, check_interface
from train.process.peers import VARIABLE

# Sample images and files are one rank's work, for which the others wait; torch's own limit is half an hour, and what hangs
# sooner is the watchdog's affair.
COLLECTIVE_LIMIT = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process among all: filled from the launcher's environment (deepspeed, torchrun, srun), or a world of one.

    Attributes:
        warned: the warnings that `say` has told, for the run's events (train/watching/events.py).
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device
    warned: list[str] = field(default_factory=list, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, *lines: str) -> None:
        """Lines on standard output, from rank 0 alone; a full disk behind it doesn't end the run."""
        if self.is_main:
            for line in lines:
                if line.startswith("warning"):
                    self.warned.append(line)
                with suppress(OSError):
                    tqdm.write(one_line(line), file=sys.stdout)  # a progress line on the terminal stays below it
                    sys.stdout.flush()

    def on_main(self, check: Callable[[], None]) -> None:
        """Rank 0 checks something for all; what it raises (ValueError, OSError), all raise. A collective."""
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                check()
            except (ValueError, OSError) as error:
                outcome = [error]
        if self.world > 1:
            dist.broadcast_object_list(outcome, device=self.device)
        if outcome[0] is not None:
            raise outcome[0]


def join_process_group(gpu_memory_limit: float | None = None, device_option: str = "auto") -> Ranks:
    """Initialise torch.distributed (NCCL on CUDA, gloo else) and choose this process's device.

    Raises ValueError where GPUs were given and torch sees none, unless `device_option` is `cpu`, and where the network
    interface that the environment names isn't there.
    """
    check_device(device_option)
    import deepspeed

    # torch 2.13 renamed collectives that DeepSpeed 0.19 calls, and says so at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, default)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")  # nobody else has to find it
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        check_count(ranks_here())
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        limit_device(device, gpu_memory_limit)
    else:
        device = torch.device("cpu")
        # DeepSpeed would compile C++ for a minute or three to add up CPU ranks a little faster than gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if os.environ["WORLD_SIZE"] != "1":
        check_interface("NCCL_SOCKET_IFNAME" if device.type == "cuda" else "GLOO_SOCKET_IFNAME")
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=COLLECTIVE_LIMIT,
        )
    except dist.DistNetworkError as error:
        if not port_is_taken(error) or VARIABLE in os.environ:  # the job script starts again, with another port
            raise
        raise OSError(
            f"port {os.environ.get('MASTER_PORT')} of {os.environ['MASTER_ADDR']} is taken, by another run perhaps: give this "
            "one its own, deepspeed --master_port 29501 or torchrun --master_port 29501 (torchrun --standalone finds one)"
        ) from None
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device)


def port_is_taken(error: Exception) -> bool:
    return any(sign in str(error) for sign in ("EADDRINUSE", "address already in use", "Address already in use"))


def leave_process_group() -> None:
    """At the very end, so that nothing warns at exit; DeepSpeed can't join a second group in one process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(count: int) -> int:
    """A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count
    counts: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(counts, count)
    return sum(counts)


def ranks_here() -> int:
    """How many ranks share this host, as the launcher says; 1 if it doesn't."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        text = os.environ.get(name, "")
        if text.isdigit():
            return int(text)
    return 1
