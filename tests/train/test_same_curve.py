"""One global batch, however it is split over ranks and accumulation steps, and whatever they become on the way: one curve.

The global batch is the micro-batches of an optimizer step: ranks × accumulation of them, of `batch_size` samples each.
"""

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from data_prep import make_shards
from demo.random_model import write_random_encoded, write_random_model
from tests.helpers.data_sets import give_weights
from tests.helpers.forked_ranks import import_once, run_ranks  # noqa: F401 (a fixture)
from train import train_lora

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


@pytest.fixture(scope="module")
def paths(small_model, tmp_path_factory) -> list[str]:
    """Flags for the small model and 20 samples in two buckets: an epoch is no multiple of any step's micro-batches."""
    folder = tmp_path_factory.mktemp("curve") / "data"
    write_random_encoded(folder, 20, 32, 48, prompt_tokens=6, text_dim=64, buckets=2)
    return ["--model", str(small_model), "--data", str(folder)]


def train(commands: list[list[str]]) -> list[int]:
    return [train_lora.main(command) for command in commands]


def command(paths: list[str], output: Path, zero: str, accumulation: int, steps: int = STEPS) -> list[str]:
    return [
        *paths,
        *("--output_path", str(output), "--deepspeed", str(ROOT / "ds_configs" / f"{zero}.json"), "--dtype", "float32"),
        *("--lora_rank", "3", "--lora_target_modules", "to_q,to_k,img_mlp.net.2", "--learning_rate", "1e-2"),
        *("--batch_size", "2", "--gradient_accumulation_steps", str(accumulation), "--max_steps", str(steps)),
        *("--caption_dropout", "0.3", "--lora_dropout", "0.1", "--lr_scheduler", "constant", "--lr_warmup_steps", "2"),
        *("--num_workers", "0", "--log_steps", "1", "--save_steps", "0", "--wandb_mode", "disabled"),
        *("--validation_samples", "3", "--validation_steps", "0"),
    ]


def curve(output: Path, name: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def assert_same(outputs: list[Path], weights_within: float = 2e-5) -> None:
    """Losses, validation losses, gradient norms and the LoRA itself agree to rounding; and they do move."""
    first, *others = outputs
    weights = load_file(first / "lora.safetensors")
    assert len(set(curve(first))) == STEPS and len(set(curve(first, "validation_loss"))) == 2
    for other in others:
        for name, tolerance in (("loss", 2e-6), ("grad_norm", 2e-5)):
            assert curve(other, name) == pytest.approx(curve(first, name), rel=tolerance), (other.name, name)
        for end in (0, -1):
            here, there = (curve(output, "validation_loss")[end] for output in (other, first))
            assert here == pytest.approx(there, rel=2e-6), other.name
        for name, tensor in load_file(other / "lora.safetensors").items():
            assert (tensor - weights[name]).abs().max() < weights_within, (other.name, name)


def run_splits(paths: list[str], folder: Path, zeros: tuple[str, ...], splits: list[tuple[int, int]]) -> list[Path]:
    """Train with each (ranks, accumulation); the output folders."""
    outputs = []
    for world, accumulation in splits:
        here = {zero: folder / f"{zero}-{world}x{accumulation}" for zero in zeros}
        commands = [command(paths, output, zero, accumulation) for zero, output in here.items()]
        assert run_ranks(world, train, commands) == [0] * len(zeros)
        outputs += here.values()
    return outputs


def draw_pictures(folder: Path, count: int) -> None:
    """Pictures of two sizes with captions of several lengths."""
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (96, 64) if number % 2 else (64, 64), (17 * number, 90, 255 - 17 * number)).save(
            folder / f"{number:02d}.png"
        )
        (folder / f"{number:02d}.txt").write_text("soft colors " * (1 + number % 3))


@pytest.fixture(scope="module")
def whole(paths, tmp_path_factory) -> Path:
    """One rank that is left alone."""
    return run_splits(paths, tmp_path_factory.mktemp("whole"), ("zero2",), [(1, 6)])[0]


