"""--local_model_copy: one copy a node, complete and compared, found again, and left aside where it can't be made."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_image.loading.model_files import ModelFiles, ModelSource, resolve_model
from qwen_image.pipeline import load_transformer
from tests.helpers.forked_ranks import run_ranks
from train.base_model import local_model_copy
from train.base_model.base_plan import BasePlan
from train.base_model.local_model_copy import copies_of, on_local_disks
from train.config.check_paths import check_paths, local_folder
from train.config.train_config import TrainConfig
from train.config.zero_plan import ZeroPlan
from train.lora.spec import LoraSpec
from train.process.ranks import Ranks

ROOT = Path(__file__).resolve().parents[3]
COMPONENTS = ("transformer", "text_encoder", "vae")
CPU = torch.device("cpu")


def config_of(model: Path, **options: Any) -> TrainConfig:
    return TrainConfig(**({"model": str(model), "data": "d", "deepspeed": "d", "output_path": "o"} | options))


def plan_of(model: Path) -> BasePlan:
    config = config_of(model)
    return BasePlan.from_config(config, ZeroPlan(2), LoraSpec.from_config(config), Ranks(0, 1, 0, CPU))


def files_of(model: Path) -> ModelFiles:
    return resolve_model(ModelSource(str(model)), COMPONENTS)


def test_a_copy_is_the_model_and_is_found_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, ranks = plan_of(tiny_model), Ranks(0, 1, 0, CPU)
    assert on_local_disks(plan, True, None, ranks) is plan
    copied = on_local_disks(plan, False, tmp_path / "disk", ranks)
    assert "copied to" in capsys.readouterr().out
    there, here = files_of(tiny_model), resolve_model(copied.source, COMPONENTS)
    for component in COMPONENTS:
        assert here[component].folder.parent == tmp_path / "disk"
        assert here.fingerprint(component) == there.fingerprint(component)
    assert (here.name, copied.identity()) == (there.name, plan.identity())
    expected = load_transformer(there, torch.float32, CPU).state_dict()
    found = load_transformer(here, torch.float32, CPU).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items()) and len(found) == len(expected)

    def fail(*_: Any) -> None:
        raise AssertionError("copied once more")

    monkeypatch.setattr(local_model_copy, "copy_file", fail)
    assert on_local_disks(plan, False, tmp_path / "disk", ranks).source == copied.source
    assert "found in" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "other", "gone"])
def test_a_damaged_copy_is_made_anew(tiny_model: Path, tmp_path: Path, damage: str) -> None:
    files = files_of(tiny_model)
    copy = copies_of(files, tmp_path, "n1").folders["transformer"] / "model-00000.safetensors"
    whole = copy.read_bytes()
    if damage == "gone":
        copy.unlink()
    else:
        copy.write_bytes(whole[:-1] if damage == "cut" else bytes(len(whole)))
    assert "copied to" in copies_of(files, tmp_path, "n1").line and copy.read_bytes() == whole


def test_another_model_of_the_same_name_is_another_copy(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    before = copies_of(files_of(model), tmp_path / "disk", "n1").folders
    weights = next((model / "transformer").glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    after = copies_of(files_of(model), tmp_path / "disk", "n1").folders
    assert after["transformer"] != before["transformer"] and after["vae"] == before["vae"]


def test_without_room_or_right_the_node_reads_from_where_the_model_lies(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, ranks = plan_of(tiny_model), Ranks(0, 1, 0, CPU)
    (tmp_path / "file").write_text("")
    assert on_local_disks(plan, True, tmp_path / "file", ranks).source == plan.source
    assert "warning: " in capsys.readouterr().out
    usage = shutil._ntuple_diskusage(10**9, 10**9, 10**3)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert on_local_disks(plan, True, tmp_path / "full", ranks).source == plan.source
    assert "reads the weights from where they lie" in capsys.readouterr().out
    assert not list((tmp_path / "full").glob("[!.]*"))


def copy_and_tell(files: ModelFiles, folder: Path, told: Any) -> None:
    told.put(copies_of(files, folder, "n1").line)


def test_of_jobs_that_start_together_one_copies_and_the_others_find(tiny_model: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    jobs = [context.Process(target=copy_and_tell, args=(files_of(tiny_model), tmp_path, told)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    lines = [told.get() for _ in jobs]
    assert sum("copied to" in line for line in lines) == 1 and sum("found in" in line for line in lines) == 2, lines


def read_from(model: Path, folder: Path) -> list[str]:
    import torch.distributed as dist

    rank = dist.get_rank()
    base = on_local_disks(plan_of(model), True, folder, Ranks(rank, dist.get_world_size(), rank, CPU))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, base.source.transformer_path)
    return found


def test_the_ranks_of_a_node_share_a_copy(tiny_model: Path, tmp_path: Path) -> None:
    paths = run_ranks(2, read_from, tiny_model, tmp_path)
    assert paths[0] == paths[1] and Path(paths[0]).parent == tmp_path


def test_variables_are_the_nodes_own(
    tmp_path: Path, tiny_model: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_DISK", str(tmp_path))
    assert local_folder(Path("$LOCAL_DISK/weights")) == tmp_path / "weights"
    with pytest.raises(ValueError, match=r"local_model_copy: \$NO_DISK is not set"):
        local_folder(Path("$NO_DISK/weights"))
    options = {
        "local_model_copy": Path("${NO_DISK}"),
        "deepspeed": ROOT / "ds_configs/zero2.json",
        "data": str(small_data),
    }
    config = config_of(tiny_model, **options)
    with pytest.raises(ValueError, match="local_model_copy"):
        check_paths(config)
