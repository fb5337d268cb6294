"""metrics.jsonl, the lines on stderr, and W&B that never ends a training."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train.config.train_config import TrainConfig
from train.saving.run_folder import check_room, prepare_run_folder
from train.watching.metrics import Metrics


def make_config(folder: Path, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {"model": "owner/model", "data": "shards", "deepspeed": "z.json", "output_path": folder}
    return TrainConfig(**({"wandb_mode": "disabled"} | options | changes))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


class FakeRun:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.logged, self.finished, self.broken = options, [], False, False  # type: ignore[var-annotated]

    def define_metric(self, *names: str, **options: str) -> None:
        pass

    def log(self, row: dict[str, Any]) -> None:
        if self.broken:
            raise RuntimeError("connection lost\nand more")
        self.logged.append(row)

    def finish(self) -> None:
        self.finished = True


class FakeWandb(types.ModuleType):
    """Stands in for the package: remembers its runs; `unreachable` makes online runs fail."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[FakeRun] = []
        self.unreachable = False
        self.Settings, self.Image = dict, str

    def login(self, prompt: bool, verify: bool) -> bool:
        assert not prompt and not verify, "nobody answers in a job, and the network may be slow"
        return "WANDB_API_KEY" in os.environ

    def init(self, **options: Any) -> FakeRun:
        if self.unreachable and options["mode"] == "online":
            raise TimeoutError("no answer in 30 s")
        self.runs.append(FakeRun(options))
        return self.runs[-1]


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_a_row_a_logged_step_with_its_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("train.watching.metrics.time.perf_counter", lambda: now)
    metrics = Metrics.from_config(make_config(tmp_path), total_steps=20, samples_per_step=8)
    now += 3.0
    with metrics.paused():
        now += 50.0
    now += 1.0
    metrics.log(2, epoch=0.5, loss=0.25, lr=1e-4, grad_norm=math.nan)
    metrics.record(2, validation_loss=0.5)
    metrics.close()
    metrics.close()
    first = {"step": 2, "epoch": 0.5, "loss": 0.25, "lr": 1e-4, "grad_norm": None}
    assert rows(tmp_path) == [
        first | {"seconds_per_step": 2.0, "samples_per_second": 4.0},
        {"step": 2, "validation_loss": 0.5},
    ]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 2/20  epoch 0.5  loss 0.25  lr 0.0001  grad_norm nan  2 s/step  00:00:36 left"
    assert lines[1] == "step 2/20  validation_loss 0.5" and len(lines) == 2


def test_the_bar_shows_loss_and_steps_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    metrics = Metrics.from_config(make_config(tmp_path), total_steps=4, samples_per_step=1, start_step=1)
    for step in (2, 3):
        metrics.advance()
        metrics.log(step, loss=0.125)
    metrics.close()
    shown = capsys.readouterr().err
    assert "3/4" in shown and "loss 0.125" in shown and "left" not in shown


def test_resuming_removes_the_rows_after_the_resumed_step(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": step / 10}) for step in (10, 20, 30)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join([*lines, '{"step": 3']), encoding="utf-8")
    Metrics.from_config(make_config(tmp_path), total_steps=40, samples_per_step=1, start_step=20, rank=1).close()
    assert len(file.read_text().splitlines()) == 4  # other ranks leave it alone
    metrics = Metrics.from_config(make_config(tmp_path), total_steps=40, samples_per_step=1, start_step=20)
    metrics.record(25, loss=9.0)
    metrics.close()
    assert rows(tmp_path) == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}, {"step": 25, "loss": 9.0}]
    Metrics.from_config(make_config(tmp_path), total_steps=40, samples_per_step=1).close()
    assert rows(tmp_path) == []  # a new run begins


def test_a_file_that_is_rotated_or_cut_goes_on_under_its_name(tmp_path: Path) -> None:
    metrics = Metrics.from_config(make_config(tmp_path), 10, 1)
    path = tmp_path / "metrics.jsonl"
    metrics.record(1, loss=1.0)
    path.rename(tmp_path / "metrics.jsonl.1")
    path.touch()  # as logrotate's create does
    metrics.record(2, loss=2.0)
    metrics.record(3, loss=3.0)
    assert [row["step"] for row in rows(tmp_path)] == [2, 3]
    assert json.loads((tmp_path / "metrics.jsonl.1").read_text())["step"] == 1
    os.truncate(path, 0)  # as logrotate's copytruncate does
    metrics.record(4, loss=4.0)
    assert [row["step"] for row in rows(tmp_path)] == [4]
    path.unlink()
    metrics.record(5, loss=5.0)
    metrics.close()
    assert [row["step"] for row in rows(tmp_path)] == [5]


