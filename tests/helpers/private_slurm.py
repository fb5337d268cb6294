"""A private Slurm on this host: munged, slurmctld and a few slurmd on loopback, in one folder; ended by process id.

Needs root (slurmd starts tasks as any user) and Debian's packages slurm-wlm and munge.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
FOREIGN = ("SLURM_", "SBATCH_", "SRUN_", "QWEN_LORA_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")

CONFIGURATION = """
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdTimeout={slurmd_timeout}
KillWait=5
MinJobAge=7200
FirstJobId={first_job}
NodeName=DEFAULT CPUs=8 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=6000 Gres=gpu:2 State=UNKNOWN
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}]
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=n[1-3] Default=YES MaxTime=INFINITE OverSubscribe=FORCE:4 State=UP
PartitionName=low Nodes=n[4-{nodes}] MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=high Nodes=n[4-{nodes}] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


def why_not() -> str | None:
    """Why no Slurm can be started here; None where it can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if os.geteuid() != 0:
        return "a private Slurm needs root"
    return f"no {', '.join(missing)}: apt-get install -y slurm-wlm munge" if missing else None


class PrivateSlurm:
    """Nodes n1, n2, …, each with 8 CPUs and 2 GPUs that are counted and don't exist; from n4 on they are for pre-emption.

    Several can run at a time: jobs of different ones have different numbers, and with them different ports.
    """

    def __init__(self, folder: Path, nodes: int = 5, slurmd_timeout: int = 20) -> None:
        self.folder, self.nodes = folder, [f"n{number}" for number in range(1, nodes + 1)]
        (folder / "state").mkdir(parents=True)
        folder.chmod(0o755)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        port = free_ports(nodes + 1)
        for number in range(2):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        host = socket.gethostname().split(".")[0]
        first_job = 1 + os.getpid() % 97 * 101
        names = {
            "first_job": first_job,
            "folder": folder,
            "host": host,
            "port": port,
            "first": port + 1,
            "last": port + nodes,
        }
        text = CONFIGURATION.format(**names, nodes=nodes, slurmd_timeout=slurmd_timeout)
        (folder / "slurm.conf").write_text(text)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        self.environment = kept | {"SLURM_CONF": str(folder / "slurm.conf")}
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log"}
        files |= {"seed-file": "munge.seed"}
        self.run("munged", "--force", *(f"--{option}={folder / name}" for option, name in files.items()))
        self.run("slurmctld", "-f", str(folder / "slurm.conf"))
        for node in self.nodes:
            (folder / f"spool.{node}").mkdir()
            self.start_node(node)
        until(30, lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(nodes))

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-N", node, "-f", str(self.folder / "slurm.conf"))
        until(10, lambda: (self.folder / f"slurmd.{node}.pid").exists())

    def submit(self, root: Path, *words: str, **variables: str) -> int:
        """sbatch from `root`; returns the job's number."""
        command = ["sbatch", "--parsable", *words]
        done = subprocess.run(
            command, cwd=root, env=self.environment | variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def facts(self, job: int | str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts …"""
        words = self.run("scontrol", "show", "job", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def end(self, job: int | str, seconds: float = 120) -> dict[str, str]:
        """Wait for a job's end; its facts."""
        running = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}
        until(seconds, lambda: self.facts(job)["JobState"] not in running)
        return self.facts(job)

    def processes(self, node: str) -> list[int]:
        """slurmd of a node, its step daemons and all their descendants."""
        pids = [int((self.folder / f"slurmd.{node}.pid").read_text())]
        log = str(self.folder / f"slurmd.{node}.log")
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if (entry / "comm").read_text().strip() != "slurmstepd":
                    continue
                held = {os.readlink(link) for link in (entry / "fd").iterdir()}
            except OSError:
                continue
            if log in held:
                pids.append(int(entry.name))
        return [descendant for pid in pids for descendant in descendants(pid)]

    def signal_node(self, node: str, number: signal.Signals) -> None:
        for pid in self.processes(node):
            kill(pid, number)

    def stop(self) -> None:
        for node in self.nodes:
            self.signal_node(node, signal.SIGCONT)
        subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], env=self.environment, check=False)
        subprocess.run(["scancel", "--user=root"], env=self.environment, check=False)
        for node in self.nodes:
            for pid in self.processes(node)[1:]:
                kill(pid, signal.SIGKILL)
        for name in [*(f"slurmd.{node}" for node in self.nodes), "slurmctld", "munged"]:
            pid = int((self.folder / f"{name}.pid").read_text())
            kill(pid, signal.SIGTERM)
            try:
                until(5, lambda pid=pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]
            except AssertionError:
                kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """A process and everything below it, itself first."""
    children = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return [pid, *(below for child in children for below in descendants(child))]


def kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    for first in range(17000 + os.getpid() % 1000 * 8, 60000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for place, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + place))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise OSError("no free ports")


def until(seconds: float, condition: Callable[[], object]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)
