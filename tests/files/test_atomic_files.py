"""Whole files and folders: all or nothing, durable, with the mode that the user's umask gives."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from files import atomic_files
from files.atomic_files import PARTIAL, remove_abandoned, sync_folder, whole_file, whole_folder, write_file


def test_text_and_bytes(tmp_path: Path):
    write_file(tmp_path / "a", b"\x00\xff")
    write_file(tmp_path / "b", "größer\n")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b").read_bytes() == "größer\n".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        write_file(tmp_path / "a", b"x")
        with whole_folder(tmp_path / "f") as partial:
            write_file(partial / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "f" / "a").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o777 & ~umask


def test_an_error_leaves_the_old_file_and_no_trace(tmp_path: Path):
    write_file(tmp_path / "a", b"old")
    with pytest.raises(KeyError), whole_file(tmp_path / "a") as file:
        file.write(b"new")
        raise KeyError
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_file_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """fsync of the data, rename, fsync of the folder: in this order."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else f"{os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(atomic_files.os, "fsync", noted_fsync)
    monkeypatch.setattr(atomic_files.os, "replace", noted_replace)
    write_file(tmp_path / "a", b"12345")
    assert done == ["5 bytes", "rename", "folder"]


def test_a_file_system_without_fsync_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(descriptor: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(atomic_files.os, "fsync", refuse)
    sync_folder(tmp_path)


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path):
    for text in ("old", "new"):
        with whole_folder(tmp_path / "f") as partial:
            write_file(partial / text, text)
            assert text == "old" or (tmp_path / "f" / "old").exists()
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["new"]
    with pytest.raises(KeyError), whole_folder(tmp_path / "f") as partial:
        write_file(partial / "third", "")
        raise KeyError
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_what_a_killed_process_left_goes_and_the_rest_stays(tmp_path: Path):
    program = "import sys; from pathlib import Path; from files.atomic_files import *; import os, signal\n"
    program += "with whole_folder(Path(sys.argv[1]) / 'f'), whole_file(Path(sys.argv[1]) / 'a') as file:\n"
    program += "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert len(list(tmp_path.glob(f"{PARTIAL}*"))) == 2
    others = [f"{PARTIAL}a.elsewhere.1", f"{PARTIAL}a.{socket.gethostname()}.{os.getpid()}", "a.txt"]
    for name in others:
        (tmp_path / name).touch()
    remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
