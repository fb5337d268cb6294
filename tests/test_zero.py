"""ZeRO-2 and ZeRO-3, with and without offload, against a plain loop on one process: the same losses, the same LoRA.

The plain loop is written out here: no DeepSpeed, no checkpointing, no accumulation tricks; gradients of all samples of a
step are averaged, clipped and given to torch's AdamW.
"""

import importlib
import json
from pathlib import Path

import pytest
import torch
from forked_ranks import run_ranks
from safetensors.torch import load_file

from demo.random_model import write_random_encoded, write_random_model
from qwen_image.loading import ModelSource, resolve_model
from qwen_image.pipeline import load_transformer
from qwen_image.text_encoder import Prompt
from train import train_lora
from train.command_line import parse
from train.data import ShardDataset, make_batch
from train.flow import SigmaSampling
from train.loader import draw_sample
from train.lora import LoraSpec, inject_lora, lora_parameters
from train.module import FlowMatchingModule

_MODULES = "deepspeed.runtime.engine peft functorch.compile pyarrow.dataset train.checkpoint train.export train.frozen train.preview"
for _module in _MODULES.split():
    importlib.import_module(_module)  # before the ranks are forked, or each of them imports it

ROOT = Path(__file__).resolve().parent.parent
STEPS, ACCUMULATION, SAMPLES = 20, 2, 24
CONFIGS = ["zero2", "zero2_offload", "zero3", "zero3_offload"]
CASES = [(config, blocks) for config in CONFIGS for blocks in ("none", "full")]


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
        *("--deepspeed", str(ROOT / "ds_configs" / f"{config}.json"), "--model", str(model), "--data", str(data)),
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


def plain_loop(arguments: list[str], world: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final LoRA weights (by short name) of the same training, in torch alone."""
    config = parse(arguments)
    transformer = load_transformer(resolve_model(ModelSource(config.model), ("transformer",)), torch.float32)
    inject_lora(transformer, LoraSpec.from_config(config), config.seed, torch.float32)
    module = FlowMatchingModule(transformer, config.loss_weighting, torch.float32)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    dataset = ShardDataset(config.data)
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


def check_all_equal_plain(world: int, cases: list[tuple[str, str]], model: Path, data: Path, folder: Path) -> None:
    outputs = {case: folder / "-".join(case) for case in cases}
    runs = [flags(model, data, outputs[c], c[0], "--activation_checkpointing", c[1]) for c in cases]
    assert run_ranks(world, train_all, runs) == [0] * len(runs)
    losses, weights = plain_loop(runs[0], world)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-3)
    for case, output in outputs.items():
        assert losses_of(output) == pytest.approx(losses, rel=2e-6), case
        saved = load_file(output / "lora.safetensors")
        assert saved.keys() == {f"transformer.{name}.weight" for name in weights}
        worst = max((saved[f"transformer.{name}.weight"] - weights[name]).abs().max() for name in weights)
        assert worst < 2e-6, (case, worst)


def test_two_ranks_equal_the_plain_loop(model: Path, data: Path, tmp_path: Path) -> None:
    check_all_equal_plain(2, CASES, model, data, tmp_path)


@pytest.mark.slow
def test_three_ranks_equal_the_plain_loop(model: Path, data: Path, tmp_path: Path) -> None:
    check_all_equal_plain(3, CASES, model, data, tmp_path)
