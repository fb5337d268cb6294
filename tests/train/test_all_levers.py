"""All levers at once: weights, two sets, a prior set and class prompts, captions that vary, masks, LoRA+, an average.

Image shards, which the ranks encode by themselves: on any number of ranks, and resumed 2 → 1 → 3, one curve and one LoRA.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import make_shards
from tests.helpers.forked_ranks import import_once, run_ranks  # noqa: F401 (a fixture)
from tests.train.test_same_curve import assert_same, command, curve, train

LEVERS = [
    *(
        "--prior_share",
        "0.3",
        "--prior_weight",
        "0.5",
        "--prior_prompt",
        "a fox in the snow",
        "--prior_prompt",
        "a fox",
    ),
    *("--prior_prompt_share", "0.25", "--trigger_word", "zwx", "--caption_shuffle_tags", "--caption_keep_tags", "1"),
    *("--caption_tag_dropout", "0.2", "--caption_alternatives", "--caption_suffix", "in daylight"),
    *("--masked_loss", "--mask_min_weight", "0.2", "--lora_plus_ratio", "4", "--ema_decay", "0.9"),
]


def write_pictures(folder: Path, count: int, seed: int, masks: bool) -> None:
    """Colored noise of two sizes with two captions each, and with masks whose left part counts."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        width = 96 if number % 2 else 64
        pixels = draw.integers(0, 256, (4, width // 16, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        lines = f"a {{red|big}} fox, snow, {number} trees, evening\n[trigger] the fox, grass, number {number}\n"
        (folder / f"{number:02d}.txt").write_text(lines)
        if masks:
            Image.fromarray(np.uint8(255) * (np.indices((64, width))[1] < 16 * (1 + number % 3))).save(
                folder / f"{number:02d}.mask.png"
            )


@pytest.fixture(scope="module")
def paths(tiny_model, tmp_path_factory) -> list[str]:
    """Flags for three sets: one with weights by folder and masks, one at half a weight, one for the prior."""
    folder = tmp_path_factory.mktemp("levers")
    write_pictures(folder / "many" / "2_fox", 6, 0, masks=True)
    write_pictures(folder / "many" / "1_other", 5, 1, masks=True)
    write_pictures(folder / "few", 5, 2, masks=False)
    write_pictures(folder / "class", 4, 3, masks=False)
    for name in ("many", "few", "class"):
        flags = ["--dataset_base_path", str(folder / name), "--output_path", str(folder / f"{name}_shards")]
        assert make_shards.main([*flags, "--max_pixels", "6144", "--caption_lines", "--num_workers", "0"]) == 0
    data = ["--data", str(folder / "many_shards"), "--data", f"{folder}/few_shards:0.5"]
    return ["--model", str(tiny_model), *data, "--prior_data", str(folder / "class_shards"), *LEVERS]


def test_all_levers_at_once_give_one_curve_and_one_lora(paths, tmp_path):
    outputs = []
    for world, accumulation in ((1, 6), (3, 2)):
        outputs.append(tmp_path / f"{world}x{accumulation}")
        assert run_ranks(world, train, [command(paths, outputs[-1], "zero2", accumulation)]) == [0]
    for turn, world in enumerate((2, 1, 3), start=1):
        zero = "zero3" if turn == 2 else "zero2"
        assert run_ranks(world, train, [command(paths, tmp_path / "moved", zero, 6 // world, 2 * turn)]) == [0]
    # A step of lora_B is 0.04, and Adam makes a step of whatever a first gradient's rounding leaves.
    assert_same([*outputs, tmp_path / "moved"], weights_within=2e-4)
    for name in ("loss/subject", "loss/prior", "lr"):
        assert curve(tmp_path / "moved", name) == pytest.approx(curve(outputs[0], name), rel=1e-5), name
