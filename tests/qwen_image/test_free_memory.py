"""What a host can still give, inside of control groups of both versions: a fake file system."""

from pathlib import Path

import pytest

from qwen_image.free_memory import host_bytes

GIB = 1 << 30


def system(root: Path, groups: str, files: dict[str, str], free: int = 100) -> Path:
    for name, text in {
        "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {free << 20} kB",
        "proc/self/cgroup": groups,
        **files,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def group(path: str, limit: str, used: int, cached: int = 0, old: bool = False) -> dict[str, str]:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
    top = f"sys/fs/cgroup/{'memory/' if old else ''}{path}"
    stat = f"anon 7\n{'total_' if old else ''}inactive_file {cached * GIB}"
    return {f"{top}/{names[0]}": limit, f"{top}/{names[1]}": str(used * GIB), f"{top}/memory.stat": stat}


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {}, 100),
        ("0::/job/step", group("job/step", "max", 3) | group("job", str(50 * GIB), 20, 5), 35),
        ("0::/job/step", group("job/step", str(9 * GIB), 2) | group("job", str(50 * GIB), 20), 7),
        ("0::/not/in/here", group("", str(16 * GIB), 4), 12),  # of a container
        ("4:memory:/slurm/job\n3:cpu:/", group("slurm/job", str(24 * GIB), 8, 1, old=True), 17),
        ("4:memory:/", group("", str(2**63 - 4096), 8, old=True), 100),  # no limit, as version 1 says it
        ("0::/job", group("job", str(GIB), 2), 0),
    ],
)
def test_the_tightest_group_decides(tmp_path: Path, groups: str, files: dict[str, str], expected: int) -> None:
    assert host_bytes(system(tmp_path, groups, files)) == expected * GIB


def test_without_control_groups(tmp_path: Path) -> None:
    system(tmp_path, "", {})
    (tmp_path / "proc/self/cgroup").unlink()
    assert host_bytes(tmp_path) == 100 * GIB and host_bytes() > 0
