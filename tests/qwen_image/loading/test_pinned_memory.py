"""Host memory for the weights that a GPU copies from: exact in size, and nothing that a loader worker inherits."""

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwen_image.loading import pinned_memory as memory_module
from qwen_image.loading.pinned_memory import Arena, host_memory, pinned_memory, unforked_memory


def mapped(address: int) -> bool:
    """Whether this process has memory at an address."""
    with open("/proc/self/maps") as file:
        ranges = [re.match(r"([0-9a-f]+)-([0-9a-f]+)", line) for line in file]
    return any(int(m[1], 16) <= address < int(m[2], 16) for m in ranges if m)


def in_child(check: Callable[[], bool]) -> bool:
    """What `check` says in a forked process."""
    child = os.fork()
    if child == 0:
        os._exit(0 if check() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_children_do_not_inherit_it() -> None:
    memory = unforked_memory(1 << 20, torch.bfloat16)
    memory.fill_(1.5)
    assert mapped(memory.data_ptr()) and memory.sum().item() == 1.5 * (1 << 20)
    assert not in_child(lambda: mapped(memory.data_ptr()))
    ordinary = torch.zeros(1 << 20)
    assert in_child(lambda: mapped(ordinary.data_ptr()))  # the check can tell


def test_views_keep_it_alive() -> None:
    view = unforked_memory(1000, torch.float32)[10:20]
    view.fill_(2.0)
    assert view.sum().item() == 20
    assert unforked_memory(0, torch.float32).numel() == 0


def test_more_than_there_is() -> None:
    with pytest.raises(MemoryError, match="GB of host memory"):
        unforked_memory(1 << 60, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locking needs CUDA")
def test_pinned() -> None:
    memory = pinned_memory(1 << 20, torch.float32)
    assert memory.is_pinned() and not in_child(lambda: mapped(memory.data_ptr()))


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that locks nothing."""

    class Cudart:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            return 2

        def cudaHostUnregister(self, address: int) -> None:
            raise AssertionError("nothing was locked")

    empty = torch.empty

    def refused(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere")
        return empty(*shape, **options)

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(torch, "empty", refused)
    monkeypatch.setattr(memory_module, "_told", set())


def test_what_is_not_locked_is_ordinary_and_told_once(refusing: None, capsys: pytest.CaptureFixture[str]) -> None:
    arena = Arena(torch.device("cpu"), torch.uint8, pinned=True, remaining=3_000)
    parts = [arena.take(1_000).fill_(number) for number in range(3)]
    parts.append(host_memory((2, 500), torch.uint8, pinned=True).fill_(3))
    assert [part.float().mean().item() for part in parts] == [0, 1, 2, 3]
    del parts, arena
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("warning: the system refused to page-lock 0.0 GB of host memory (2; ulimit -l: ")
    assert "half as fast" in line and "ulimit -l unlimited" in line


def test_pinned_pieces_lie_in_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def pinned(elements: int, dtype: torch.dtype) -> torch.Tensor:
        taken.append(elements)
        return torch.empty(elements, dtype=dtype)

    monkeypatch.setattr("qwen_image.loading.pinned_memory.pinned_memory", pinned)
    monkeypatch.setattr("qwen_image.loading.pinned_memory.ARENA_BYTES", 2000)
    sizes = [300, 5, 640, 2000, 7]
    arena = Arena(torch.device("cpu"), torch.bfloat16, pinned=True, remaining=sum(sizes))
    parts = [arena.take(size) for size in sizes]
    for number, part in enumerate(parts):
        part.fill_(number)
    assert [len(part) for part in parts] == sizes
    assert all((part == number).all() for number, part in enumerate(parts)), "pieces overlap"
    assert taken == [1000, 1000, 2000, 7]  # elements; a piece larger than an arena has one of its own
