"""Photos to a LoRA by one command: every stage once, again only what has to be."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from demo.pictures.new_things import write_new_things
from train import make_lora

SIDE = 64


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_new_things(tmp_path / "photos", count=4, side=SIDE)
    return tmp_path / "photos"


@pytest.fixture
def flags(photos: Path, tiny_model: Path, tmp_path: Path) -> list[str]:
    own = ["--photos", str(photos), "--model", str(tiny_model), "--output_path", str(tmp_path / "made")]
    own += ["--max_pixels", str(SIDE * SIDE), "--num_inference_steps", "1", "--gpus", "0", "--prompt", "--- a blorb"]
    return [*own, "--dtype", "float32", "--lora_rank", "2", "--num_workers", "0", "--wandb_mode", "disabled"]


@pytest.mark.slow
def test_all_the_way_then_only_what_is_new(flags, tmp_path, capfd):
    assert make_lora.main([*flags, "--max_steps", "2"]) == 0
    made, said = tmp_path / "made", capfd.readouterr().out
    assert said.count("\n$ ") == 5 and "data_prep/make_shards.py" in said and "train/sample.py --compare" in said
    with safe_open(made / "run" / "lora.safetensors", "pt") as file:
        assert any("lora_B" in name for name in list(file.keys()))
    assert {"shards.html", "samples", "run", "encoded"} <= {path.name for path in made.iterdir()}
    assert (made / "samples" / "grid.png").is_file() and (made / "run" / "report.html").is_file()

    assert make_lora.main([*flags, "--max_steps", "2"]) == 0
    said = capfd.readouterr().out
    assert said.count("done before") == 5 and "\n$ " not in said

    assert make_lora.main([*flags, "--max_steps", "3"]) == 0
    said = capfd.readouterr().out
    assert said.count("done before") == 3 and said.count("\n$ ") == 2
    steps = [json.loads(line)["step"] for line in (made / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 3


def test_other_photos_are_refused(flags, photos, monkeypatch, capsys, tmp_path):
    ran = []
    monkeypatch.setattr(make_lora, "run_to_the_end", lambda words: ran.append(words) or 7)
    assert make_lora.main(flags) == 7
    assert "pack the photos: ended with exit code 7" in capsys.readouterr().err and len(ran) == 1
    state = make_lora.State.open(tmp_path / "made", photos)
    state.done["x"] = []
    make_lora.write_file(state.path, json.dumps({"photos": state.photos, "done": {}}))
    shutil.copy(photos / "blorb-00.png", photos / "another.png")
    assert make_lora.main(flags) == 2
    assert "are not those that" in capsys.readouterr().err and len(ran) == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--max_stepz", "3"], "unknown flag --max_stepz (did you mean --max_steps?)"),
        (["--data", "x"], "--data can't be given: this script chooses it"),
        (["--learning_rate", "fast"], "learning_rate"),
    ],
)
def test_a_typing_error_is_told_before_anything_is_packed(flags, more, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(make_lora, "run_to_the_end", lambda words: pytest.fail("nothing may run"))
    assert make_lora.main([*flags, *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "made").exists()


def test_all_stages_get_one_model(flags, monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(make_lora, "run_to_the_end", lambda words: ran.append(words) or 0)
    monkeypatch.setattr(make_lora, "prompts_of", lambda shards, made, given: ["a blorb"])
    more = ["--revision", "v2", "--vae_path", "other_vae", "--model_family", "text-to-image", "--transformer_path", "t"]
    assert make_lora.main([*flags, *more]) == 0
    given = {Path(words[make_lora.script_in(words)]).name: words for words in ran}
    for script in ("encode_shards.py", "train_lora.py", "sample.py"):
        words = given[script]
        for name, text in zip(more[::2], more[1::2], strict=True):
            if (script, name) != ("encode_shards.py", "--transformer_path"):  # it reads none
                assert words[words.index(name) + 1] == text, (script, name)


def test_what_is_made_lies_apart_from_the_photos(flags, photos, monkeypatch, capsys):
    monkeypatch.setattr(make_lora, "run_to_the_end", lambda words: pytest.fail("nothing may run"))
    flags[5] = str(photos / "made")
    assert make_lora.main(flags) == 2
    assert "lies in photos" in capsys.readouterr().err and not (photos / "made").exists()


def test_no_photos(flags, tmp_path, capsys):
    flags[1] = str(tmp_path / "nothing")
    assert make_lora.main(flags) == 2
    assert "is no folder" in capsys.readouterr().err


def test_several_gpus_get_a_launcher_and_the_same_state(monkeypatch, flags, photos, tmp_path):
    assert make_lora.launcher(1) == ["python"] and make_lora.launcher(2)[:3] == ["deepspeed", "--num_gpus", "2"]
    result = tmp_path / "result"
    result.touch()
    monkeypatch.setattr(make_lora, "run_to_the_end", lambda words: 0)
    state = make_lora.State.open(tmp_path / "made", photos)
    state.stage("train", [*make_lora.launcher(2), "train/train_lora.py", "--x"], result)
    monkeypatch.setattr(make_lora, "run_to_the_end", lambda words: pytest.fail("done before"))
    make_lora.State.open(tmp_path / "made", photos).stage("train", ["python", "train/train_lora.py", "--x"], result)


@pytest.mark.slow
def test_pairs_are_sampled_with_their_own_source_images(tiny_edit_models, tmp_path, capfd):
    pairs = tmp_path / "pairs"
    write_new_things(pairs / "target", count=6, side=SIDE)
    shutil.copytree(pairs / "target", pairs / "source", ignore=shutil.ignore_patterns("*.txt"))
    own = [
        "--photos",
        str(pairs),
        "--model",
        str(tiny_edit_models["edit-2509"]),
        "--output_path",
        str(tmp_path / "made"),
    ]
    own += ["--max_pixels", str(SIDE * SIDE), "--num_inference_steps", "1", "--gpus", "0", "--max_steps", "2"]
    own += ["--dtype", "float32", "--lora_rank", "2", "--num_workers", "0", "--wandb_mode", "disabled"]
    assert make_lora.main(own) == 0
    prompts = yaml.safe_load((tmp_path / "made" / "samples.yaml").read_text())
    assert len(prompts) == make_lora.PROMPTS and all(len(each["source_image"]) == 1 for each in prompts)
    assert (tmp_path / "made" / "samples" / "grid.png").is_file()
    said = capfd.readouterr()
    assert "--source_image" in said.out + said.err  # what may come next


def test_given_prompts_take_the_samples_pictures_in_turn(tmp_path):
    file = make_lora.write_prompts(tmp_path, ["a", "b", "c"], [[b"1", b"2"], [b"3"]], ".png")
    entries = yaml.safe_load(file.read_text())
    told = [(each["prompt"], [Path(path).read_bytes() for path in each["source_image"]]) for each in entries]
    assert told == [("a", [b"1", b"2"]), ("b", [b"3"]), ("c", [b"1", b"2"])]


def test_what_becomes_of_captions_is_encoded_and_training_is_told_the_same(flags, monkeypatch, tmp_path):
    ran = []

    def done(words: list[str]) -> int:
        ran.append(words)
        for name in ("shards/manifest.json", "encoded/manifest.json", "shards.html", "run/lora.safetensors"):
            (tmp_path / "made" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "made" / name).touch()
        return 0

    monkeypatch.setattr(make_lora, "run_to_the_end", done)
    levers = ["--trigger_word", "my cat", "--caption_shuffle_tags"]
    make_lora.main([*flags, *levers])  # ends where it looks for captions: nothing was packed
    encode, train = (
        next(words for words in ran if f"{name}.py" in " ".join(words)) for name in ("encode_shards", "train_lora")
    )
    assert encode[2:5] == ["--trigger_word", "my cat", "--caption_shuffle_tags"] and encode[-2:] == [
        "--caption_variants",
        "8",
    ]
    assert train[-3:] == levers
    ran.clear()
    make_lora.main([*flags, "--trigger_word", "zwx"])
    encode = next(words for words in ran if "encode_shards.py" in " ".join(words))
    assert "--caption_variants" not in encode and "zwx" in encode
