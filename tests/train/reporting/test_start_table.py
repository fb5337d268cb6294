"""The table at the start: what, how much, how long, memory; and the commands at the end, which can be run."""

import shlex
from pathlib import Path

from train import merge_lora, sample
from train.reporting.start_table import StartTable
from train.saving import last_lines

FACTS = {
    "hardware": {"device": "H100", "device_bytes": 80 * 2**30, "ranks": 4},
    "data": {"name": "shards", "samples": 1234, "held_out": 16, "buckets": [[64, 64, 9], [96, 64, 9]]},
    "lora": {"trainable": 70_778_880, "groups": {"attention, image": {"layers": 180, "parameters": 1}}},
    "base": {"precision": "float8", "blocks": 60, "zero_stage": 2},
    "memory": {"device": {"base": 2**30, "AdamW": 2**30}},
    "steps": 1000,
    "global_batch": 4,
}


def test_the_table() -> None:
    every = {"LoRA": 250, "checkpoint": 250, "validation": 0}
    table = StartTable("Qwen/Qwen-Image", Path("run"), FACTS, every, "about 5 min", 200, int(41.5 * 2**30))
    assert table.lines() == [
        "  run      run, goes on from step 200",
        "  model    Qwen/Qwen-Image, 60 blocks, base in float8",
        "  on       4 × H100, ZeRO stage 2",
        "  data     shards: 1,234 samples in 2 buckets, 16 held out",
        "  LoRA     70,778,880 parameters on 180 layers (attention, image)",
        "  steps    800 of 4 samples each; LoRA, checkpoint every 250; validation at the end",
        "  memory   41.50 GiB of 80 on each GPU, by a trial step",
        "  time     about 5 min",
    ]
    planned = StartTable("m", Path("run"), FACTS, {}, "")
    assert (
        "  run      run, new" in planned.lines()
        and "  memory   2.00 GiB of 80 on each GPU, by the plan" in planned.lines()
    )


def test_the_commands_at_the_end_are_those_of_the_scripts(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    assert len(last_lines.next_commands("m", run, [])) == 3
    (run / "lora-500.safetensors").touch()
    head, *lines = last_lines.next_commands("m", run, ["TensorBoard", "W&B offline"])
    words = [shlex.split(line.partition("  ")[2] or line)[-50:] for line in lines]
    commands = [each[each.index("python") + 1 :] for each in words if "python" in each]
    assert head == "what may come next:" and [each[0] for each in commands] == [
        "train/sample.py",
        "train/sample.py",
        "train/merge_lora.py",
    ]
    for script, *flags in commands:
        if "merge" in script:
            assert all(
                f'"{flag}"' in Path(str(merge_lora.__file__)).read_text() for flag in ("--lora", "--output_path")
            )
            continue
        found = sample.build_parser().parse_args(flags)
        assert str(run) in found.checkpoints + found.lora
    assert f"tensorboard --logdir '{run}/tensorboard'" in lines[3] and f"'{run}/wandb'/offline-run-*" in lines[4]
