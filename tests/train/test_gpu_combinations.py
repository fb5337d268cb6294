"""Every combination of what may be switched on to fit or to be fast trains the same LoRA; needs a GPU.

    python -m pytest -n 4 tests/train/test_gpu_combinations.py       # 144 combinations, four blocks of the real width

The real command runs in this process on one model, written once. What is compared: the losses of four steps with those of
the plain run of the same base precision, and that every lora_B moved away from zero.
"""

import gc
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from demo.random_model import write_random_encoded, write_random_model
from train import train_lora
from train.step.flow_matching_module import FlowMatchingModule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and float8 products need a GPU")

ROOT = Path(__file__).resolve().parents[2]
BLOCKS, HEADS, TEXT_DIM, SIDE, STEPS = 4, 24, 3584, 256, 4
TOLERANCE = 2e-3  # of a loss, relative: bf16 sums in another order (q, k, v as one product or three) differ by less
FLOAT8_TOLERANCE = 3e-2  # between the base precisions


class Combination(NamedTuple):
    checkpointing: str  # none, some of the blocks, all
    offload_activations: str
    cuda_graphs: str
    base_precision: str
    zero: str  # of ds_configs/

    def __str__(self) -> str:
        graphs = "graphs" if self.cuda_graphs == "on" else "launched"
        offload = "offload_activations" if self.offload_activations == "true" else "kept"
        return "-".join([self.zero, self.base_precision, f"checkpointing_{self.checkpointing}", offload, graphs])


COMBINATIONS = [
    Combination(*values)
    for values in itertools.product(
        ("none", str(BLOCKS // 2), "full"),
        ("false", "true"),
        ("off", "on"),
        ("dtype", "float8", "int8"),
        ("zero2", "zero2_offload", "zero3", "zero3_offload"),
    )
]
PLAIN = {base: Combination("none", "false", "off", base, "zero2") for base in ("dtype", "float8", "int8")}


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """The model and the data, on the disk once for all runs."""
    folder = tmp_path_factory.mktemp("combinations")
    write_random_model(folder / "model", layers=BLOCKS, heads=HEADS, text_dim=TEXT_DIM)
    data = write_random_encoded(folder / "data", 2 * STEPS, SIDE, SIDE, prompt_tokens=40, text_dim=TEXT_DIM)
    common = ["--model", str(folder / "model"), "--data", str(data), "--max_steps", str(STEPS), "--batch_size", "2"]
    common += ["--lora_rank", "8", "--learning_rate", "1e-3", "--seed", "3", "--num_workers", "0", "--log_steps", "1"]
    return [*common, "--compile", "off", "--wandb_mode", "disabled", "--save_steps", "0", "--resume", "never"]


@pytest.fixture(scope="module")
def plain(flags, tmp_path_factory) -> dict[str, list[float]]:
    """The losses of the plain run on each base."""
    found = {}
    for base, combination in PLAIN.items():
        output = tmp_path_factory.mktemp("plain")
        assert train(combination, flags, output) == 0
        found[base] = losses(output)
    return found


def train(combination: Combination, flags: list[str], output: Path) -> int:
    more = ["--output_path", str(output), "--deepspeed", str(ROOT / "ds_configs" / f"{combination.zero}.json")]
    more += ["--activation_checkpointing", combination.checkpointing, "--cuda_graphs", combination.cuda_graphs]
    more += ["--offload_activations", combination.offload_activations, "--base_precision", combination.base_precision]
    try:
        return train_lora.main([*flags, *more])
    finally:
        forget_modules()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def forget_modules() -> None:
    """DeepSpeed keeps every engine of a process alive by its hooks: let at least the weights and graphs of them go."""
    for module in [each for each in gc.get_objects() if isinstance(each, FlowMatchingModule)]:
        module.graphs = module.transformer.block_stream = module.transformer.modulation_table = None
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.data = torch.empty(0, dtype=tensor.dtype)


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_it_trains_as_the_plain_run_does(combination, flags, plain, tmp_path, capfd):
    code = train(combination, flags, tmp_path / "run")
    assert code == 0, capfd.readouterr().err
    assert len(losses(tmp_path / "run")) == STEPS
    assert losses(tmp_path / "run") == pytest.approx(plain[combination.base_precision], rel=TOLERANCE)
    weights = load_file(tmp_path / "run" / "lora.safetensors")
    still = [name for name, tensor in weights.items() if "lora_B" in name and not tensor.any()]
    assert not still, f"{len(still)} lora_B are zero, first {still[0]}"
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("base", ["float8", "int8"])
def test_8_bits_are_near_the_exact_base(plain, base):
    assert plain[base] == pytest.approx(plain["dtype"], rel=FLOAT8_TOLERANCE)
    assert plain[base] != plain["dtype"], f"the base is not in {base}"
