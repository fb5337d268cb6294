"""The benchmark of the real command, on the CPU with a tiny model: what it measures is what happened, and is kept."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from bench import measured_training, real_command, train_step
from bench.random_transformer import drawn_instead_of_read
from bench.run_watch import device_profile
from data_prep.shard_format.shards import read_index, read_manifest
from demo.random_model import write_random_encoded, write_random_model
from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.loading.staged import load_staged

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hollow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hollow") / "model"
    write_random_model(folder, layers=2, heads=2, text_dim=64, hollow=True)
    return folder


def test_a_hollow_model_takes_no_room_and_its_weights_are_drawn(hollow_model: Path):
    sizes = [path.stat() for path in hollow_model.rglob("*.safetensors")]
    assert sum(size.st_size for size in sizes) > 5_000_000
    assert sum(size.st_blocks * 512 for size in sizes) < 500_000
    files = resolve_model(ModelSource(str(hollow_model)), ("transformer",))
    read = load_staged(files, torch.bfloat16, "cpu")
    assert not any(parameter.any() for parameter in read.parameters())
    with drawn_instead_of_read():
        drawn = load_staged(files, torch.bfloat16, "cpu", base_float8=True, sigmas=[0.25, 0.5])
    assert drawn.modulation_table is not None
    assert 0.005 < drawn.modulation_table.rows.float().std() < 0.1
    for name, parameter in drawn.named_parameters():
        values = parameter.float()
        if parameter.ndim == 1 and "bias" not in name:
            assert (values == 1).all(), name
        else:
            assert values.std() > 0.01, name
    assert not any(parameter.any() for parameter in load_staged(files, torch.bfloat16, "cpu").parameters())


def test_encoded_noise_of_given_sizes_and_lengths(tmp_path: Path):
    sizes, lengths = [(32, 64), (64, 32), (48, 48)], [3, 9, 5, 7]
    folder = write_random_encoded(tmp_path / "data", 4, 0, 0, lengths, 64, sizes)
    assert [(bucket.width, bucket.height, bucket.count) for bucket in read_manifest(folder).buckets] == [
        (32, 64, 2),
        (64, 32, 1),
        (48, 48, 1),
    ]
    index = read_index(folder)
    assert list(index.prompt_tokens) == lengths and list(index.bucket) == [0, 1, 2, 0]


def test_mixed_sizes_are_the_packers_buckets_of_one_area():
    sizes = real_command.mixed_sizes(1024)
    assert len(set(sizes)) == 10 and {(height, width) for width, height in sizes} == set(sizes)
    assert all(0.9 * 1024**2 < width * height <= 1024**2 for width, height in sizes)


def kernel(start: float, end: float, name: str = "gemm", device: str = "CUDA") -> SimpleNamespace:
    kind = getattr(torch.autograd.DeviceType, device)
    return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end))


def test_idle_time_is_what_no_kernel_covers():
    first = [kernel(0, 50), kernel(400, 500), kernel(600, 700), kernel(900, 1000)]  # the device waits: it doesn't count
    second = [
        kernel(1100, 1200),  # after 100 µs
        kernel(1150, 1180),  # beside another: counts once
        kernel(1205, 1305),  # after a gap of 5 µs
        kernel(1405, 1500),  # after 100 µs
        kernel(1305, 1405, "Memcpy HtoD (Pinned -> Device)"),
        kernel(0, 5000, "cudaGraphLaunch", "CPU"),
    ]
    profile = device_profile([*second, *first], steps=2)
    assert profile["kernels"] == 4
    assert profile["wall"] == pytest.approx(500e-6)
    assert profile["busy"] == pytest.approx(295e-6)
    assert profile["long_gaps"] == pytest.approx(200e-6)
    later = [
        kernel(each.time_range.start + 500, each.time_range.end + 500, each.name)
        for each in second
        if each.name == "gemm"
    ]
    assert device_profile([*first, *second, *later], steps=3) == pytest.approx(profile), "a step's share"
    assert device_profile([], 2) == {} and device_profile(first, 1) == {}


def flags(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    words = ["--deepspeed", ROOT / "ds_configs" / "zero2.json", "--model", model, "--data", data]
    words += ["--output_path", output, "--max_steps", 4, "--save_steps", 0, "--num_workers", 0]
    return [str(word) for word in [*words, "--wandb_mode", "disabled", "--dtype", "float32", *more]]


def test_runs_are_watched_one_after_another(hollow_model: Path, tmp_path: Path):
    import train.engine.deepspeed_engine
    from train.step.cuda_graphs import StepGraphs

    data = write_random_encoded(tmp_path / "data", 3, 0, 0, [8, 4, 6], 64, [(32, 32), (64, 32)])
    hooked = train.engine.deepspeed_engine.initialize, StepGraphs.capture
    runs = [flags(hollow_model, data, tmp_path / name) for name in ("one", "two")]
    (tmp_path / "runs.json").write_text(json.dumps([*runs, [*runs[0], "--resume", "none such"]]))
    results = tmp_path / "results.jsonl"
    measured_training.main(["--runs", str(tmp_path / "runs.json"), "--results", str(results), "--hollow"])
    one, two, bad = (json.loads(line) for line in results.read_text().splitlines())
    assert (train.engine.deepspeed_engine.initialize, StepGraphs.capture) == hooked
    for result in (one, two):
        assert result["code"] == 0 and len(result["steps"]) == 4
        assert [step["seconds"] is None for step in result["steps"]] == [True, False, False, False]
        assert sum(step["seconds"] for step in result["steps"][1:]) < result["seconds"]
        assert {step["tokens"] for step in result["steps"]} == {4 + 8, 4 + 6, 8 + 4}
        assert 0 < result["first_step_after"] < result["seconds"]
        assert result["recomputed"] == 0 and result["blocks"] == 2 and result["predicted_gib"] > 0
    assert bad["code"] == 2 and bad["steps"] == []
    one_row = (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(one_row)["loss"] > 0.1  # not the loss of zeros


def test_a_released_run_leaves_no_weights(hollow_model: Path, tmp_path: Path):
    data = write_random_encoded(tmp_path / "data", 2, 32, 32, [8, 8], 64)
    gc.collect()
    before = tensor_bytes()
    measured_training.watched(flags(hollow_model, data, tmp_path / "run"), hollow=True, another_follows=True)
    assert tensor_bytes() - before < 2_000_000  # the base alone has 18 MB


def tensor_bytes() -> int:
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_a_failed_run_does_not_cost_the_others(monkeypatch: pytest.MonkeyPatch):
    def run(command: list[str]) -> str:
        """Stands in for processes: `bad` kills its process, `wrong` is refused, `full` leaves memory behind."""
        options = dict(zip(command[2::2], command[3::2], strict=False))
        started.append([])
        for (name,) in json.loads(Path(options["--runs"]).read_text()):
            started[-1].append(name)
            if name == "bad":
                raise RuntimeError("out of memory")
            with Path(options["--results"]).open("a") as file:
                file.write(
                    json.dumps({"code": 2 if name == "wrong" else 0, "rank": 0, "host_gib": 1.0, "name": name}) + "\n"
                )
            if name == "full":
                break
        return ""

    started: list[list[str]] = []
    monkeypatch.setattr(measured_training, "run", run)
    names = ["good", "wrong", "bad", "full", "last"]
    results = measured_training.measure_runs([[name] for name in names])
    assert started == [["good", "wrong", "bad"], ["full"], ["last"]]
    assert [None if result is None else result["name"] for result in results] == ["good", None, None, "full", "last"]
    assert measured_training.measure_runs([["good"]], until=0.0) == [None]


def test_a_failed_part_does_not_cost_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(real_command, "measure_runs", lambda runs, **_: [None] * len(runs))
    assert real_command.main(["--part", "single,sizes", "--tiny", "--sizes", "512x1", "--precisions", "float8"]) == 1
    table = capsys.readouterr().out.rpartition("| what | measured")[2]
    assert "| single | failed: " in table and "| float8 32² × 1 | not measured" in table
    assert real_command.main(["--part", "sizes", "--tiny", "--sizes", "512x1", "--precisions", "float8"]) == 1


def test_what_was_measured_is_told_before_the_next_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    def stopped(bench: real_command.RealCommand) -> None:
        assert "| float8 32² × 1 | " in capsys.readouterr().out
        raise KeyboardInterrupt

    result: dict[str, object] = {"steps": [], "recomputed": 0, "blocks": 2}
    monkeypatch.setattr(real_command, "measure_runs", lambda runs, **_: [result] * len(runs))
    monkeypatch.setattr(real_command, "size_row", lambda *_: "0.1")
    monkeypatch.setattr(real_command.RealCommand, "single", stopped)
    out = tmp_path / "out.json"
    flags = ["--part", "sizes,single", "--tiny", "--sizes", "512x1", "--precisions", "float8", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        real_command.main(flags)
    assert json.loads(out.read_text()) == {"float8 32² × 1": result}


def test_only_settled_steps_count():
    step = {"seconds": 1.0, "profiled": False, "captures": 0, "compile_seconds": 0.0, "tokens": 9}
    steps = [step | {"seconds": None}, step, step | {"captures": 1}, step | {"compile_seconds": 2.0}, step]
    steps += [step | {"seconds": 3.0}, step | {"profiled": True}]
    result = {"steps": steps, "recomputed": 3, "blocks": 60, "gpu_gib": 40.0, "predicted_gib": 41.0}
    assert [step["seconds"] for step in measured_training.settled(result, 0)] == [1.0, 1.0, 3.0]
    assert [step["seconds"] for step in measured_training.settled(result, 5)] == [3.0]
    short = json.loads(measured_training.summary(result))
    assert short["step_seconds"] == 2.0 and short["gpu_gib"] == 40.0 and "steps" not in short
    assert json.loads(measured_training.summary({"code": 2, "steps": []})) == {"step_seconds": None, "code": 2}
    assert real_command.size_row(result, 4) == "2.0000, 2.00, 3/60, 40.00, 41.00"
    assert "not measured" in real_command.size_row(None, 4)
    assert "not measured" in real_command.size_row(result | {"steps": steps[:2]}, 4)


@pytest.mark.parametrize("bench", [real_command, train_step])
def test_a_wrong_out_is_refused_before_anything_is_measured(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        bench.main(["--out", str(tmp_path / "none such" / "out.json")])
    assert ended.value.code == 2 and "there is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        bench.main(["--out", str(tmp_path)])
    assert ended.value.code == 2 and "is a folder: name a file in it" in capsys.readouterr().err


def test_a_stopped_train_step_keeps_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Processes are stood in for: the second one is stopped."""

    def measured(_: Any, name: str, *__: Any) -> list[dict[str, Any]]:
        if name == "ours-full":
            raise KeyboardInterrupt
        return [{"name": name, "seconds": 0.3}]

    monkeypatch.setattr(train_step, "in_own_process", measured)
    out = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        train_step.main(["--variants", "ours,ours-full", "--out", str(out)])
    assert json.loads(out.read_text()) == {"peak_tflops": None, "rows": [{"name": "ours", "seconds": 0.3}]}


