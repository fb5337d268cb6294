"""The trainer end to end on the tiny model: equivalent settings agree, only LoRA moves, bad input is one line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline as DiffusersPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from data_prep import encode_shards, make_shards
from qwen_image.model.conditioning import Prompt
from qwen_image.pipeline import QwenImagePipeline, predict_velocity
from train import train_lora
from train.config.command_line import parse
from train.engine import deepspeed_engine as engine
from train.lora.inject import attach_lora
from train.lora.lora_file import read_lora
from train.step import flow_matching_module as module

ROOT = Path(__file__).resolve().parents[2]
NO_TRIALS = ("--activation_checkpointing", "full", "--cuda_graphs", "off")  # on the CPU, no step before the first
TARGETS = "to_q,to_k,to_v,to_out.0,img_mlp.net.2,proj_out"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Image shards: 14 smooth colour pictures in two buckets, captions of several lengths."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(14):
        size = (96, 64) if number % 2 else (64, 64)
        corners = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text("soft colours " * (1 + number % 3))
    shards = tmp_path_factory.mktemp("data") / "shards"
    flags = ["--dataset_base_path", str(folder), "--output_path", str(shards), "--max_pixels", "6144"]
    assert make_shards.main([*flags, "--num_workers", "0"]) == 0
    return shards


@pytest.fixture(scope="module")
def encoded(images, tiny_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "encoded"
    flags = ["--model", str(tiny_model), "--data", str(images), "--output_path", str(output), "--dtype", "float32"]
    assert encode_shards.main(flags) == 0
    return output


def flags(model, data, output, *more):
    return [
        *("--deepspeed", str(ROOT / "ds_configs" / "zero2.json"), "--model", str(model), "--data", str(data)),
        *("--output_path", str(output), "--dtype", "float32", "--lora_rank", "4", "--learning_rate", "2e-3"),
        *("--lora_target_modules", TARGETS, "--num_workers", "0", "--log_steps", "1", "--wandb_mode", "disabled"),
        *("--save_steps", "0", "--caption_dropout", "0.3", *more),
    ]


def run(model, data, output, *more):
    """Train in this process, as a world of one; returns the rows of metrics.jsonl."""
    assert train_lora.main(flags(model, data, output, *more)) == 0
    return rows_of(output)


def launch(ranks, *arguments):
    """Train under the real launcher with so many ranks."""
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        str(ranks),
        "--master_port",
        free_port(),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*launcher, str(ROOT / "train" / "train_lora.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def rows_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(rows):
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def reference(tiny_model, encoded, tmp_path_factory):
    """One rank, accumulation 2, from encoded shards; with validation, a checkpoint half-way and sample images."""
    output = tmp_path_factory.mktemp("run") / "reference"
    more = ["--max_steps", "6", "--gradient_accumulation_steps", "2", "--validation_samples", "3", "--save_steps", "3"]
    more += ["--validation_steps", "6", "--sample_prompts", "soft colours", "--sample_prompts", "b, with a comma"]
    more += [
        "--sample_height",
        "32",
        "--sample_width",
        "48",
        "--sample_num_inference_steps",
        "2",
        "--sample_steps",
        "6",
    ]
    rows = run(tiny_model, encoded, output, *more)
    return output, rows


def test_two_ranks_equal_one_rank_with_accumulation(reference, tiny_model, encoded, tmp_path):
    output = tmp_path / "two"
    launch(
        2,
        *flags(tiny_model, encoded, output, "--max_steps", "6", "--validation_samples", "3", "--validation_steps", "6"),
        *("--activation_checkpointing", "auto"),  # all ranks agree on it
    )
    assert losses(rows_of(output)) == pytest.approx(losses(reference[1]), rel=1e-6)
    one, two = (load_file(path / "lora.safetensors") for path in (reference[0], output))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-6
    validation = [
        [row["validation_loss"] for row in rows if "validation_loss" in row] for rows in (reference[1], rows_of(output))
    ]
    assert len(validation[0]) == 2 and validation[1] == pytest.approx(validation[0], rel=1e-6)


def test_online_encoding_equals_encoded_shards(reference, tiny_model, images, tmp_path):
    more = ["--max_steps", "6", "--gradient_accumulation_steps", "2", "--validation_samples", "3"]
    rows = run(tiny_model, images, tmp_path / "online", *more)
    # Both round embeddings to bf16; a caption encoded in another batch can round to the other neighbour.
    assert losses(rows) == pytest.approx(losses(reference[1]), rel=1e-5)


def test_resumed_equals_uninterrupted(reference, tiny_model, encoded, tmp_path):
    output = tmp_path / "resumed"
    more = ["--gradient_accumulation_steps", "2", "--validation_samples", "3"]
    first = run(tiny_model, encoded, output, "--max_steps", "2", *more)
    # how much is recomputed is this machine's affair, not the run's
    rows = run(tiny_model, encoded, output, "--max_steps", "6", "--activation_checkpointing", "1", *more)
    assert losses(rows)[:2] == losses(first) and losses(rows) == losses(reference[1])
    ids = {json.loads(path.read_text())["client"]["wandb_id"] for path in output.glob("checkpoints/*/*.json")}
    assert len(ids) == 1 and len(list(output.glob("checkpoints/*/*.json"))) == 2  # one W&B run through both
    one, two = (load_file(path / "lora.safetensors") for path in (reference[0], output))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("policy", ["none", "auto"])
def test_activation_checkpointing_changes_nothing(reference, tiny_model, encoded, tmp_path, capsys, policy):
    more = ["--gradient_accumulation_steps", "2", "--validation_samples", "3", "--max_steps", "4"]
    rows = run(tiny_model, encoded, tmp_path / "run", "--activation_checkpointing", policy, *more)
    assert losses(rows) == losses(reference[1])[:4]
    assert ("GiB predicted" in capsys.readouterr().out) == (policy == "auto")


def test_the_run_folder_tells_everything(reference):
    output, rows = reference
    config = parse(["--config", str(output / "config.yaml")])
    assert config.max_steps == 6 and config.lora_rank == 4 and str(config.output_path) == str(output)
    assert json.loads((output / "versions.json").read_text())["torch"] == torch.__version__
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert all({"lr", "grad_norm", "samples_per_second", "epoch"} <= row.keys() for row in steps)
    assert (output / "lora-3.safetensors").is_file() and not (output / "lora-6.safetensors").exists()
    with safe_open(output / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["step"] == "6" and metadata["lora_target_modules"] == TARGETS
    assert metadata["base_model_fingerprint"] and metadata["data_fingerprint"]
    grid = Image.open(output / "samples" / "step-00000006" / "grid.png")
    assert grid.width > 2 * 48 and (output / "samples" / "step-00000006" / "01.png").is_file()


def test_a_checkpoint_holds_lora_and_optimizer_state_alone(reference):
    output, _ = reference
    weights = load_file(output / "lora.safetensors")
    trainable = sum(tensor.numel() for tensor in weights.values())
    checkpoints = sorted((output / "checkpoints").glob("step-*"))
    assert [path.name for path in checkpoints] == ["step-00000003", "step-00000006"]
    state = load_file(checkpoints[-1] / "state.safetensors")
    assert all(".lora_" in name for name in state)
    assert sum(tensor.numel() for tensor in state.values()) == 3 * trainable  # weights and AdamW's two moments


def test_diffusers_agrees_with_the_trained_lora(reference, tiny_model):
    path = reference[0] / "lora.safetensors"
    ours = QwenImagePipeline.from_pretrained(str(tiny_model), components=("transformer",), dtype=torch.float32)
    latents, sigma = torch.randn(1, 24, 64), torch.tensor([0.6])
    prompt = Prompt(torch.randn(1, 9, ours.transformer.config.joint_attention_dim), None)
    attach_lora(ours.transformer, read_lora(path, ours.transformer))
    theirs = DiffusersPipeline.from_pretrained(tiny_model, text_encoder=None, vae=None)
    arguments = {"encoder_hidden_states": prompt.embeds, "img_shapes": [[(1, 4, 6)]], "return_dict": False}
    with torch.no_grad():
        base = theirs.transformer(hidden_states=latents, timestep=(sigma * 1000) / 1000, **arguments)[0]
        theirs.load_lora_weights(path)
        expected = theirs.transformer(hidden_states=latents, timestep=(sigma * 1000) / 1000, **arguments)[0]
        actual = predict_velocity(ours.transformer, latents, sigma, prompt, 4, 6)
    assert (expected - base).abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_only_lora_moves(tiny_model, encoded, tmp_path):
    """The engine trains: every frozen weight stays bit for bit what the file says, and has no gradient."""
    from train.config.zero_plan import ZeroPlan
    from train.data.batch import make_batch
    from train.data.shard_dataset import ShardDataset
    from train.engine.deepspeed_engine import initialize
    from train.engine.optimizer import Optimizer
    from train.flow.timestep_sampling import SigmaSampling
    from train.loader.indexed_loader import draw_sample
    from train.lora.inject import inject_lora
    from train.lora.spec import LoraSpec
    from train.process.ranks import join_process_group
    from train.step.flow_matching_module import FlowMatchingModule

    config = parse(flags(tiny_model, encoded, tmp_path))
    ranks = join_process_group()
    pipeline = QwenImagePipeline.from_pretrained(str(tiny_model), components=("transformer",), dtype=torch.float32)
    inject_lora(pipeline.transformer, LoraSpec.from_config(config))
    module = FlowMatchingModule(pipeline.transformer, "none", torch.float32)
    engine = initialize(module, Optimizer.from_config(config), ZeroPlan.from_config(config, ranks.world))
    dataset = ShardDataset(encoded)
    frozen = {name: p for name, p in pipeline.transformer.named_parameters() if not p.requires_grad}
    trained = {name: p.detach().clone() for name, p in pipeline.transformer.named_parameters() if p.requires_grad}
    for place in range(3):
        batch = make_batch(dataset, place, 0, [place], lambda *a: draw_sample(0, SigmaSampling(), 0.0, *a))
        loss = engine(batch.latents, batch.noise, batch.sigma, Prompt(batch.prompt_embeds, batch.prompt_mask)).mean()
        engine.backward(loss)
        assert all(parameter.grad is None for parameter in frozen.values())
        engine.step()
    weights = load_file(tiny_model / "transformer" / "diffusion_pytorch_model.safetensors")
    assert len(frozen) == len(weights)
    for name, parameter in frozen.items():
        assert torch.equal(parameter, weights[name.replace(".base_layer", "")]), name
    moved = [
        name
        for name, p in pipeline.transformer.named_parameters()
        if name in trained and not torch.equal(p, trained[name])
    ]
    assert len(moved) == len(trained)


def broken_json(tmp_path, **values):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | values))
    return ["--deepspeed", str(path)]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (lambda t: ["--model", "/no/model"], "model: no folder at /no/model"),
        (lambda t: ["--data", "/no/data"], "data: no folder at /no/data"),
        (lambda t: ["--lora_target_modules", "to_q,to_query"], "no linear layer is called 'to_query'; there are "),
        (lambda t: ["--sample_height", "100"], "sample_height"),
        (lambda t: ["--output_path", "/proc/run"], "/proc"),
        (lambda t: ["--learning_rat", "1"], "unknown flag --learning_rat (did you mean --learning_rate?)"),
        (lambda t: broken_json(t, gradient_clipping="auto"), 'gradient_clipping is "auto"'),
        (lambda t: broken_json(t, gradient_cliping=1.0), "unknown key gradient_cliping"),
        (lambda t: ["--validation_samples", "14"], "nothing is left to train on"),
        (lambda t: ["--activation_checkpointing", "7"], "7 blocks to recompute, but the model has 2"),
    ],
    ids=["model", "data", "target", "size", "output", "flag", "auto", "key", "validation", "blocks"],
)
def test_bad_input_is_one_clear_line(tiny_model, encoded, tmp_path, capsys, arguments, message):
    code = train_lora.main(flags(tiny_model, encoded, tmp_path / "run", "--max_steps", "1", *arguments(tmp_path)))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("error: ") and message in error


@pytest.mark.parametrize("policy,code,steps", [("stop", 3, 3), ("skip", 0, 5)])
def test_a_step_judged_on_the_device(tiny_model, encoded, tmp_path, capsys, monkeypatch, policy, code, steps):
    """As on a GPU: a fused AdamW and bf16. Step 2 isn't finite; the host learns of it when it has launched step 3."""
    original, adamw = module.velocity_target, torch.optim.AdamW.__init__
    monkeypatch.setattr(torch.optim.AdamW, "__init__", lambda *all, **more: adamw(*all, **more | {"fused": True}))
    more = ["--dtype", "bfloat16", "--max_steps", "5", "--log_steps", "5", "--on_nonfinite", policy]
    more += ["--gradient_accumulation_steps", "1", *NO_TRIALS]

    def run(name: str) -> int:
        calls = []

        def target(latents, noise):
            calls.append(1)
            return original(latents, noise) * (float("nan") if len(calls) == 2 else 1.0)

        monkeypatch.setattr(module, "velocity_target", target)
        assert train_lora.main(flags(tiny_model, encoded, tmp_path / name, *more)) == code
        assert "step 2 is not finite and was left out (1 so far): samples 0000" in capsys.readouterr().err
        return len(calls)

    assert run("device") == steps
    monkeypatch.setattr(engine, "can_judge_on_device", lambda zero: False)
    assert run("host") == steps
    results = [tmp_path / name / "lora.safetensors" for name in ("device", "host")]
    if policy == "stop":
        assert not any(path.exists() for path in results)
    else:
        on_device, on_host = (load_file(path) for path in results)
        assert all(torch.equal(on_device[name], on_host[name]) for name in on_host)
        assert rows_of(tmp_path / "device")[-1]["loss"] == rows_of(tmp_path / "host")[-1]["loss"]


