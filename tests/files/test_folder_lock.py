"""One writer for a folder: two real processes, killed, stopped and thawed ones, and a race of many."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from files import folder_lock
from files.folder_lock import FolderInUse, FolderLock, FolderLost, Holder

OWNER = """
import sys, time
from pathlib import Path
from files.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), "training", silent_seconds=float(sys.argv[2]), beat_seconds=0.2)
print("mine", flush=True)
for line in sys.stdin:
    if line.strip() == "release":
        lock.release()
    if line.strip() == "require":
        lock.require()
    print(lock.still_mine(), flush=True)
"""


class Owner:
    """A process that holds a folder and answers questions about it."""

    def __init__(self, folder: Path, silent_seconds: float = 60.0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(folder), str(silent_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SLURM_JOB_ID": "4711"},
        )
        assert self.answer() == "mine"

    def answer(self, question: str = "") -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        if question:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.send_signal(signal.SIGCONT)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None and not pipe.closed:
                pipe.close()


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Callable[..., Owner]]:
    owners = []

    def start(**options: float) -> Owner:
        owners.append(Owner(tmp_path, **options))
        return owners[-1]

    yield start
    for one in owners:
        one.end()


def take(folder: Path, said: list[str] | None = None, **options: float) -> FolderLock:
    say = (lambda line: None) if said is None else said.append
    return FolderLock(folder, "packing", say=say, **{"silent_seconds": 60.0, "beat_seconds": 0.2} | options)


def test_the_second_process_is_refused_and_told_who_holds_the_folder(tmp_path: Path, owner: Callable[..., Owner]):
    first = owner()
    with pytest.raises(FolderInUse) as refused:
        take(tmp_path)
    line = str(refused.value)
    assert f"process {first.process.pid} on {os.uname().nodename}, job 4711 (training, since 20" in line
    assert str(tmp_path) in line and "\n" not in line
    assert first.answer("mine?") == "True"


def test_a_folder_that_was_released_is_free_at_once(tmp_path: Path, owner: Callable[..., Owner]):
    first, said = owner(), []
    assert first.answer("release") == "False"
    with take(tmp_path, said) as lock:
        assert lock.still_mine()
    assert not said, "an orderly change of hands is no news"
    assert len(list(tmp_path.iterdir())) == 1, "the drafts are gone, the last lock file stays"
    take(tmp_path).release()


def test_a_killed_owner_is_replaced_at_once(tmp_path: Path, owner: Callable[..., Owner]):
    first, said = owner(), []
    first.process.kill()  # not waited for: a zombie until the end of the test, and as good as gone
    time.sleep(0.3)
    with take(tmp_path, said) as lock:
        assert lock.still_mine()
    assert len(said) == 1 and f"from process {first.process.pid} on" in said[0] and "has ended" in said[0]


def test_a_frozen_owner_is_replaced_after_its_silence_and_learns_it_when_thawed(
    tmp_path: Path, owner: Callable[..., Owner]
):
    first, said = owner(silent_seconds=1.5), []
    first.process.send_signal(signal.SIGSTOP)
    with pytest.raises(FolderInUse):
        take(tmp_path, silent_seconds=1.5)
    time.sleep(2)
    with take(tmp_path, said, silent_seconds=1.5) as lock:
        assert len(said) == 1 and "has been silent for 2 s" in said[0]
        first.process.send_signal(signal.SIGCONT)
        assert first.answer("mine?") == "False"
        time.sleep(0.5)  # its heartbeat must not bring the old lock back to life
        assert lock.still_mine()
        assert first.process.stdin is not None and first.process.stderr is not None
        first.process.stdin.write("require\n")
        first.process.stdin.close()
        error = first.process.stderr.read().splitlines()[-1]
        assert "FolderLost" in error and f"process {os.getpid()} on" in error and "packing" in error


def test_a_slow_owner_keeps_the_folder_by_its_heartbeat(tmp_path: Path, owner: Callable[..., Owner]):
    first = owner(silent_seconds=1.0)
    time.sleep(1.5)
    with pytest.raises(FolderInUse):
        take(tmp_path, silent_seconds=1.0)
    assert first.answer("mine?") == "True"


def test_waiting_for_the_holder(tmp_path: Path, owner: Callable[..., Owner], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folder_lock, "POLL_SECONDS", 0.05)
    first, said = owner(), []
    began = time.monotonic()
    with pytest.raises(FolderInUse):
        take(tmp_path, said, wait_seconds=0.5)
    assert 0.5 <= time.monotonic() - began < 5 and len(said) == 1 and "waiting" in said[0]
    assert first.process.stdin is not None
    first.process.stdin.write("release\n")
    first.process.stdin.flush()
    take(tmp_path, wait_seconds=30).release()


@pytest.mark.parametrize("links", [True, False])
def test_of_many_rivals_for_a_dead_owners_folder_one_wins(tmp_path: Path, owner: Callable[..., Owner], links: bool):
    """Twelve processes that start at one moment; each holds what it got until all have tried."""
    first = owner()
    first.process.kill()
    rival = f"""