def test_a_row_of_train_step_that_fails_shows_in_its_exit_code(monkeypatch: pytest.MonkeyPatch):
    """Processes are stood in for."""

    def measured(_: Any, name: str, size: Any, *__: Any) -> list[dict[str, Any]]:
        return [] if name == failing else [{"name": name, "size": size, "seconds": 0.3}]

    monkeypatch.setattr(train_step, "in_own_process", measured)
    codes = {}
    for failing in ("ours-full", "none of them"):
        codes[failing] = train_step.main(["--variants", "ours,ours-full"])
    assert codes == {"ours-full": 1, "none of them": 0}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_ssched_bz_coopA_NNT", "matrix products"),
        ("kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90", "attention"),
        ("triton_red_fused__scaled_mm__to_copy_abs_amax_clamp_div_mul_reciprocal_t_view_16", "everything else"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_mul_3", "everything else"),
        ("triton_tem_fused_addmm_2", "matrix products"),
        ("gelu_gradient_kernel", "everything else"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
    ],
)
def test_kernels_are_told_apart_by_name(name: str, kind: str):
    assert train_step.kind_of(name) == kind


@pytest.mark.slow
def test_the_whole_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.json"
    command = ["--part", "single,mixed,sizes", "--tiny", "--sizes", "1024x1,512x2", "--folder", str(tmp_path)]
    assert real_command.main([*command, "--out", str(out)]) == 0
    table = capsys.readouterr().out.rpartition("| what | measured")[2]
    assert "W&B" in table and "images a second" in table and "not measured: it" not in table
    measured = json.loads(out.read_text())
    assert {"single", "mixed", "bfloat16 64 × 1", "float8 32 × 2"} <= {name.replace("²", "") for name in measured}
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
