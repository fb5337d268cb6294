"""The DeepSpeed JSON: what is refused, what is filled in, and that the real engine trains with the result."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from train.config.deepspeed_json import load_deepspeed_config, walk, warnings
from train.config.train_config import TrainConfig

CONFIGS = Path(__file__).parents[3] / "ds_configs"
NAMES = ["zero2", "zero2_offload", "zero3", "zero3_offload"]


def make_config(**changes: Any) -> TrainConfig:
    options: dict[str, Any] = {"model": "owner/model", "data": "shards", "deepspeed": "z.json", "output_path": "run"}
    return TrainConfig(**(options | changes))


def write_json(folder: Path, settings: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings), encoding="utf-8")
    return path


def zero(stage: int = 2, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


@pytest.mark.parametrize("name", NAMES)
def test_our_files_are_completed_from_the_flags(name: str) -> None:
    config = make_config(batch_size=3, gradient_accumulation_steps=2, max_grad_norm=0.5, dtype="float32")
    settings = load_deepspeed_config(CONFIGS / f"{name}.json", config, world_size=4)
    assert settings["train_micro_batch_size_per_gpu"] == 3 and settings["gradient_accumulation_steps"] == 2
    assert settings["train_batch_size"] == 24 and settings["gradient_clipping"] == 0.5
    assert settings["bf16"] == {"enabled": False} and settings["timers"] == {"throughput": {"enabled": False}}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"} and settings["communication_data_type"] == "fp32"
    assert settings["zero_force_ds_cpu_optimizer"] is False
    assert warnings(settings) == []
    for lora_dtype, enabled in ((None, True), ("bfloat16", True), ("float32", False)):
        mixed = make_config(dtype="bfloat16", lora_dtype=lora_dtype)
        assert load_deepspeed_config(CONFIGS / f"{name}.json", mixed, 1)["bf16"] == {"enabled": enabled}


def test_every_key_of_our_files_is_explained() -> None:
    explained = (CONFIGS / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        settings = load_deepspeed_config(CONFIGS / f"{name}.json", make_config(), world_size=1)
        for place, _ in walk(settings):
            assert f"`{place.removeprefix('zero_optimization.')}`" in explained, place


def test_numbers_that_agree_are_accepted(tmp_path: Path) -> None:
    numbers = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1}
    settings = zero() | numbers | {"bf16": {"enabled": True}, "gradient_accumulation_steps": 2}
    config = make_config(batch_size=2, gradient_accumulation_steps=2)
    assert load_deepspeed_config(write_json(tmp_path, settings), config, world_size=2)["train_batch_size"] == 8


REFUSALS: list[tuple[Any, str]] = [
    ('{"zero_optimization": {"stage": 2,}}', "line 1, column "),
    ('{\n  "zero_optimization": {"stage": 2}\n  "x": 1}', "line 3, column 3: Expecting ',' delimiter"),
    ('{"zero_optimization": {"stage": 2, "stage": 3}}', "stage is given twice"),
    ("[]", "must hold one JSON object"),
    (zero() | {"gradient_cliping": 1.0}, "unknown key gradient_cliping (did you mean gradient_clipping?)"),
    (zero() | {"bogus": 1.0}, "unknown key bogus"),
    (zero(overlap_com=True), "unknown key zero_optimization.overlap_com (did you mean overlap_comm?)"),
    (zero(3, prefetch_bucket_size=1), "(did you mean stage3_prefetch_bucket_size?)"),
    (zero(offload_optimizer={"device": "gpu"}), "zero_optimization.offload_optimizer.device: "),
    (zero(offload_optimizer={"devise": "cpu"}), "zero_optimization.offload_optimizer.devise: "),
    (zero(reduce_bucket_size=-1), "zero_optimization.reduce_bucket_size: "),
    (zero() | {"bf16": {"enable": True}}, "unknown key bf16.enable (did you mean enabled?)"),
    (zero() | {"data_types": {"grad_dtype": "fp32"}}, "unknown key data_types.grad_dtype (did you mean grad_accum_"),
    (zero() | {"timers": {"throughput": 3}}, "throughput must be an object, got 3"),
    ({"zero_optimization": True}, "zero_optimization must be an object, got true"),
    (zero(reduce_bucket_size="auto"), 'zero_optimization.reduce_bucket_size is "auto"'),
    (zero() | {"train_batch_size": "auto"}, 'train_batch_size is "auto"'),
    ({}, "zero_optimization.stage must be 2 or 3, got null"),
    (zero(0), "stage must be 2 or 3, got 0"),
    (zero(1), "stage must be 2 or 3, got 1"),
    (zero() | {"fp16": {"enabled": True}}, "fp16 does not belong here: training is bfloat16 or float32: use --dtype"),
    (zero() | {"optimizer": {"type": "AdamW"}}, "--learning_rate"),
    (zero() | {"scheduler": {"type": "WarmupLR"}}, "--lr_scheduler"),
    (zero() | {"activation_checkpointing": {}}, "--activation_checkpointing"),
    (zero() | {"wandb": {"enabled": True}}, "--wandb_mode"),
    (zero() | {"flops_profiler": {"enabled": True}}, "flops_profiler does not belong here"),
    (zero(round_robin_gradients=True), "LoRA files written under it are wrong"),
    (zero(3, zero_quantized_nontrainable_weights=True), "turns the frozen bf16 weights into noise"),
    (zero(cpu_offload=True), "offload_optimizer"),
    (zero(offload_param={"device": "cpu"}), "offload_param needs stage 3"),
    (zero(3, zero_hpz_partition_size=3), "zero_hpz_partition_size (3) must divide the 2 ranks"),
    (zero(3, offload_param={"device": "nvme"}), "offload_param.device nvme is not supported"),
    (
        zero(2, offload_optimizer={"device": "nvme", "nvme_path": "/no"}),
        "offload_optimizer.device nvme is not supported",
    ),
    (zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}), "offload_optimizer.ratio must be 1"),
    (zero() | {"train_batch_size": 8}, "train_batch_size is 8, but --batch_size 1 × 2 × 2 ranks = 4: make them agree"),
    (zero() | {"train_micro_batch_size_per_gpu": 2}, "is 2, but --batch_size 1"),
    (zero() | {"gradient_accumulation_steps": 1}, "is 1, but --gradient_accumulation_steps 2"),
    (zero() | {"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but --max_grad_norm 1.0"),
    (zero() | {"gradient_clipping": True}, "gradient_clipping is true, but --max_grad_norm 1.0"),
    (zero() | {"bf16": {"enabled": False}}, "bf16.enabled is false, but LoRA weights are bfloat16"),
    (zero() | {"zero_force_ds_cpu_optimizer": True}, "the trainer's own optimizer"),
    (zero() | {"communication_data_type": "fp16"}, "communication_data_type must be fp32 or bf16"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSALS, ids=[message for _, message in REFUSALS])
def test_a_key_that_does_nothing_or_harm_is_refused(tmp_path: Path, settings: Any, message: str) -> None:
    path = write_json(tmp_path, settings)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_deepspeed_config(path, make_config(gradient_accumulation_steps=2), world_size=2)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no DeepSpeed configuration at "):
        load_deepspeed_config(tmp_path / "none.json", make_config(), world_size=1)


def test_slow_and_lossy_keys_are_pointed_out(tmp_path: Path) -> None:
    slow = {
        "wall_clock_breakdown": True,
        "communication_data_type": "bf16",
        "timers": {"throughput": {"enabled": True}},
    }
    lines = warnings(load_deepspeed_config(write_json(tmp_path, zero(3) | slow), make_config(), world_size=1))
    starts = [
        "wall_clock_breakdown",
        "timers.throughput.enabled",
        "communication_data_type",
    ]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 3


@pytest.mark.parametrize("stage", [2, 3])
def test_keys_of_deepspeeds_own_stage_3_are_told_once(tmp_path: Path, stage: int) -> None:
    """Every copy of the files that were shipped before holds six of them."""
    old = zero(stage, stage3_max_live_parameters=1, stage3_prefetch_bucket_size=9, memory_efficient_linear=False)
    (line,) = warnings(load_deepspeed_config(write_json(tmp_path, old), make_config(), 1))
    assert line.startswith(
        "stage3_max_live_parameters, stage3_prefetch_bucket_size, memory_efficient_linear: no longer used"
    )


# Two layers with a frozen weight and a trained low-rank one each, trained with and without DeepSpeed on the same batch.
TRAINING = """
import json, sys
import torch, deepspeed
from train.config.train_config import TrainConfig
from train.config.deepspeed_json import load_deepspeed_config

torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo alone: nothing to compile
BATCH = torch.rand(2, 4, 32, generator=torch.Generator().manual_seed(1))  # input and target of 4 samples
STEPS = 6


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base = torch.nn.Linear(32, 32)
        self.low = torch.nn.Linear(32, 4, bias=False)
        self.up = torch.nn.Linear(4, 32, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return torch.tanh(self.base(x) + self.up(self.low(x)))


def build(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(Layer(), Layer()).to(dtype)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss_of(model, dtype, x, y):
    return (model(x.to(dtype)).float() - y).square().mean()


def with_deepspeed(path, config, dtype, rank, world):
    model, trained = build(dtype)
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate)
    settings = load_deepspeed_config(path, config, world)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=trained, config=settings)
    assert engine.train_batch_size() == 4
    losses = []
    for _ in range(STEPS):
        mean = torch.zeros(())
        for part in range(config.gradient_accumulation_steps):
            first = (part * world + rank) * config.batch_size
            loss = loss_of(engine, dtype, *BATCH[:, first : first + config.batch_size])
            engine.backward(loss)
            engine.step()
            mean += loss.detach() / config.gradient_accumulation_steps / world
        torch.distributed.all_reduce(mean)
        losses.append(mean.item())
    assert engine.global_steps == STEPS
    return losses


