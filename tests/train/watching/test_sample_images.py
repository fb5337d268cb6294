"""Sample images while training: what is drawn, that training doesn't notice, and images that don't fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from demo.random_model import write_random_encoded
from qwen_image.loading.model_files import ModelSource, resolve_model
from qwen_image.pipeline import QwenImagePipeline
from tests.helpers.forked_ranks import import_once, run_ranks  # noqa: F401 (a fixture)
from train.config.sample_prompts import SamplePrompt
from train.watching.image_grid import read_parameters
from train.watching.sample_images import deal

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = """
- soft colours
- prompt: a fox
  negative_prompt: blurry
  width: 48
  height: 64
  true_cfg_scale: 1
  num_inference_steps: 3
  seed: 7
  lora_strength: 0.5
- prompt: zwei Füchse
  num_inference_steps: 1
"""


@pytest.fixture(scope="module")
def paths(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for a model with encoders, data as if they had made it, and a file of prompts."""
    folder = tmp_path_factory.mktemp("sampled")
    data = write_random_encoded(folder / "data", 12, 32, 32, prompt_tokens=6, text_dim=64, buckets=2)
    files = resolve_model(ModelSource(str(tiny_model)))
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["encoding"] |= {part: files.fingerprint(part) for part in ("vae", "text_encoder")}
    (data / "manifest.json").write_text(json.dumps(manifest))
    (folder / "prompts.yaml").write_text(PROMPTS, encoding="utf-8")
    flags = ["--model", str(tiny_model), "--data", str(data), "--dtype", "float32", "--lora_rank", "3"]
    flags += ["--lora_target_modules", "to_q,img_mlp.net.2", "--learning_rate", "2e-2", "--max_steps", "3"]
    flags += ["--num_workers", "0", "--log_steps", "1", "--wandb_mode", "disabled", "--save_steps", "0"]
    return [*flags, "--activation_checkpointing", "full", "--cuda_graphs", "off"]


def sampling(paths: list[str]) -> list[str]:
    prompts = Path(paths[3]).parent / "prompts.yaml"
    size = ["--sample_height", "32", "--sample_width", "32", "--sample_num_inference_steps", "2"]
    return ["--sample_prompts", str(prompts), *size, "--sample_steps", "2"]


