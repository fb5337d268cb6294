"""sample.py's sheets of LoRAs × strengths, and images made several at once: each is the image that is made by itself."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_image.pipeline import QwenImagePipeline
from train import sample
from train.lora.inject import inject_lora, lora_parameters
from train.lora.lora_file import save_lora
from train.lora.spec import LoraSpec
from train.watching.image_grid import read_parameters


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> Path:
    """A run folder with the LoRAs of two steps, the earlier one with the later name."""
    folder = tmp_path_factory.mktemp("sheets") / "run"
    folder.mkdir()
    for number, (step, rank) in enumerate(((20, 4), (10, 2))):
        pipeline = QwenImagePipeline.from_pretrained(str(tiny_model), components=("transformer",), dtype=torch.float32)
        spec = LoraSpec(("proj_out", "to_q"), rank, rank)
        inject_lora(pipeline.transformer, spec)
        for name, parameter in lora_parameters(pipeline.transformer).items():
            if name.endswith("lora_B"):
                parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(step))
        path = folder / f"lora-{step:08d}.safetensors"
        save_lora(path, lora_parameters(pipeline.transformer), spec, {}, torch.float32)
        os.utime(path, (1000 + number, 1000 + number))
    return folder


def flags(model: Path, output: Path, *more: str) -> list[str]:
    size = ["--height", "32", "--width", "48", "--num_inference_steps", "2", "--dtype", "float32"]
    return ["--model", str(model), "--output_path", str(output), *size, *more]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_sheet_has_a_row_a_lora_and_a_column_a_strength(tiny_model, run, tmp_path):
    out = tmp_path / "sheets"
    prompts = ["--prompt", "a fox", "--prompt", "two foxes"]
    strengths = ["--strengths", "0", "0.5", "1"]
    assert sample.main(flags(tiny_model, out, *prompts, "--checkpoints", str(run), *strengths)) == 0
    names = [f"{n:03d}-seed0-lora-{step:08d}-{s}.png" for n in (0, 1) for step in (10, 20) for s in ("0.5", "1")]
    names += [f"{n:03d}-seed0-base.png" for n in (0, 1)]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "grid-000.png", "grid-001.png"])
    # Each is what the command makes of that LoRA at that strength alone.
    for step, strength in ((10, "0.5"), (20, "1")):
        alone, file = tmp_path / f"{step}", run / f"lora-{step:08d}.safetensors"
        assert sample.main(flags(tiny_model, alone, *prompts, "--lora", str(file), "--lora_strength", strength)) == 0
        for n in (0, 1):
            shown = out / f"{n:03d}-seed0-lora-{step:08d}-{strength}.png"
            assert np.array_equal(pixels(shown), pixels(alone / f"{n:03d}-seed0.png"))
            facts = read_parameters(shown)
            assert facts["lora"] == str(file) and facts["lora_strength"] == float(strength)
    assert sample.main(flags(tiny_model, tmp_path / "base", *prompts)) == 0
    assert np.array_equal(pixels(out / "001-seed0-base.png"), pixels(tmp_path / "base" / "001-seed0.png"))
    sheet = Image.open(out / "grid-000.png")
    assert sheet.width > 3 * 48 and 2 * 32 < sheet.height < 6 * 32
    cells = [pixels(out / "000-seed0-base.png"), pixels(out / "000-seed0-lora-00000020-1.png")]
    whole = np.asarray(sheet.convert("RGB"))
    found = [places(whole, cell) for cell in cells]
    assert len(found[0]) == 2 and len({column for _, column in found[0]}) == 1, "the base is each row's first"
    (row, column), first_row = found[1][0], min(row for row, _ in found[0])
    assert len(found[1]) == 1 and column > found[0][0][1] and row == first_row, "written first, so the first row"


def places(whole: np.ndarray, cell: np.ndarray) -> list[tuple[int, int]]:
    """Row and column of every place where `cell` stands in `whole`, pixel for pixel."""
    height, width = cell.shape[:2]
    rows, columns = whole.shape[0] - height + 1, whole.shape[1] - width + 1
    same = [(y, x) for y in range(rows) for x in range(columns) if np.array_equal(whole[y, x], cell[0, 0])]
    return [(y, x) for y, x in same if np.array_equal(whole[y : y + height, x : x + width], cell)]


def test_images_of_one_kind_are_made_at_once_and_equal_those_made_alone(tiny_model, tmp_path, monkeypatch):
    """A prompt of another size or guidance is of another kind, wherever it stands in the file."""
    file = tmp_path / "prompts.yaml"
    entries = ["{prompt: a fox}", "{prompt: wide, width: 64}", "{prompt: two foxes, seed: 4}", "{prompt: a b}"]
    file.write_text("".join(f"- {entry}\n" for entry in [*entries, "{prompt: guided, true_cfg_scale: 2}"]))
    batches: list[int] = []
    real = QwenImagePipeline.generate
    monkeypatch.setattr(
        QwenImagePipeline,
        "generate",
        lambda self, prompts, **more: batches.append(len(prompts)) or real(self, prompts, **more),
    )
    for size in (1, 2, 8):
        assert (
            sample.main(flags(tiny_model, tmp_path / f"{size}", "--prompt", str(file), "--batch_size", str(size))) == 0
        )
    assert sorted(batches[:5]) == [1] * 5 and sorted(batches[5:9]) == [1, 1, 1, 2] and sorted(batches[9:]) == [1, 1, 3]
    for name in ("000-seed0", "001-seed0", "002-seed4", "003-seed0", "004-seed0"):
        one, *others = (pixels(tmp_path / f"{size}" / f"{name}.png").astype(int) for size in (1, 2, 8))
        assert all(np.abs(one - other).max() <= 1 for other in others), name
    assert pixels(tmp_path / "8" / "001-seed0.png").shape == (32, 64, 3)


def test_a_batch_that_does_not_fit_is_halved_and_said(tiny_model, tmp_path, monkeypatch, capsys):
    real = QwenImagePipeline.generate

    def small(self, prompts, **more):
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, prompts, **more)

    words = flags(tiny_model, tmp_path / "one", "--prompt", "a fox", "--num_images", "3")
    assert sample.main([*words, "--batch_size", "1"]) == 0
    monkeypatch.setattr(QwenImagePipeline, "generate", small)
    words[words.index(str(tmp_path / "one"))] = str(tmp_path / "halved")
    assert sample.main([*words, "--batch_size", "3"]) == 0
    said = capsys.readouterr().err
    assert "3 images at once don't fit into memory: 1 at a time" in said and "2 images at once don't fit" in said
    for seed in range(3):
        name = f"{seed:03d}-seed{seed}.png"
        assert np.array_equal(pixels(tmp_path / "halved" / name), pixels(tmp_path / "one" / name))


@pytest.mark.parametrize(
    "more,message",
    [
        (("--checkpoints", "EMPTY"), "is a folder without LoRA files"),
        (("--checkpoints", "EMPTY/none.safetensors"), "--checkpoints: no file at"),
        (("--strengths", "1"), "--strengths are a LoRA's"),
        (("--checkpoints", "EMPTY", "--lora", "x"), "--checkpoints are LoRAs each by itself"),
        (("--strengths", "nan", "--lora", "x"), "--strengths must be a finite number"),
    ],
)
def test_what_makes_no_sheet_is_one_line(tiny_model, tmp_path, capsys, more, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    words = [word.replace("EMPTY", str(empty)) for word in more]
    assert sample.main(flags(tiny_model, tmp_path / "out", "--prompt", "a fox", *words)) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()