def in_plain_torch(config, dtype):
    model, trained = build(dtype)
    masters = [parameter.detach().float() for parameter in trained]
    optimizer = torch.optim.AdamW(masters, lr=config.learning_rate)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model, dtype, *BATCH)
        loss.backward()
        for master, parameter in zip(masters, trained):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, config.max_grad_norm)
        optimizer.step()
        for master, parameter in zip(masters, trained):
            parameter.data.copy_(master)
        losses.append(loss.item())
    return losses


deepspeed.init_distributed("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
out, *cases = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
results = []
for path, name, accumulation in (case.split(":") for case in cases):
    config = TrainConfig(model="a/b", data="d", deepspeed=path, output_path="o", dtype=name, learning_rate=3e-2,
                         batch_size=4 // world // int(accumulation), gradient_accumulation_steps=int(accumulation),
                         max_grad_norm=0.05)
    dtype = getattr(torch, name)
    results.append([with_deepspeed(path, config, dtype, rank, world), in_plain_torch(config, dtype)])
if rank == 0:
    with open(out, "w") as file:
        json.dump(results, file)
torch.distributed.destroy_process_group()
"""


def launch_training(folder: Path, world: int, *cases: tuple[str, str, int]) -> list[tuple[list[float], list[float]]]:
    """Losses under the real launcher and in plain torch with float32 master weights, for each (file, dtype, accumulation)."""
    script, out = folder / "training.py", folder / "losses.json"
    script.write_text(TRAINING, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", str(world), "--master_port", str(port), str(script), str(out)]
    command += [f"{CONFIGS / name}.json:{dtype}:{accumulation}" for name, dtype, accumulation in cases]
    variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parent)}
    variables["PATH"] = f"{launcher.parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return [(losses, expected) for losses, expected in json.loads(out.read_text())]


def test_the_engine_trains_as_plain_torch_does(tmp_path: Path) -> None:
    exact, rounded = launch_training(tmp_path, 2, ("zero2", "float32", 2), ("zero3_offload", "bfloat16", 1))
    for (losses, expected), tolerance in ((exact, 1e-6), (rounded, 5e-3)):
        assert losses == pytest.approx(expected, rel=tolerance)
        assert expected[-1] < 0.8 * expected[0]
