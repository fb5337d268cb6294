"""Prompts as texts and in files: what is read, and what is wrong with which line."""

import dataclasses
from pathlib import Path

import pytest

from train.config.sample_prompts import SamplePrompt, read_prompts

DEFAULTS = SamplePrompt(prompt="", height=512, width=256, num_inference_steps=30, seed=40)


def test_a_file_says_more_than_a_text(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(
        "- a lighthouse\n- prompt: 'a: storm'\n  negative_prompt: blurry\n  width: 768\n  height: 1152\n"
        "  true_cfg_scale: 1\n  num_inference_steps: 20\n  seed: 7\n  lora_strength: 0.8\n"
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "a fox é", "seed": 3}\n\n"zwei"\n', encoding="utf-8")
    texts = ["one, with a comma", str(tmp_path / "p.yaml"), str(tmp_path / "p.jsonl")]
    found = read_prompts(texts, DEFAULTS, count_seeds=True)
    assert [each.prompt for each in found] == ["one, with a comma", "a lighthouse", "a: storm", "a fox é", "zwei"]
    assert [each.seed for each in found] == [40, 41, 7, 3, 44]
    assert found[1] == dataclasses.replace(DEFAULTS, prompt="a lighthouse", seed=41)
    storm = SamplePrompt(
        prompt="a: storm",
        negative_prompt="blurry",
        width=768,
        height=1152,
        true_cfg_scale=1.0,
        num_inference_steps=20,
        seed=7,
        lora_strength=0.8,
    )
    assert found[2] == storm and (storm.passes, found[1].passes) == (20, 60)
    assert [each.seed for each in read_prompts(texts, DEFAULTS)] == [40, 40, 7, 3, 40]


@pytest.mark.parametrize(
    "name,text,message",
    [
        ("p.yaml", "- prompt: a\n- prompt: b\n  widht: 64\n", "line 2: unknown name 'widht' (did you mean width?)"),
        ("p.yaml", "- prompt: a\n  width: 100\n", "line 1: width must be a multiple of 16, got 100"),
        ("p.yaml", "- prompt: a\n  true_cfg_scale: .nan\n", "line 1: true_cfg_scale must be"),
        ("p.yaml", "- prompt: a\n  seed: -1\n", "line 1: seed must be at least 0, got -1"),
        ("p.yaml", "- prompt: 12\n", "line 1: prompt must be text, got 12; put it in quotes"),
        ("p.yaml", "- 12\n", "line 1: each is a text or has a prompt"),
        ("p.yaml", "- prompt: ' '\n", "line 1: the prompt is empty"),
        ("p.yaml", "prompt: a\n", "must be a list of prompts"),
        ("p.yaml", "- [\n", "is no YAML"),
        ("p.yml", "", "holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "p.jsonl, line 2 is no JSON"),
        ("p.jsonl", '{"width": 64}\n', "line 1: each is a text or has a prompt, with any of negative_prompt, height"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"p\.") as error:
        read_prompts([str(tmp_path / name)], DEFAULTS)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file of prompts at .*none\.yaml"):
        read_prompts([str(tmp_path / "none.yaml")], DEFAULTS)