def test_other_ranks_write_nothing(tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics.from_config(make_config(tmp_path / "run", wandb_mode="offline"), 5, 1, rank=1)
    metrics.advance()
    metrics.log(1, loss=1.0)
    metrics.record(1, validation_loss=1.0)
    metrics.images(1, tmp_path / "a.png")
    metrics.say("hello")
    with metrics.paused():
        pass
    metrics.close()
    assert not (tmp_path / "run").exists() and wandb.runs == [] and capsys.readouterr().err == ""


NO_NETWORK = """
import socket, sys

def audit(event, arguments):
    away = event == "socket.connect" and arguments[0].family != socket.AF_UNIX  # wandb's own service is here
    if away or event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        print("network:", event, arguments, file=sys.stderr)
        raise OSError("no network")

sys.addaudithook(audit)
"""
# The service is no Python and asks the server for its features, by name; of a proxy it leaves the name to it.
NO_NAMES = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("netrc", "variables", "found"),
    [
        ("", {}, False),
        ("", {"WANDB_API_KEY": "k" * 40}, True),
        ("api.wandb.ai", {}, True),
        ("other.host", {}, False),
        ("127.0.0.1", {"WANDB_BASE_URL": "http://127.0.0.1"}, True),
    ],
)
def test_where_the_real_package_finds_a_key(tmp_path: Path, netrc: str, variables: dict[str, str], found: bool) -> None:
    """The call that `Metrics` makes, in a process of its own (the package remembers).

    No name is looked up and nobody is called, which can take minutes where there is no network: who tries to is told.
    """
    file = tmp_path / "netrc"
    file.write_text(f"machine {netrc} login user password {'k' * 40}\n" if netrc else "", encoding="utf-8")
    file.chmod(0o600)
    program = f"{NO_NETWORK}import wandb; print(wandb.login(prompt=False, verify=False))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = clean | {"NETRC": str(file), "HOME": str(tmp_path)} | NO_NAMES | variables
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == str(found) and "network:" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("flag", "variable", "key", "mode"),
    [
        ("auto", None, None, "offline"),
        ("auto", None, "variable", "online"),
        ("auto", "offline", "variable", "offline"),
        ("online", "offline", "variable", "online"),
        ("offline", None, "variable", "offline"),
        ("auto", "disabled", "variable", None),
        ("disabled", None, "variable", None),
    ],
)
def test_the_mode_of_wandb(
    tmp_path: Path,
    wandb: FakeWandb,
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    variable: str | None,
    key: str | None,
    mode: str | None,
) -> None:
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    Metrics.from_config(make_config(tmp_path, wandb_mode=flag), 5, 1).close()
    assert [run.options["mode"] for run in wandb.runs] == ([mode] if mode else [])
    assert all(run.finished for run in wandb.runs)


def test_wandb_gets_the_configuration_and_keeps_its_run(tmp_path: Path, wandb: FakeWandb) -> None:
    config = make_config(tmp_path / "cats", wandb_mode="online", wandb_project="p", lora_rank=8)
    wandb_id = None
    for start in (0, 3, 0):
        metrics = Metrics.from_config(
            config, 5, 2, start, facts={"trainable": 12}, wandb_id=wandb_id if start else None
        )
        wandb_id = metrics.wandb_id
        metrics.log(start + 1, loss=0.5)
        metrics.images(start + 1, tmp_path / "a.png")
        metrics.close()
    first, resumed, fresh = wandb.runs
    assert first.options["id"] == resumed.options["id"] != fresh.options["id"]
    assert [run.options["resume"] for run in wandb.runs] == [None, "allow", None]
    assert first.options["config"]["lora_rank"] == 8 and first.options["config"]["trainable"] == 12
    assert (first.options["project"], first.options["name"]) == ("p", "cats")
    assert fresh.logged == [rows(tmp_path / "cats")[-1], {"step": 1, "samples": f"{tmp_path}/a.png"}]


def test_a_wandb_that_fails_is_told_once_and_ends_nothing(
    tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics.from_config(make_config(tmp_path, wandb_mode="offline"), 5, 1)
    wandb.runs[0].broken = True
    for step in (1, 2, 3):
        metrics.record(step, loss=0.5)
    metrics.close()
    assert len(rows(tmp_path)) == 3
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "connection lost" in warnings[0]


def test_an_unreachable_or_missing_wandb_ends_nothing(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.unreachable = True
    Metrics.from_config(make_config(tmp_path, wandb_mode="online"), 5, 1).close()
    assert [run.options["mode"] for run in wandb.runs] == ["offline"]
    assert "recorded offline (no answer in 30 s)" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    metrics = Metrics.from_config(make_config(tmp_path, wandb_mode="online"), 5, 1)
    metrics.record(1, loss=0.5)
    metrics.close()
    assert "W&B is off" in capsys.readouterr().err and len(rows(tmp_path)) == 1


def test_the_run_folder_says_what_made_the_run(tmp_path: Path) -> None:
    from train.config.command_line import parse

    config = make_config(tmp_path / "new" / "run", lora_rank=4)
    versions = prepare_run_folder(config, {"train_batch_size": 2}, {})
    assert parse(["--config", str(config.output_path / "config.yaml")]) == config
    assert json.loads((config.output_path / "deepspeed.json").read_text()) == {"train_batch_size": 2}
    assert json.loads((config.output_path / "versions.json").read_text()) == versions
    assert versions["torch"] and {"git_commit", "command", "python"} <= set(versions)


def test_no_room_and_no_permission_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match=r" left, the run needs 1e\+06 TB: free some"):
        check_room(make_config(tmp_path), 10**18 // 16, 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=300_000))
    with pytest.raises(OSError, match=r"has 300 KB left, the run needs 1.6 MB: free some"):
        check_room(make_config(tmp_path / "new"), 100_000, 1)
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="output_path: cannot write to"):
        check_room(make_config(tmp_path / "file" / "run"), 1, 1)
    assert not (tmp_path / "new").exists()


def test_a_row_is_written_a_step_late_and_never_lost(tmp_path: Path) -> None:
    """The device has a step's time to send its numbers; what is written beside, or the end, waits for them."""
    metrics = Metrics.from_config(make_config(tmp_path), total_steps=9, samples_per_step=1)
    loss = torch.tensor(0.5)
    metrics.log(1, loss=loss)
    loss += 1  # belongs to the next row
    assert rows(tmp_path) == []
    metrics.advance()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 0.5)]
    metrics.log(2, loss=loss)
    metrics.record(2, validation_loss=0.1)
    assert [(row["step"], row.get("loss")) for row in rows(tmp_path)] == [(1, 0.5), (2, 1.5), (2, None)]
    metrics.log(3, loss=loss)
    metrics.log(4, loss=loss)  # nothing came in between
    metrics.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 2, 3, 4]
