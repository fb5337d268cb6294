"""No silent training on CPUs; nodes that differ are refused by name, what may go wrong is said once a node."""

import dataclasses

import pytest
import torch

from train.process import node_health
from train.process.first_error import rank_was_lost, shared_gpu
from train.process.node_health import Node, check_count, check_device, check_interface, check_size, compare


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(node_health, "gpus_were_given", lambda: "SLURM_GPUS_ON_NODE is 8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("cuda", "visible", "reason"),
    [(None, None, "built for CPUs"), ("13.0", "", "CUDA_VISIBLE_DEVICES='' hides them"), ("13.0", None, "nvidia-smi")],
)
def test_gpus_that_were_given_and_are_not_seen_are_an_error(monkeypatch, cuda, visible, reason):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match="SLURM_GPUS_ON_NODE is 8") as error:
        check_device("auto")
    assert reason in str(error.value) and "--device cpu" in str(error.value)


def test_the_cpu_by_flag_or_where_nobody_gave_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    check_device("cpu")
    monkeypatch.setattr(node_health, "gpus_were_given", lambda: None)
    check_device("auto")


def test_slurm_says_whether_gpus_were_given(monkeypatch):
    monkeypatch.undo()
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(node_health, "Path", lambda path: type("Dev", (), {"glob": lambda self, pattern: []})())
    assert node_health.gpus_were_given() is None
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    assert node_health.gpus_were_given() == "SLURM_GPUS_ON_NODE is 2"


def test_a_large_model_on_the_cpu_needs_the_flag():
    with torch.device("meta"):
        large = torch.nn.Linear(50_000, 30_000)
    with pytest.raises(ValueError, match=r"1\.5 billion parameters would train on the CPU"):
        check_size(torch.device("cpu"), "auto", large)
    check_size(torch.device("cpu"), "cpu", large)
    check_size(torch.device("cuda"), "auto", large)
    check_size(torch.device("cpu"), "auto", torch.nn.Linear(2, 2))


def test_nodes_are_compared():
    fine = Node(
        "n1", {"torch": "2.11", "driver": "580"}, 1000.0, 10 << 30, 0.99, 100 << 30, "/runs/qwen_lora-7/start-1"
    )
    assert compare([fine, dataclasses.replace(fine, host="n2")]) == []
    with pytest.raises(ValueError, match="driver differs between nodes: 580 on n1, 570 on n2"):
        compare([fine, dataclasses.replace(fine, host="n2", versions={"torch": "2.11", "driver": "570"})])
    odd = dataclasses.replace(
        fine, host="n2", clock=1100.0, temporary_bytes=1 << 30, free_share=0.5, host_bytes=40 << 30
    )
    lines = compare([fine, odd, odd])
    assert [line.split(" ")[1] for line in lines] == ["the", "n2", "50%", "n2"] and "100 s apart" in lines[0]
    with pytest.raises(RuntimeError, match="ranks of another job have joined") as met:
        compare([fine, dataclasses.replace(fine, start="/runs/qwen_lora-10007/start-1")])
    assert rank_was_lost(met.value)


def test_a_gpu_is_no_two_ranks_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_count(4)
    with pytest.raises(ValueError, match=r"8 ranks on .* torch sees 4 GPUs"):
        check_count(8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_count(8)


@pytest.mark.parametrize(
    ("variable", "asked", "wrong"),
    [
        ("NCCL_SOCKET_IFNAME", "", False),
        ("NCCL_SOCKET_IFNAME", "ib", False),  # the beginning of a name
        ("NCCL_SOCKET_IFNAME", "bond0,ib1:4000", False),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", False),
        ("NCCL_SOCKET_IFNAME", "^=ib", False),
        ("NCCL_SOCKET_IFNAME", "=ib1", False),
        ("NCCL_SOCKET_IFNAME", "=ib", True),
        ("NCCL_SOCKET_IFNAME", "ib9,bond", True),
        ("NCCL_SOCKET_IFNAME", "^e,ib,lo", True),
        ("GLOO_SOCKET_IFNAME", "eno1", False),
        ("GLOO_SOCKET_IFNAME", "ib", True),
        ("GLOO_SOCKET_IFNAME", "^lo", True),
    ],
)
def test_a_network_interface_that_is_not_there_is_named_with_those_that_are(monkeypatch, variable, asked, wrong):
    monkeypatch.setattr(node_health.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eno1"), (3, "ib1")])
    monkeypatch.setenv(variable, asked)
    if not wrong:
        check_interface(variable)
        return
    with pytest.raises(ValueError, match="which has lo, eno1, ib1: name the one that connects the nodes") as error:
        check_interface(variable)
    assert str(error.value).startswith(f"{variable}={asked} chooses no network interface of ")


def test_two_ranks_on_one_gpu_are_bad_input_and_no_lost_rank(monkeypatch):
    """What torch says, by NCCL 2.20 to 2.27; its first line alone would be that of a lost rank."""
    error = torch.distributed.DistBackendError(
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, invalid usage (run with NCCL_DEBUG=WARN for "
        "details), NCCL version 2.27.5\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
        "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000\n"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert not rank_was_lost(error)
    reason = shared_gpu(error) or ""
    assert reason.startswith("rank 1 and rank 0 both on CUDA device 1b000 of ")
    assert reason.endswith("as many ranks on a node as it has GPUs (CUDA_VISIBLE_DEVICES is '0')")
    assert shared_gpu(RuntimeError("NCCL error in: x, remote process exited or there was a network error")) is None