import errno, os, sys, time
from pathlib import Path
from files.folder_lock import FolderInUse, FolderLock
if not {links}:
    def link(source, target): raise OSError(errno.EPERM, "no links here")
    os.link = link
time.sleep(max(0, float(sys.argv[2]) - time.time()))
try:
    lock = FolderLock(Path(sys.argv[1]), "rival", say=lambda line: None)
    time.sleep(2.5)
    print("won" if lock.still_mine() else "lost it again")
except FolderInUse:
    print("refused")
"""
    start = str(time.time() + 2)
    command = [sys.executable, "-c", rival, str(tmp_path), start]
    rivals = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(12)]
    answers = sorted(process.communicate(timeout=60)[0].strip() for process in rivals)
    assert answers == ["refused"] * 11 + ["won"]


def test_a_rival_that_is_two_generations_late_steps_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It looked before the owner of generation 3 came, and creates generation 2, which is free again."""
    take(tmp_path).release()
    take(tmp_path).release()
    with take(tmp_path) as owner:
        assert [path.name for path in tmp_path.iterdir()] == [".lock-000003"]
        real, looks = FolderLock._highest, []

        def late(self: FolderLock) -> int:
            looks.append(1)
            return 1 if len(looks) == 1 else real(self)

        monkeypatch.setattr(FolderLock, "_highest", late)
        with pytest.raises(FolderInUse):
            take(tmp_path)
        assert owner.still_mine()
        assert [path.name for path in tmp_path.iterdir()] == [".lock-000003"]


def test_a_lock_of_another_machine_counts_until_it_is_silent(tmp_path: Path):
    """Its process id means nothing here, whether or not one of that number lives."""
    there = replace(Holder.this_process("training"), host="elsewhere", process=2**22 - 1)
    path = tmp_path / ".lock-000001"
    path.write_text(json.dumps(asdict(there)))
    with pytest.raises(FolderInUse, match="on elsewhere"):
        take(tmp_path)
    os.utime(path, (time.time() - 100,) * 2)
    take(tmp_path).release()


@pytest.mark.parametrize("change", [{"boot": "other"}, {"namespace": "pid:[1]"}, {"process_start": "?"}])
def test_what_only_looks_like_a_dead_process_counts_as_alive(tmp_path: Path, change: dict[str, str]):
    dead = replace(Holder.this_process("training"), process=2**22 - 1)
    assert dead.is_gone()
    assert not replace(dead, **change).is_gone()


def test_a_process_id_that_was_given_to_another_process_is_gone():
    here = Holder.this_process("training")
    assert not here.is_gone()
    assert replace(here, process_start="1").is_gone()


def test_the_draft_of_a_process_killed_between_link_and_unlink_goes_and_a_living_rival_s_stays(tmp_path: Path):
    here = Holder.this_process("training")
    dead = replace(here, process=2**22 - 1, token="dead")
    (tmp_path / ".lock-draft-dead").write_text(json.dumps(asdict(dead)))
    os.link(tmp_path / ".lock-draft-dead", tmp_path / ".lock-000001")
    (tmp_path / ".lock-draft-alive").write_text(json.dumps(asdict(replace(here, token="alive"))))
    with take(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock-000002", ".lock-draft-alive"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 1}', b"\xff\x00"])
def test_a_lock_file_that_names_nobody_is_waited_for(tmp_path: Path, content: bytes):
    path = tmp_path / ".lock-000007"
    path.write_bytes(content)
    with pytest.raises(FolderInUse, match="doesn't name"):
        take(tmp_path)
    os.utime(path, (time.time() - 100,) * 2)
    with take(tmp_path) as lock:
        assert lock.still_mine()


def test_a_removed_lock_is_lost_and_not_written_again(tmp_path: Path):
    lock = take(tmp_path)
    next(tmp_path.iterdir()).unlink()
    with pytest.raises(FolderLost, match="its lock was removed"):
        lock.require()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_forked_child_holds_nothing_and_releases_nothing(tmp_path: Path):
    with take(tmp_path) as lock:
        child = os.fork()
        if child == 0:
            held = lock.still_mine()
            lock.release()
            os._exit(held)
        assert os.waitpid(child, 0)[1] == 0
        assert lock.still_mine()


def test_what_a_lock_file_says_cannot_write_to_the_terminal(tmp_path: Path):
    evil = replace(Holder.this_process("a\x1b[2J\nb"), host="elsewhere")
    (tmp_path / ".lock-000001").write_text(json.dumps(asdict(evil)))
    with pytest.raises(FolderInUse) as refused:
        take(tmp_path)
    assert r"a\x1b[2J\nb" in str(refused.value) and str(refused.value).isprintable()
