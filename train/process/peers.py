"""What the ranks of one start of a job know of each other without torch.distributed: small files in a folder of the job.

The job script makes the folder on the shared disk and names it in QWEN_LORA_ATTEMPT; without it (torchrun, a terminal)
there are no peers, and launchers end the ranks. The folder's files, all written by rename or link:

    rank-3            its node's name; touched every second by rank 3's watchdog, the sign that it lives
    first_error       who failed first: exit code, rank and node, reason, what to do, one line each (first_error.py)
    ../current        the name of the newest start's folder: ranks of an older one have to leave
    ../leave          exists once the scheduler has asked the job to leave
    ../progress       step and path of the last checkpoint

Imports no torch: it is there from the first line of a rank on.
"""

import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from files.atomic_files import write_file

NEIGHBORS = 8
VARIABLE = "QWEN_LORA_ATTEMPT"


@dataclass(frozen=True)
class Peers:
    """The folder of this start, and this rank's place among the others.

    Attributes:
        nodes: names in the order of the ranks, each with `world / len(nodes)` of them; () where nobody said.
    """

    folder: Path
    rank: int
    world: int
    nodes: tuple[str, ...] = ()

    @classmethod
    def from_environment(cls) -> "Peers | None":
        folder = os.environ.get(VARIABLE)
        if not folder:
            return None
        nodes = tuple(os.environ.get("QWEN_LORA_NODES", "").split())
        return cls(Path(folder), int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), nodes)

    def sign(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}"

    def beat(self) -> None:
        """Show that this rank lives. A disk that doesn't answer is no reason to end."""
        with suppress(OSError):
            self.sign(self.rank).touch()

    def neighbors(self) -> list[int]:
        """The ranks that this one keeps an eye on: a thousand that look at a thousand would be too much for a disk."""
        return [(self.rank + distance) % self.world for distance in range(1, min(NEIGHBORS, self.world - 1) + 1)]

    def silent(self, seconds: float, ranks: Iterable[int] | None = None) -> list[int]:
        """Those of `ranks` (None: all) that have given no sign for so long, or none at all.

        By the file server's clock alone: `beat` first.
        """
        found = []
        now = self.sign(self.rank).stat().st_mtime
        for rank in range(self.world) if ranks is None else ranks:
            try:
                if now - self.sign(rank).stat().st_mtime >= seconds:
                    found.append(rank)
            except FileNotFoundError:
                found.append(rank)
        return found

    def named(self, rank: int) -> str:
        """`rank 3 on node n2`: as the rank itself wrote it, else by the job's list of nodes."""
        node = ""
        with suppress(OSError):
            node = self.sign(rank).read_text().strip()
        if not node and self.nodes and self.world % len(self.nodes) == 0:
            node = self.nodes[rank // (self.world // len(self.nodes))]
        return f"rank {rank} on node {node}" if node else f"rank {rank}"

    def node_log(self) -> Path:
        """Where slurm/rank.sh keeps what the ranks of this node say."""
        return self.folder.parent / f"{os.environ.get('SLURMD_NODENAME') or socket.gethostname()}.log"

    def superseded(self) -> bool:
        """Whether the job was started anew since: this process is a left-over of its past."""
        with suppress(OSError):
            return (self.folder.parent / "current").read_text().strip() not in ("", self.folder.name)
        return False

    def asked_to_leave(self) -> bool:
        return (self.folder.parent / "leave").exists()

    def progress(self, step: int, path: Path) -> None:
        """For the job script: a new checkpoint, so that another start is worth it."""
        with suppress(OSError):
            write_file(self.folder.parent / "progress", f"{step}\n{path.absolute()}\n{time.time():.0f}\n")
