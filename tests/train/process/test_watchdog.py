"""The first error is everybody's; silent ranks are named; what stands still ends; a left-over of the past leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from train.process import first_error, watchdog
from train.process.exit_codes import BAD_INPUT, RANK_LOST
from train.process.first_error import FirstError, blame, rank_was_lost, read_first, tell_first
from train.process.peers import Peers
from train.process.watchdog import JOINING, Watchdog


@pytest.fixture
def peers(tmp_path: Path) -> Peers:
    """Rank 0 of four on two nodes; all have given a sign, ranks 1 and 3 named their nodes."""
    folder = tmp_path / "start-2"
    folder.mkdir()
    (tmp_path / "current").write_text("start-2\n")
    found = Peers(folder, 0, 4, ("n1", "n2"))
    for rank in range(4):
        found.sign(rank).write_text({1: "n1\n", 3: "gpu-b\n"}.get(rank, ""))
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(first_error, "PATIENCE_SECONDS", 0.6)


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def left_with(peers: Peers | None, act: Callable[[Watchdog], None], seconds: float = 3.0) -> list[int]:
    """Exit codes with which a watchdog would have ended the process."""
    codes: list[int] = []
    with Watchdog(peers, leave=codes.append) as dog:
        act(dog)
        end = time.monotonic() + seconds
        while not codes and time.monotonic() < end:
            time.sleep(0.01)
    return codes[:1]


def test_only_the_first_error_counts(peers: Peers) -> None:
    second = Peers(peers.folder, 3, 4, peers.nodes)
    assert tell_first(second, BAD_INPUT, "error: data: no folder\nat x")  # the job script says error, too
    assert not tell_first(peers, RANK_LOST, "connection closed")
    assert read_first(peers) == FirstError(BAD_INPUT, "rank 3 on node gpu-b", "data: no folder\\nat x")
    assert not list(peers.folder.glob(".first_error*"))


def test_a_rank_is_named_by_its_sign_or_by_the_list_of_nodes(peers: Peers) -> None:
    names = ["rank 0 on node n1", "rank 1 on node n1", "rank 2 on node n2", "rank 3 on node gpu-b"]
    assert [peers.named(rank) for rank in range(4)] == names
    assert Peers(peers.folder, 0, 4).named(2) == "rank 2"


def test_silence_is_an_old_sign_or_none(peers: Peers) -> None:
    age(peers.sign(2), 30)
    peers.sign(3).unlink()
    peers.beat()
    assert peers.silent(20) == [2, 3] and peers.silent(40) == [3]


def test_each_rank_is_watched_by_others_and_none_watches_all(peers: Peers) -> None:
    assert [Peers(peers.folder, rank, 4).neighbors() for rank in (0, 3)] == [[1, 2, 3], [0, 1, 2]]
    watched = [rank for watcher in range(20) for rank in Peers(peers.folder, watcher, 20).neighbors()]
    assert sorted(watched) == sorted([*range(20)] * 8) and Peers(peers.folder, 0, 1).neighbors() == []
    age(peers.sign(2), 30)
    peers.beat()
    assert peers.silent(20, [1, 3]) == [] and peers.silent(20, [1, 2]) == [2]


def test_another_ranks_error_ends_this_one_with_its_code(peers: Peers) -> None:
    assert left_with(peers, lambda dog: None, 0.3) == []
    tell_first(Peers(peers.folder, 3, 4), BAD_INPUT, "bad")
    assert left_with(peers, lambda dog: None) == [BAD_INPUT]


def test_a_silent_rank_ends_the_run_and_is_named_but_not_while_ranks_still_come(peers: Peers) -> None:
    age(peers.sign(2), 100)
    assert left_with(peers, lambda dog: dog.begin(JOINING, 60), 0.3) == []
    assert left_with(peers, lambda dog: dog.begin("loading", 60)) == [RANK_LOST]
    first = read_first(peers)
    assert first is not None and first.who == "rank 2 on node n2" and "no sign of rank 2 on node n2" in first.reason


def test_joining_that_takes_too_long_names_who_has_not_come(peers: Peers, capsys: pytest.CaptureFixture[str]) -> None:
    peers.sign(3).unlink()
    assert left_with(peers, lambda dog: dog.begin(JOINING, 0.1)) == [RANK_LOST]
    first = read_first(peers)
    assert (
        first is not None
        and first.who == "rank 3 on node n2"
        and "joining the process group took longer" in first.reason
    )
    err = capsys.readouterr().err
    assert "where this rank stood (rank 0 on node n1):" in err and "left_with" in err


def test_a_step_that_stands_still_ends_without_a_job_script_too(capsys: pytest.CaptureFixture[str]) -> None:
    def stand_still(dog: Watchdog) -> None:
        dog.step_seconds = 0.1
        for _ in range(watchdog.WARM_UP_STEPS + 1):
            dog.stepped()

    assert left_with(None, stand_still) == [RANK_LOST]
    assert "error: optimizer step 5 of this start took longer than allowed" in capsys.readouterr().err


def test_saving_and_the_first_steps_may_take_long() -> None:
    def save(dog: Watchdog) -> None:
        dog.step_seconds = 0.1
        dog.stepped()
        assert dog.step_limit() == watchdog.WARM_UP_SECONDS
        for _ in range(5):
            dog.stepped()
        with dog.longer("saving"):
            time.sleep(0.3)
        dog.begin("the end", 60)

    assert left_with(None, save, 0.2) == []


def test_a_step_may_take_ten_times_the_median() -> None:
    with Watchdog(None, leave=lambda code: None) as dog:
        for _ in range(10):
            dog.stepped()
        assert dog.step_limit() == watchdog.LEAST_STEP_SECONDS
        dog._durations.extend([90.0] * 51)
        assert dog.step_limit() == 900.0


def test_a_process_of_an_earlier_start_leaves(peers: Peers) -> None:
    (peers.folder.parent / "current").write_text("start-3\n")
    assert left_with(peers, lambda dog: None) == [RANK_LOST]
    assert read_first(peers) is None


def test_a_notice_to_leave_is_passed_on_once_somebody_listens(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append(number))
    (peers.folder.parent / "leave").touch()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    assert left_with(peers, lambda dog: None, 0.2) == [] and sent == []
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    assert left_with(peers, lambda dog: None, 0.2) == [] and sent == [signal.SIGUSR1]


def test_a_lost_connection_is_the_fault_of_who_fell_silent_or_said_why(peers: Peers) -> None:
    error = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2")
    assert rank_was_lost(error) and not rank_was_lost(RuntimeError("shapes differ"))
    for rank in range(4):
        age(peers.sign(rank), 60 if rank == 1 else 0)
    assert blame(peers, error).who == "rank 1 on node n1"
    (peers.folder / "first_error").unlink()
    tell_first(Peers(peers.folder, 3, 4), BAD_INPUT, "bad")
    assert blame(peers, error) == FirstError(BAD_INPUT, "rank 3 on node gpu-b", "bad")


def test_the_same_error_of_many_ranks_is_said_once(peers: Peers, monkeypatch, capsys) -> None:
    from train.train_lora import tell

    monkeypatch.setenv("QWEN_LORA_ATTEMPT", str(peers.folder))
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        tell(BAD_INPUT, "data: no folder at /photos")
    assert capsys.readouterr().err == "" and read_first(peers) == FirstError(
        BAD_INPUT, peers.named(1), "data: no folder at /photos"
    )
    tell(BAD_INPUT, "data: no folder at /other")
    assert capsys.readouterr().err == "error: data: no folder at /other\n"


STOPPED = """
import sys, time
from pathlib import Path
from train.process import watchdog
from train.process.peers import Peers
watchdog.BEAT_SECONDS, watchdog.STOPPED_SECONDS = 0.05, 1.0
with watchdog.Watchdog(Peers(Path(sys.argv[1]), 0, 4)) as dog:
    dog.begin("loading", 2.0)
    print("begun", flush=True)
    time.sleep(30)
"""


def test_time_during_which_the_process_was_stopped_does_not_count(peers: Peers) -> None:
    """As under `scontrol suspend`: neither its own limit nor the others' signs are of use right after."""
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(peers.folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGSTOP)
        for rank in (1, 2, 3):
            age(peers.sign(rank), 100)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.7)
        assert process.poll() is None and read_first(peers) is None
        assert process.wait(timeout=10) == RANK_LOST  # its own limit, later by as much


def test_a_long_wait_for_data_is_said_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(watchdog, "TOLD_SECONDS", 0.2)
    with Watchdog(None) as dog:
        for _ in range(3):
            with dog.waiting("data from s3://bucket"):
                time.sleep(0.05)
        assert "waited" not in capfd.readouterr().err
        for _ in range(2):
            with dog.waiting("data from s3://bucket"):
                time.sleep(0.4)
    assert capfd.readouterr().err == "warning: rank 0 has waited 0 s for data from s3://bucket (said once)\n"