def runs(commands: list[list[str]], zero: str = "zero2", prepare: Callable[[], None] = lambda: None) -> list[int]:
    from train import train_lora

    prepare()
    return [train_lora.main(["--deepspeed", str(ROOT / "ds_configs" / f"{zero}.json"), *each]) for each in commands]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_training_does_not_notice(paths: list[str], tmp_path: Path) -> None:
    """The same bits with and without, with dropout's draws and a moving average; and what is drawn is what was asked."""
    more = ["--lora_dropout", "0.2", "--ema_decay", "0.5"]
    commands = [[*paths, *more, "--output_path", str(tmp_path / name)] for name in ("plain", "sampled")]
    commands[1] += sampling(paths)
    assert run_ranks(1, runs, commands) == [0, 0]
    names = ("step", "loss", "grad_norm")
    rows = []
    for name in ("plain", "sampled"):
        every = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        rows.append([[row[key] for key in names] for row in every if "loss" in row])
    assert rows[0] == rows[1] and len(rows[0]) == 3
    for file in ("lora.safetensors", "lora-ema.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in ("plain", "sampled"))
        assert all(torch.equal(one[key], two[key]) for key in one)

    samples = tmp_path / "sampled" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == ["base", "step-00000002", "step-00000003"]
    step = samples / "step-00000003"
    assert sorted(path.name for path in step.iterdir()) == sorted(
        [f"{n:02d}{kind}.png" for n in range(3) for kind in ("", "-ema")] + ["grid.png"]
    )
    assert pixels(step / "01.png").shape == (64, 48, 3) and pixels(step / "00.png").shape == (32, 32, 3)
    facts = read_parameters(step / "01-ema.png")
    assert facts["negative_prompt"] == "blurry" and facts["seed"] == 7 and facts["step"] == 3
    assert facts["lora_strength"] == 0.5 and facts["weights"] == "ema"
    assert all((pixels(step / f"{n:02d}.png") != pixels(samples / "base" / f"{n:02d}.png")).any() for n in range(3))
    assert (pixels(step / "00.png") != pixels(step / "00-ema.png")).any()
    sheet = Image.open(step / "grid.png")
    assert sheet.width > 32 + 48 + 32 and sheet.height > 3 * 64

    pipeline = QwenImagePipeline.from_pretrained(paths[1], dtype=torch.float32)  # the base, as sample.py draws it
    expected = pipeline.generate(["a fox"], height=64, width=48, num_inference_steps=3, true_cfg_scale=1, seeds=[7])
    assert np.abs(pixels(samples / "base" / "01.png") - expected[0].numpy()).max() <= 1


def test_a_resumed_run_makes_the_base_s_images_once(paths: list[str], tmp_path: Path) -> None:
    command = [*paths, *sampling(paths), "--output_path", str(tmp_path / "run"), "--sample_steps", "0"]
    assert run_ranks(1, runs, [[*command, "--max_steps", "1"]]) == [0]
    base = tmp_path / "run" / "samples" / "base"
    before = {path.name: path.stat().st_mtime_ns for path in base.iterdir()}
    assert len(before) == 3
    assert run_ranks(1, runs, [command]) == [0]
    assert {path.name: path.stat().st_mtime_ns for path in base.iterdir()} == before
    (base / "01.png").write_bytes(b"not an image")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert run_ranks(1, runs, [command]) == [0]
    assert pixels(base / "01.png").shape == (64, 48, 3)


def test_all_ranks_draw_under_stage_3(paths: list[str], tmp_path: Path) -> None:
    """Images of different sizes, numbers of passes and strengths, while each pass is a collective: as under stage 2."""
    for zero in ("zero2", "zero3"):
        command = [*paths, *sampling(paths), "--output_path", str(tmp_path / zero), "--ema_decay", "0.5"]
        assert run_ranks(2, runs, [command], zero) == [0]
    files = sorted(path.relative_to(tmp_path / "zero2") for path in (tmp_path / "zero2" / "samples").rglob("*.png"))
    assert len(files) == 3 + 2 * (2 * 3 + 1)
    for file in files:
        assert np.abs(pixels(tmp_path / "zero3" / file) - pixels(tmp_path / "zero2" / file)).max() <= 2, file


def too_large() -> None:
    """An image of 64 × 48 runs out of memory on the rank that makes it."""
    generate = QwenImagePipeline.generate

    def limited(self: QwenImagePipeline, prompts: Any, **options: Any) -> torch.Tensor:
        if options["height"] == 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return generate(self, prompts, **options)

    QwenImagePipeline.generate = limited  # type: ignore[method-assign]


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_images_that_do_not_fit_are_left_out(
    paths: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], zero: str
) -> None:
    """One line each time, the others are drawn, and the training's numbers are those of a run without samples."""
    command = [*paths, "--output_path", str(tmp_path / "run")]
    assert run_ranks(2, runs, [[*command, *sampling(paths)]], zero, too_large) == [0]
    said = [line for line in capfd.readouterr().out.splitlines() if "left out" in line]
    assert len(said) == 3 and "1 of 3 left out, they don't fit into memory (first 48×64, a fox)" in said[1]
    step = tmp_path / "run" / "samples" / "step-00000003"
    assert sorted(path.name for path in step.iterdir()) == ["00.png", "02.png", "grid.png"]


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_dealing(world: int, in_step: bool) -> None:
    """Every image once; in step, all ranks make as many passes in each turn."""
    samples = [SamplePrompt(prompt=str(n), num_inference_steps=2 + n % 3) for n in range(7)]
    dealt = [deal(samples, rank, world, in_step) for rank in range(world)]
    assert sorted(job.place for jobs in dealt for job in jobs if job.counts) == list(range(7))
    if in_step:
        passes = [[samples[job.place].passes for job in jobs] for jobs in dealt]
        assert all(each == passes[0] for each in passes)
