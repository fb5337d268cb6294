"""ZeRO-2 and ZeRO-3, with and without offload, against a plain loop on one process: the same losses, the same LoRA.

The plain loop is written out here: no DeepSpeed, no checkpointing, no accumulation tricks; gradients of all samples of a
step are averaged, clipped and given to torch's AdamW.
"""

import copy
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from demo.random_model import write_random_encoded, write_random_model
from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.model.conditioning import Prompt
from qwen_image.pipeline import load_transformer
from tests.helpers.forked_ranks import run_ranks
from train import train_lora
from train.config.command_line import parse
from train.config.zero_plan import ZeroPlan
from train.data.batch import make_batch
from train.data.shard_dataset import ShardDataset
from train.fit.memory_plan import Setup
from train.flow.timestep_sampling import SigmaSampling
from train.loader.from_config import RunData
from train.loader.indexed_loader import draw_sample
from train.lora.inject import inject_lora, lora_parameters
from train.lora.spec import LoraSpec
from train.lora.targets import resolve_targets
from train.process.ranks import Ranks
from train.step.flow_matching_module import FlowMatchingModule

for _module in (
    "deepspeed.runtime.engine",
    "peft",
    "functorch.compile",
    "pyarrow.dataset",
    "qwen_image.model.modulation",
    "train.saving.checkpoints",
    "train.saving.lora_export",
    "train.base_model.load_pipeline",
    "train.watching.metrics",
    "train.watching.sample_images",
    "train.step.speedups",
):
    importlib.import_module(_module)  # before the ranks are forked, or each of them imports it

ROOT = Path(__file__).resolve().parents[3]
STEPS, ACCUMULATION, SAMPLES = 20, 2, 24
CONFIGS = ["zero2", "zero2_offload", "zero3", "zero3_offload"]
CASES = [(config, blocks) for config in CONFIGS for blocks in ("none", "full")]
SLOWEST = [("zero3", "full"), ("zero3_offload", "none")]  # left to the slow tests: a minute on one core


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two buckets, prompts of three lengths: padding and masks occur when samples are batched."""
    folder = tmp_path_factory.mktemp("data") / "encoded"
    return write_random_encoded(folder, SAMPLES, 32, 32, prompt_tokens=6, text_dim=64, buckets=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Transformer and scheduler alone, two blocks of width 128, over three files."""
    folder = tmp_path_factory.mktemp("model") / "random"
    write_random_model(folder, layers=2, heads=1, text_dim=64, file_bytes=1_000_000)
    assert len(list((folder / "transformer").glob("*.safetensors"))) == 3
    return folder


def flags(model: Path, data: Path, output: Path, config: str, *more: str) -> list[str]:
    return [
        *("--deepspeed", f"{ROOT / 'ds_configs' / config}.json", "--model", str(model), "--data", str(data)),
        *("--output_path", str(output), "--dtype", "float32", "--lora_rank", "3", "--learning_rate", "2e-3"),
        *(
            "--num_workers",
            "0",
            "--log_steps",
            "1",
            "--wandb_mode",
            "disabled",
            "--save_steps",
            "0",
            "--lora_target_modules",
            "to_q,img_mlp.net.2",
        ),
        *("--max_steps", str(STEPS), "--gradient_accumulation_steps", str(ACCUMULATION), *more),
    ]


def pefts_lokr(transformer: Any, spec: LoraSpec, seed: int) -> None:
    """PEFT's own layers with PEFT's own forward, which puts each update together; our starting values."""
    from peft import LoKrConfig, inject_adapter_in_model

    targets = resolve_targets(transformer, spec.target_modules)
    ours = copy.deepcopy(transformer)
    inject_lora(ours, spec, seed)
    config = LoKrConfig(
        r=spec.rank,
        alpha=spec.alpha,
        decompose_factor=spec.factor,
        decompose_both=spec.decompose_both,
        target_modules=targets,
    )
    inject_adapter_in_model(config, transformer)
    start = lora_parameters(ours)
    for name, parameter in lora_parameters(transformer).items():
        parameter.data.copy_(start[name])