def test_two_and_three_ranks_give_the_curve_of_one(paths, whole, tmp_path):
    assert_same([whole, *run_splits(paths, tmp_path, ("zero2",), [(2, 3), (3, 2)])])


@pytest.mark.slow
@pytest.mark.parametrize("zeros", [("zero2", "zero3"), ("zero2_offload", "zero3_offload")], ids=["device", "offload"])
@pytest.mark.parametrize("splits", [[(1, 2), (2, 1)], [(1, 3), (3, 1)], [(1, 6), (2, 3), (3, 2), (6, 1)]], ids=str)
def test_every_split_gives_one_curve(paths, tmp_path, zeros, splits):
    assert_same(run_splits(paths, tmp_path, zeros, splits))


@pytest.mark.parametrize(
    "worlds",
    [
        (2, 1, 3),
        *(pytest.param(w, marks=pytest.mark.slow) for w in [(1, 2, 3), (1, 3, 2), (2, 3, 1), (3, 1, 2), (3, 2, 1)]),
    ],
    ids=str,
)
def test_resuming_with_other_numbers_of_ranks_follows_the_curve(paths, whole, tmp_path, worlds):
    """Two steps with each; ZeRO-2 and ZeRO-3 take turns, since a checkpoint knows neither."""
    for turn, world in enumerate(worlds, start=1):
        zero = "zero3" if turn == 2 else "zero2"
        assert run_ranks(world, train, [command(paths, tmp_path / "moved", zero, 6 // world, 2 * turn)]) == [0]
    assert_same([whole, tmp_path / "moved"])


@pytest.fixture(scope="module")
def mixed(small_model, tmp_path_factory) -> list[str]:
    """Flags for two sets, one with weights of its samples and one with its own, and a prior set."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, samples, tokens in (("cats", 20, 6), ("dogs", 9, 7), ("prior", 7, 5)):
        write_random_encoded(folder / name, samples, 32, 48, prompt_tokens=tokens, text_dim=64, buckets=2)
    give_weights(folder / "cats", [3.0, 0.25, 1.0, 1.0, 1.5] * 4)
    prior = ["--prior_data", str(folder / "prior"), "--prior_share", "0.4", "--prior_weight", "0.3"]
    return ["--model", str(small_model), "--data", str(folder / "cats"), "--data", f"{folder}/dogs:0.5", *prior]


def test_weights_several_sets_and_a_prior_give_one_curve(mixed, tmp_path):
    """Over numbers of ranks, and resumed 2 → 1 → 3; with losses of subject and prior of their own."""
    whole = run_splits(mixed, tmp_path, ("zero2",), [(1, 6), (2, 3)])
    for turn, world in enumerate((2, 1, 3), start=1):
        assert run_ranks(world, train, [command(mixed, tmp_path / "moved", "zero2", 6 // world, 2 * turn)]) == [0]
    assert_same([*whole, tmp_path / "moved"])
    for name in ("loss/subject", "loss/prior"):
        assert curve(tmp_path / "moved", name) == pytest.approx(curve(whole[0], name), rel=2e-6)
    parts = zip(*(curve(whole[0], name) for name in ("loss", "loss/subject", "loss/prior")), strict=True)
    shares = [(both - subject) / (prior - subject) for both, subject, prior in parts]
    assert shares == pytest.approx([2 / 6, 2 / 6, 3 / 6, 2 / 6, 3 / 6, 2 / 6], rel=1e-3), (
        "0.4 of six micro-batches a step"
    )


def test_another_share_set_or_weight_is_another_run(mixed, tmp_path, capfd):
    """Refused where the stream would be another one; told where only the gradient is."""
    assert run_ranks(1, train, [command(mixed, tmp_path / "run", "zero2", 1, 2)]) == [0]
    *_, model, _, cats, _, dogs, _, prior, _, share, _, weight = mixed
    for flags, word in (
        (["--data", cats, dogs.replace("0.5", "2"), "--prior_data", prior, "--prior_share", share], "data is "),
        (["--data", cats, dogs, "--prior_data", prior, "--prior_share", "0.5"], 'order.prior.share is "2/5"'),
        (["--data", cats, dogs], "data is "),
    ):
        flags = ["--model", model, *flags, "--prior_weight", weight]
        capfd.readouterr()
        assert run_ranks(1, train, [command(flags, tmp_path / "run", "zero2", 1, 3)]) == [2]
        assert word in capfd.readouterr().err
    flags = [
        "--model",
        model,
        "--data",
        cats,
        dogs,
        "--prior_data",
        prior,
        "--prior_share",
        share,
        "--prior_weight",
        "0.5",
    ]
    assert run_ranks(1, train, [command(flags, tmp_path / "run", "zero2", 1, 3)]) == [0]
    assert "config.prior_weight is 0.3 in the checkpoint, 0.5 in this run" in capfd.readouterr().out


@pytest.mark.parametrize("family", ["edit-2511"])
def test_edits_give_one_curve_too(family, tmp_path):
    """Pairs with two source images in batches of two, dropped captions with their own pictures, the second row of 2511: over
    ranks, accumulation, ZeRO-2 and 3; and a run that was interrupted has the uninterrupted one's bits."""
    write_random_model(tmp_path / "model", layers=2, heads=1, text_dim=64, family=family)
    write_random_encoded(
        tmp_path / "data", 20, 32, 48, 6, 64, buckets=2, family=family, sources=((48, 32), (16, 32)), picture_tokens=4
    )
    paths = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    runs = run_splits(paths, tmp_path, ("zero2",), [(1, 2)])
    assert_same([*runs, *run_splits(paths, tmp_path, ("zero2", "zero3"), [(2, 1)])])
    again = tmp_path / "again"
    for steps in (3, STEPS):
        assert run_ranks(1, train, [command(paths, again, "zero2", 2, steps)]) == [0]
    assert curve(again) == curve(runs[0])
    weights = load_file(runs[0] / "lora.safetensors")
    assert all((tensor == weights[name]).all() for name, tensor in load_file(again / "lora.safetensors").items())
    with safe_open(again / "lora.safetensors", "pt") as file:
        assert file.metadata()["model_family"] == "Qwen-Image-Edit-2511"


def test_class_prompts_give_one_curve_too(tiny_model, tmp_path):
    """Which micro-batches train the base's prediction depends on their place alone: over ranks, accumulation, ZeRO-2 and 3; and
    an interrupted run has the uninterrupted one's bits. Another share is another curve."""
    draw_pictures(tmp_path / "pictures", 14)
    packed = ["--dataset_base_path", str(tmp_path / "pictures"), "--output_path", str(tmp_path / "data")]
    assert make_shards.main([*packed, "--max_pixels", "6144", "--num_workers", "0"]) == 0
    paths = ["--model", str(tiny_model), "--data", str(tmp_path / "data"), "--prior_prompt", "a dog"]
    paths += ["--prior_prompt", "a large dog on a meadow", "--prior_prompt_share", "0.5"]
    runs = run_splits(paths, tmp_path, ("zero2",), [(1, 2)])
    assert_same([*runs, *run_splits(paths, tmp_path, ("zero2", "zero3"), [(2, 1)])])
    again, other = tmp_path / "again", tmp_path / "other"
    for steps in (3, STEPS):
        assert run_ranks(1, train, [command(paths, again, "zero2", 2, steps)]) == [0]
    assert curve(again) == curve(runs[0])
    weights = load_file(runs[0] / "lora.safetensors")
    assert all((tensor == weights[name]).all() for name, tensor in load_file(again / "lora.safetensors").items())
    assert run_ranks(1, train, [command([*paths[:-1], "0.2"], other, "zero2", 2)]) == [0]
    assert curve(other) != curve(runs[0])