def test_memory_that_runs_out_and_a_shared_gpu_are_one_clear_line(tiny_model, encoded, tmp_path, capsys, monkeypatch):
    """In the loop, where nothing can fall back any more; other RuntimeErrors are bugs and keep their traceback."""

    def fail(error: Exception) -> Callable[..., int]:
        def train(config: object, leaving: object) -> int:
            raise error

        return train

    options = flags(tiny_model, encoded, tmp_path / "run")
    monkeypatch.setattr(train_lora, "train", fail(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nmore")))
    assert train_lora.main(options) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: CUDA out of memory. Tried 2 GiB. Recompute more blocks") and "start again" in line
    monkeypatch.setattr(train_lora, "train", fail(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")))
    assert train_lora.main(options) == 4
    shared = "NCCL error in: x, invalid usage\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"
    capsys.readouterr()
    monkeypatch.setattr(train_lora, "train", fail(torch.distributed.DistBackendError(shared)))
    assert train_lora.main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: rank 1 and rank 0 both on CUDA device 1b000 of ")
    monkeypatch.setattr(train_lora, "train", fail(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        train_lora.main(options)


def test_encoded_shards_of_another_model_are_refused(tiny_model, encoded, tmp_path, capsys):
    from demo.tiny_model import build_tiny_model

    other = build_tiny_model(tmp_path / "other", seed=1)
    assert train_lora.main(flags(other, encoded, tmp_path / "run", "--max_steps", "1")) == 2
    error = capsys.readouterr().err
    assert f"was encoded by {tiny_model.name} with vae = " in error and f"but {other} has vae = " in error


def test_another_lora_shape_is_not_resumed(reference, tiny_model, encoded, capsys):
    output, _ = reference
    more = ["--max_steps", "8", "--gradient_accumulation_steps", "2", "--validation_samples", "3", "--lora_rank", "8"]
    assert train_lora.main(flags(tiny_model, encoded, output, *more)) == 2
    assert "lora.rank is 4 in the checkpoint, 8 in this run" in capsys.readouterr().err


def test_warm_start_goes_on_where_the_file_ends(reference, tiny_model, encoded, tmp_path):
    lora = reference[0] / "lora.safetensors"
    more = ["--lora_checkpoint", str(lora), "--max_steps", "1", "--validation_samples", "3", "--learning_rate", "1e-12"]
    rows = run(tiny_model, encoded, tmp_path / "warm", *more, "--lora_alpha", "8")  # another scale, the same update
    reached = [row["validation_loss"] for row in reference[1] if "validation_loss" in row][-1]
    assert next(row["validation_loss"] for row in rows) == pytest.approx(reached, rel=1e-6)


@pytest.mark.parametrize("policy,code,taken", [("stop", 3, 0), ("skip", 0, 2)])
def test_a_step_that_is_not_finite(tiny_model, encoded, tmp_path, capsys, monkeypatch, policy, code, taken):
    from train.flow import objective as flow

    original = flow.velocity_target
    calls = []

    def target(latents, noise):
        calls.append(1)
        return original(latents, noise) * (float("nan") if len(calls) == 1 else 1.0)

    monkeypatch.setattr("train.step.flow_matching_module.velocity_target", target)
    output = tmp_path / "run"
    more = ["--max_steps", "3", "--on_nonfinite", policy, *NO_TRIALS]
    assert train_lora.main(flags(tiny_model, encoded, output, *more)) == code
    said = capsys.readouterr().err
    assert "step 1 is not finite and was left out (1 so far): samples 0000" in said and "at σ 0." in said
    finite = [row for row in rows_of(output) if row.get("loss") and row["loss"] > 0]
    assert len(finite) == taken
    if policy == "skip":
        weights = load_file(output / "lora.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())