def plain_loop(arguments: list[str], world: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final LoRA weights (by short name) of the same training, in torch alone."""
    config = parse(arguments)
    transformer = load_transformer(resolve_model(ModelSource(config.model), ("transformer",)), torch.float32)
    spec = LoraSpec.from_config(config)
    if spec.is_lokr:
        pefts_lokr(transformer, spec, config.seed)
    else:
        inject_lora(transformer, spec, config.seed, torch.float32)
    module = FlowMatchingModule(transformer, config.loss_weighting, torch.float32)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    dataset = ShardDataset(config.data[0])
    order = dataset.order(config.batch_size, config.seed, config.shuffle_window, config.tail, config.dataset_repeat)
    losses, micro_batches = [], ACCUMULATION * world
    for step in range(STEPS):
        total = torch.zeros(())
        for place in range(step * micro_batches, (step + 1) * micro_batches):
            epoch, indices = order.micro_batch(place)
            batch = make_batch(dataset, place, epoch, indices, lambda *a: draw_sample(0, SigmaSampling(), 0.0, *a))
            prompt = Prompt(batch.prompt_embeds, batch.prompt_mask)
            total = total + module(batch.latents, batch.noise, batch.sigma, prompt).mean() / micro_batches
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses, {name: parameter.detach() for name, parameter in lora_parameters(transformer).items()}


def train_all(runs: list[list[str]]) -> list[int]:
    """On every rank: one training after the other."""
    return [train_lora.main(run) for run in runs]


def losses_of(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def check_all_equal_plain(
    world: int, cases: list[tuple[str, str]], model: Path, data: Path, folder: Path, *more: str
) -> None:
    outputs = {case: folder / "-".join(case) for case in cases}
    runs = [flags(model, data, outputs[c], c[0], "--activation_checkpointing", c[1], *more) for c in cases]
    assert run_ranks(world, train_all, runs) == [0] * len(runs)
    losses, weights = plain_loop(runs[0], world)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-3)
    for case, output in outputs.items():
        assert losses_of(output) == pytest.approx(losses, rel=2e-6), case
        saved = load_file(output / "lora.safetensors")
        names = {n: f"transformer.{n}" if ".lokr_" in n else f"transformer.{n}.weight" for n in weights}
        assert saved.keys() == set(names.values())
        worst = max((saved[names[name]] - weights[name]).abs().max() for name in weights)
        assert worst < 2e-6, (case, worst)


@pytest.fixture(scope="module")
def whole_model(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with encoders, for sample images, and the data as if they had made it."""
    copy = shutil.copytree(data, tmp_path_factory.mktemp("data") / "encoded")
    files = resolve_model(ModelSource(str(tiny_model)))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["encoding"] |= {part: files.fingerprint(part) for part in ("vae", "text_encoder")}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return tiny_model, copy


def write_config(folder: Path, name: str, base: str, **zero: Any) -> str:
    """A DeepSpeed JSON beside the four of the project; what `flags` takes for it."""
    config = json.loads((ROOT / "ds_configs" / f"{base}.json").read_text())
    config["zero_optimization"] |= zero
    (folder / f"{name}.json").write_text(json.dumps(config))
    return str(folder / name)


@pytest.mark.parametrize("which", ["offload", pytest.param("hpz", marks=pytest.mark.slow)])
def test_variants_of_stage_3(
    whole_model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """Sample images, validation, hpZ and offloaded activations change nothing; checkpoints hold LoRA alone."""
    monkeypatch.setattr("train.step.offload_activations.SMALLEST_BYTES", 0)
    variants = {
        "zero2": ("zero2", []),
        "offload": ("zero3_offload", ["--offload_activations", "true"]),
        "hpz": (write_config(tmp_path, "hpz", "zero3", zero_hpz_partition_size=2), []),
    }
    variants = {name: variants[name] for name in ("zero2", which)}
    more = ["--max_steps", "3", "--validation_samples", "3", "--validation_steps", "2", "--sample_prompts", "a", "b, c"]
    more += [
        "--sample_steps",
        "2",
        "--sample_height",
        "32",
        "--sample_width",
        "48",
        "--sample_num_inference_steps",
        "2",
    ]
    runs = [flags(*whole_model, tmp_path / name, file, *more, *extra) for name, (file, extra) in variants.items()]
    assert run_ranks(2, train_all, runs) == [0] * len(runs)

    def outcome(name: str) -> tuple[list[float], list[float], np.ndarray]:
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        validation = [row["validation_loss"] for row in rows if "validation_loss" in row]
        images = [np.array(Image.open(p)) for p in sorted((tmp_path / name / "samples").glob("step-*/0*.png"))]
        return [row["loss"] for row in rows if "loss" in row], validation, np.stack(images).astype(int)

    losses, validation, images = outcome("zero2")
    assert len(losses) == 3 and len(validation) == 3 and len(images) == 2 * 2
    for name in variants:
        assert outcome(name)[0] == pytest.approx(losses, rel=2e-6), name
        assert outcome(name)[1] == pytest.approx(validation, rel=2e-6), name
        assert abs(outcome(name)[2] - images).max() <= 1, name  # of 255: float32 rounding at a pixel's edge
        (state,) = (tmp_path / name / "checkpoints").rglob("*.safetensors")
        tensors = load_file(state)
        assert all(".lora_" in key for key in tensors)
        trained = load_file(tmp_path / name / "lora.safetensors")
        assert sum(t.numel() for t in tensors.values()) == 3 * sum(t.numel() for t in trained.values())


def test_two_ranks_equal_the_plain_loop(model: Path, data: Path, tmp_path: Path) -> None:
    check_all_equal_plain(2, [case for case in CASES if case not in SLOWEST], model, data, tmp_path)


LOKR = ("--lora_type", "lokr", "--lokr_factor", "8", "--lokr_decompose_both", "true")


@pytest.mark.parametrize(
    "world,config", [(1, "zero2"), (2, "zero2"), (2, "zero3_offload"), pytest.param(3, "zero3", marks=pytest.mark.slow)]
)
def test_a_lokr_equals_the_plain_loop_with_pefts_own_layers(
    model: Path, data: Path, tmp_path: Path, world: int, config: str
) -> None:
    """Both factors of low rank on some layers, whole on others; blocks kept and recomputed."""
    check_all_equal_plain(world, [(config, "full" if world == 2 else "none")], model, data, tmp_path, *LOKR)


def test_a_lokr_goes_on_with_other_numbers_of_ranks(model: Path, data: Path, tmp_path: Path) -> None:
    """2 → 1 → 3 ranks follow one curve; and what was interrupted with one number of ranks has the same bits."""
    whole, moved, stopped = tmp_path / "whole", tmp_path / "moved", tmp_path / "stopped"

    def split(output: Path, world: int, steps: int, config: str = "zero2") -> list[str]:
        more = ["--max_steps", str(steps), "--gradient_accumulation_steps", str(6 // world), "--ema_decay", "0.9"]
        return flags(model, data, output, config, *LOKR, *more)

    assert run_ranks(1, train_all, [split(whole, 1, 6)]) == [0]
    for world, steps, config in ((2, 2, "zero2"), (1, 4, "zero3"), (3, 6, "zero2")):
        assert run_ranks(world, train_all, [split(moved, world, steps, config)]) == [0]
    for steps in (3, 6):
        assert run_ranks(1, train_all, [split(stopped, 1, steps)]) == [0]
    assert losses_of(stopped) == losses_of(whole) and len(losses_of(whole)) == 6
    assert losses_of(moved) == pytest.approx(losses_of(whole), rel=2e-6)
    for name in ("lora.safetensors", "lora-ema.safetensors"):
        tensors = load_file(whole / name)
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in load_file(stopped / name).items())
        assert all((tensor - tensors[key]).abs().max() < 2e-5 for key, tensor in load_file(moved / name).items())


@pytest.mark.slow
def test_two_ranks_equal_the_plain_loop_in_the_other_cases(model: Path, data: Path, tmp_path: Path) -> None:
    check_all_equal_plain(2, SLOWEST, model, data, tmp_path)


@pytest.mark.slow
def test_three_ranks_equal_the_plain_loop(model: Path, data: Path, tmp_path: Path) -> None:
    check_all_equal_plain(3, CASES, model, data, tmp_path)


def test_dora_needs_whole_weights(model: Path, data: Path, tmp_path: Path) -> None:
    config = parse(flags(model, data, tmp_path, "zero3", "--lora_dora", "true"))
    ranks, spec = Ranks(0, 1, 0, torch.device("cpu")), LoraSpec.from_config(config)

    def setup(zero: ZeroPlan) -> Setup:
        return Setup.from_config(config, zero, spec, RunData.from_config(config, ranks), ranks)

    with pytest.raises(
        ValueError, match=r"lora_dora needs whole, exact weights at every step: use ds_configs/zero2\.json"
    ):
        setup(ZeroPlan(3, offload_param=True))
    setup(ZeroPlan(2))
